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
    entropy_weight = U64  # address of (N,) float32, by row of e: in the backward, what multiplies p * log(p)


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
    kept = U64  # address of kept logits (`tensor_core.kept`), (blocks, kept_tiles) tiles; 0 if none are kept
    kept_tiles = I32  # tiles of each block that are kept, the first ones
    kept_blocks = I32  # blocks of tokens; a worker may meet one more, which has none


class SeveralTargets(Record):
    """The targets of tokens that have several. Arrays are by row of e."""

    ids = pointer_to(np.int64)  # (N, K)
    K = I32
    padding = I64  # a target that is this number is none
    logits = pointer_to(np.float32)  # (N, K): a result of the forward


class GroupMaxima(Record):
    """The two largest logits of groups of entries (`folds.group_maxima`), of the tokens of a batch."""

    best = U64  # address of (positions in the batch, pitch) float32: the largest logit of each group
    others = U64  # address of (positions, pitch, 2) float32: the second largest, and the place of the largest, an int32
    pitch = I64  # groups of a row, in all tiles of the vocabulary


class FoundOfMore(Record):
    """`Found`, where tokens have several targets, or their best entries are wanted.

    With several targets nobody reads `targets`, and `bound` has the largest of a token's target logits.
    """

    results = pointer_to(np.float32)
    pitch = I64
    targets = pointer_to(np.int64)
    bound = pointer_to(np.float32)
    kept = U64
    kept_tiles = I32
    kept_blocks = I32
    several = SeveralTargets
    maxima = GroupMaxima


class LogSums(Record):
    """What the log-sum-exps of a head's tokens are made of, by row of e."""

    max_logit = U64  # address of (N,) float32: the largest logit
    log_sum = U64  # address of (N,) float32: natural logarithm of the sum of exp(z - max_logit)


class Heads(Record):
    """A student's head and its teacher's, once both forwards are done."""

    student = LogSums
    teacher = LogSums
    parked = U64  # address of the teacher's parked logarithms (`tensor_core.parked`), one slot for each consumer of each CTA


class FoundOfHeads(Record):
    """`Found`, of a divergence between two heads (`folds.divergence`)."""

    results = pointer_to(np.float32)
    pitch = I64
    heads = Heads


class Teacher(Record):
    """The teacher's head, whose products a kernel computes before the student's. Its logit scales are the student's."""

    e = Matrix  # (N, D)
    c = Matrix  # (V, D)
    D = I32  # its hidden size
    bias = U64  # address of (V,), or 0
    softcap = F32


class NoTeacher(Record):
    """In place of `Teacher`, where there is none."""


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
    first_block = I32  # number of the first block of these bits, among all blocks of listed tokens
    seed = pointer_to(np.int64)  # (1,) of the unbiased filter's draws; null for the filter that drops


class Vocabulary(Record):
    """The part of the vocabulary that a launch sees."""

    first_tile = I32
    n_tiles = I32
    first_row = I32  # of c, which the tensor map of c begins with
    V = I32  # of the whole vocabulary


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
    max_logit = pointer_to(np.float32)  # (N,) the largest logit
    log_sum = pointer_to(np.float32)  # (N,) natural logarithm of the sum of exp(z - max_logit)
    target_logit = pointer_to(np.float32)  # (N,) NaN for a target out of range
    targets = pointer_to(np.int64)  # (N,)


class SurvivorBits(Record):
    """What the forward leaves: a bit for each block and column, set if the column survives in the block."""

    words = pointer_to(np.uint32)  # (blocks, pitch_words): bit v & 31 of word v >> 5; 0 if all columns survive
    pitch_words = I64  # from one block to the next
    coarse_words = I64  # from a word to the word of the columns that dC needs, whose threshold is higher; 0 if it is the same


class Chance(Record):
    """The unbiased filter's threshold and the seed of its draws (see `cce_numba.survivors`)."""

    eps = F32  # a probability
    seed = pointer_to(np.int64)  # (1,); null for the filter that drops, and where nothing is filtered


class NoTargets(Record):
    """In place of `PlacedTargets`, where a token has one target, which `RowWeights` knows."""


class PlacedTargets(Record):
    """Where in G the targets of tokens stand, where tokens have several, and what they give to it.

    Arrays are (blocks, K, 128), for the listed tokens of a block. Of targets of a token that are equal, the first stands for
    all. What is none has ordinal -1.
    """

    ordinals = U64  # address of int32: how many of the sorted columns before the target's survive in the block
    entries = U64  # address of int32: the vocabulary entry
    weights = U64  # address of float32: the sum of the weights of equal targets, times the survey's scale
    logits = U64  # address of float32: as the forward found it
    K = I32  # a multiple of 4


class Distillation(Record):
    """In place of `PlacedTargets`: what makes G of the logits of two heads. Arrays are by row of e."""

    teacher = Teacher
    heads = Heads
    weight = U64  # address of (N,) float32: what flows into each token's divergence, times its logit scale
    of_student = U64  # address of (N,) float32: the sum of the second of `divergence.Functions.terms`


class LogSum(Record):
    """What a token's log-sum-exp is made of; a logit less the one and then the other is the logarithm of a probability."""

    max_logit = F32
    log_sum = F32


class HeadRow(Record):
    """What makes logarithms of probabilities of one token's products."""

    sums = LogSum
    scale = F32  # of the logits


class DivergenceRow(Record):
    """What makes the gradient of one token's divergence of the logarithms of two probabilities."""

    student = HeadRow
    weight = F32  # what flows into the divergence, times the survey's scale; 0 for a row that is nobody's
    of_student = F32


class RowWeights(Record):
    """What makes the gradient of the logits of one token out of these logits (`gradient`)."""

    softmax = F32  # weight of the softmax, divided by the sum of 2^(log2(e) * z - shift); less `entropy` * log2 of that sum
    shift = F32  # `exponentials.shift_of` the largest logit
    target_weight = F32  # weight of the one-hot target
    target = I32  # vocabulary entry, -1 for none
    scale = F32  # of the logits
    uniform = F32  # what label smoothing takes from the gradient of an entry whose class weight is 1
    entropy = F32  # ln 2 times the weight of p * log(p), divided by the sum as the softmax's is
