"""Which folds a forward runs. A fold is what becomes of tiles of logits, of which none is kept.

A fold has a state for each row of logits (each token), and four parts:

    begin   the state before the first tile, or where earlier tiles of the same rows have left it
    step    the state after one more tile
    merge   the state of two parts of a row, of which different workers have seen one each: consumers, splits, GPUs
    store   what the state says of a token is written to the fold's results

Each backend has its own folds, under the same names and in one file each: `cpu/folds/`, `simt/folds/`, `tensor_core/folds/`.
"""

from __future__ import annotations

from cce_numba.arguments import Problem

MAX_SUM = "max_sum"  # the largest logit and the sum of exponentials, of which the log-sum-exp is made; others may build on it
TARGET_LOGIT = "target_logit"  # the target's logit, as it stands among the others
MEAN_LOGIT = "mean_logit"  # the mean over the vocabulary of class weight times logit
KEPT_LOGITS = "kept_logits"  # logits that are kept for the backward, in a few bits, as far as there is memory
SURVIVORS = "survivors"  # which vocabulary entries the backward must look at
# With m the largest logit, y = logit - m, and s the sum of exp(y) (`MAX_SUM`). Parts i merge with d_i = m_i - m and
# w_i = exp(d_i), and as nothing where m_i = -inf.
ENTROPY = "entropy"  # t = sum of exp(y) * y; of parts the sum of w_i * (t_i + d_i * s_i); the entropy is log(s) - t / s
SUM_SQUARES = "sum_squares"  # q = sum of exp(y)**2; of parts the sum of w_i**2 * q_i; the result is q / s**2
DIVERGENCE = "divergence"  # of a student's head from a teacher's, once the log-sum-exps of both are known; no forward wants it
TOP_K = "top_k"  # the k largest logits and their entries, by descending logit, and by ascending entry where logits are equal


def wanted(p: Problem, record_survivors: bool, keep_logits: bool = False) -> tuple[str, ...]:
    """The names of the folds that a problem's forward runs, in the order in which they see a tile.

    Where labels are smoothed under a softcap nothing is filtered, so there are no survivors to record.
    """
    smooths = p.options.smooths_capped
    asked = {
        TARGET_LOGIT: p.targets is not None,
        MEAN_LOGIT: smooths,
        ENTROPY: p.options.entropy,
        SUM_SQUARES: p.options.sum_squares,
        TOP_K: p.options.top_k > 0,
        SURVIVORS: record_survivors and not smooths,
        KEPT_LOGITS: keep_logits,
    }
    return MAX_SUM, *(name for name, is_asked in asked.items() if is_asked)
