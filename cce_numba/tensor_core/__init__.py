"""What kernels for tensor cores of all generations share: nothing here needs more than sm_80.

records        what kernels take, by name
schedule       which worker computes which tiles
tokens         the list of tokens that count
matrices       what rows must be like to be read 16 bytes at a time, and copies that are so
indexed_dot    the target's logit of each token
fragment       functions of one logit, applied to a thread's part of a tile
logits         products become logits: bias, scale, softcap, padding
divergence     what kernels know of a teacher, and one entry's part in a divergence
parked         where a teacher's logarithms of probabilities wait for the student's logits
distillation   the host's part of a student and a teacher
folds/         what becomes of a tile of logits
merge          what several workers found for the same tokens
layout         how a forward is cut into launches
found          what a forward leaves behind
top_k          the best entries of each token
reduction      the loss out of each token's log-sum-exp and target logit
survey/        survivor bits become a plan of work for the backward
exponentials, quads, numbers, sums    small device functions
"""
