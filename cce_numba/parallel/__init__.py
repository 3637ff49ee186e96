"""Several processes, of which each has some rows of the classifier: what they tell each other, and who carries it.

    rank        one of the processes (or threads) that share a vocabulary; ranks are numbered from 0
    shard       the rows of the classifier that a rank has: consecutive entries of the vocabulary, any number of them, even 0
    partial     what a rank has found of its shard, for each token
    packed      the numbers of a partial, side by side, as the ranks send them to each other

    shard           which rows a rank has, and how a target is coded there
    numbers         a partial's numbers, packed and unpacked
    bounds          what ranks tell each other while they go forward, so that they flag fewer columns
    merge           what is true of the whole vocabulary, out of all ranks' numbers
    communicator    what carries arrays between ranks; uneven rows of tokens
    cupy_nccl       cupyx.distributed's NCCL as a communicator
    agreement       that all ranks were called with the same arguments

A call goes: agree, forward on the own shard (in training with an exchange of bounds on its way), one gather of the packed
numbers, merge in the order of ranks, loss; then the backward of the own shard with the merged numbers, and one sum of the
gradient of e. `driver.py` does these steps.
"""

from cce_numba.parallel.agreement import Disagreement
from cce_numba.parallel.communicator import Communicator
from cce_numba.parallel.cupy_nccl import CupyCommunicator
from cce_numba.parallel.shard import rows_of_rank

__all__ = ["Communicator", "CupyCommunicator", "Disagreement", "rows_of_rank"]
