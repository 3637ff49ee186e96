"""What the tensor-core kernels take, by name.

There are N tokens, V vocabulary entries, and D is the hidden size. Tokens that count are listed, and blocks of 128 listed
tokens share survivor bits. An address (`U64`) counts bytes, a pointer is indexed by numbers; both are of device memory.
"""

from __future__ import annotations

import numpy as np
from numba.cuda import types

from cce_numba.launch.kernel import pointer_to
from cce_numba.launch.record import Record

I32, I64, U32, U64, F32 = types.int32, types.int64, types.uint32, types.uint64, types.float32


class Matrix(Record):
    """A matrix of 16-bit numbers whose rows are contiguous."""

    address = U64
    pitch_bytes = I64  # from one row to the next


class LogitTerms(Record):
    """What makes a logit of a product, and the weights per entry and token that multiply it; 0 for what is absent."""

    bias = U64  # address of (V,), of e's dtype or float32
    bias_bytes = I32  # of one of its numbers
    softcap = F32
    scale = U64  # address of (N,) float32, by row of e
    uniform_weight = U64  # address of (N,) float32, by row of e: in the backward, what label smoothing takes from each logit
    class_weights = U64  # address of (V,) float32


class Tokens(Record):
    """The tokens that count, from some place in their list on: a batch."""

    listed = U64  # address of int32: rows of e, ascending
    n_valid = pointer_to(np.int64)  # (1,) how many count in all
    first = I64  # the batch's place in the whole list
    most = I32  # tokens of the batch, at most


class Found(Record):
    """Where the forward's results per token are, each by row of e, and what it knows of each token beforehand."""

    results = pointer_to(np.float32)  # (results of all folds, pitch); the first is the log-sum-exp
    pitch = I64  # N
    targets = pointer_to(np.int64)  # (N,), or null without targets
    bound = pointer_to(np.float32)  # (N,) the target's logit, NaN for one out of range; null where no survivors are recorded


class Parts(Record):
    """What workers have found of their parts of the vocabulary, before it is merged."""

    numbers = U64  # address of (numbers of all folds, pitch) float32, each row (slots, tokens of a group)
    pitch = I64  # slots * tokens of a group


class Survivors(Record):
    """Survivor bits, a row of words for each block of tokens; and what a logit must reach (see `cce_numba.survivors`)."""

    bits = U64  # address of (blocks, pitch_words) uint32, zeroed; 0 if none are recorded
    pitch_words = I64  # 0 if these bits are to be left alone
    coarse_words = I64  # from a word to the word of dC's bits, whose threshold is higher; 0 without any
    log_eps = F32  # natural logarithm of the threshold
    log_coarser = F32  # how much higher that of dC's bits is


class Vocabulary(Record):
    """The part of the vocabulary that a launch sees."""

    first_tile = I32
    n_tiles = I32
    first_row = I32  # of c, which the tensor map of c begins with
    V = I32  # of the whole vocabulary
