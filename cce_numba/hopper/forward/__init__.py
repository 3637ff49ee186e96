"""The forward on Hopper tensor cores. Read in this order:

layout      how a problem is cut: copies, batches of tokens, parts of the vocabulary
batch       which tokens a CTA has
producer    the warps that fetch tiles of e and c
consumer    the warpgroups that multiply and fold them
kernel      the kernel that these make
host        all launches of a forward

batch       tokens of one launch
block       128 listed tokens: a CTA's, and those that share survivor bits
group       the blocks of a cluster's CTAs
worker      a cluster, which stays on its multiprocessors for the whole launch
stage       64 terms of a tile's sum: rows of e and of c, 64 numbers of each
use         a stage's passage through the ring; uses are numbered
slot        the place of a worker's partial results for a group
turn        a consumer's time to multiply, while the other folds
teacher     another head, whose stages of each tile come before the student's; its logarithms of probabilities are parked
            (`tensor_core.parked`) until the student's logits are there
"""
