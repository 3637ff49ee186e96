"""What the tensor-core kernels take, by name.

Addresses are of device memory: `U64` ones count bytes, and pointers (`pointer_to`) are indexed in numbers. N tokens, V
vocabulary entries, D hidden size; tokens that count are listed, and blocks of 128 listed tokens share survivor bits.
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


# ---- backward


class Output(Record):
    """A gradient, dE (N, D) or dC (V, D), in rows that can be stored 16 bytes at a time."""

    address = U64  # 0 if it is not wanted
    pitch_bytes = I64  # from one row to the next
    is_float32 = I32  # 1 if it is float32, 0 if it is of the inputs' dtype
    tiles = I32  # jobs (tiles of 192 hidden entries) that 128 of its rows take, 0 if it takes none


class WeightedTokens(Record):
    """The tokens that count, and what the survey reads of each. All arrays but the first two are by row of e."""

    listed = pointer_to(np.int32)  # (N,) rows of e of the tokens that count, ascending; the first n_valid[0] are there
    n_valid = pointer_to(np.int64)  # (1,)
    softmax_weight = pointer_to(np.float32)  # (N,)
    target_weight = pointer_to(np.float32)  # (N,)
    largest_weight = pointer_to(np.float32)  # (N,) the largest magnitude of a token's weights but the target's
    lse = pointer_to(np.float32)  # (N,) log-sum-exp, natural logarithm
    target_logit = pointer_to(np.float32)  # (N,) NaN for a target out of range
    targets = pointer_to(np.int64)  # (N,)


class SurvivorBits(Record):
    """What the forward leaves: a bit for each block and column, set if the column survives in the block."""

    words = pointer_to(np.uint32)  # (blocks, pitch_words): bit v & 31 of word v >> 5; 0 if all columns survive
    pitch_words = I64  # from one block to the next
    coarse_words = I64  # from a word to the word of the columns that dC needs, whose threshold is higher; 0 if it is the same


class RowWeights(Record):
    """What makes the gradient of the logits of one token out of these logits (`gradient`)."""

    softmax = F32  # weight of the softmax
    log_sum = F32  # log-sum-exp, in base 2
    target_weight = F32  # weight of the one-hot target
    target = I32  # vocabulary entry, -1 for none
    scale = F32  # of the logits
    uniform = F32  # what label smoothing takes from the gradient of an entry whose class weight is 1
