"""The survey: survivor bits become a plan of work for the backward, on the device.

The forward leaves a bit for each block of tokens and column of the logits: whether the filter keeps the two. The unbiased
filter decides later, when the logits are there again; here it keeps all that it may keep. The survey sorts the columns, so that
columns which matter to the same blocks lie together, cuts the sorted columns into rounds, and says for each block which of them
survive. The words of this package, which are those of the backward, too:

    column   a vocabulary entry, as a column of the logits. Sorted columns are numbered j
    block    128 listed tokens, the last block perhaps fewer. It is *active* if a token of it has weight, and *whole* if it is
             128 consecutive rows of e, all of which have weight
    pair     a block and a column
    survive  a column survives in an active block if the filter keeps the pair
    tile     128 sorted columns. It is *live* if a column of it survives in some block, else *empty*; live tiles come first
    needed   the filter that drops may have a higher threshold for dC, which keeps fewer pairs. dC needs a tile for a block if
             its threshold keeps a pair of theirs. The tiles that it needs for any block come first among the live ones
    dense    a survey is dense if all columns survive in all active blocks, or are taken to, because nearly all do
    round    live tiles that the backward treats together: those of about `cap` surviving pairs
    list     the columns of a round that survive in a block
    slot     room in the workspace for one column of G of one block. A list takes a multiple of 64 slots
    job      what a CTA of the backward computes at a time: the logits of 192 columns of a list, or a tile of dE or dC
    phase    jobs that may run at the same time: G(r), the logits of round r, or P(r), the products of their G

`tables` says what the tables hold. `host.survey` launches these kernels in order; each reads what those before it made, and
none depends on which CTA comes first, since atomics only count:

    weigh    weigh.py    the scale of the weights; which blocks are active
    list     listing.py  each listed token's row and weights; each column's key, by which columns are sorted (keys.py)
    order    order.py    the sorted columns; whether the survey is dense; how many tiles are live
    sort     sort.py     survivor bits of the sorted columns; the tiles that dC needs; how many columns of a tile survive
    rounds   rounds.py   sums of these numbers; the rounds
    slots    rounds.py   the first slot and the first job of each list
    phases   rounds.py   the number of jobs of each phase
"""

from cce_numba.tensor_core.survey.host import Products, survey

__all__ = ["Products", "survey"]
