"""What a call may have besides e, c and targets, by the names that `precompile --options` knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# Each is a function of the sizes (N, V, D), of what stands for CuPy, and of e's dtype. Kernels depend on whether an option is
# there and on the dtypes of arrays, not on values.
SEVERAL = 2  # targets of a token, if there are several: kernels do not depend on how many
Maker = Callable[[tuple[int, int, int], Any, np.dtype], dict[str, Any]]
OPTIONS: dict[str, Maker] = {
    "bias": lambda shape, xp, dtype: {"bias": xp.zeros(shape[1], dtype)},
    "bias-fp32": lambda shape, xp, dtype: {"bias": xp.zeros(shape[1], np.float32)},
    "softcap": lambda shape, xp, dtype: {"softcap": 30.0},
    "logit-scale": lambda shape, xp, dtype: {"logit_scale": 0.5},
    "label-smoothing": lambda shape, xp, dtype: {"label_smoothing": 0.1},
    "z-loss": lambda shape, xp, dtype: {"z_loss": 1e-4},
    "class-weights": lambda shape, xp, dtype: {"class_weights": xp.zeros(shape[1], np.float32)},
    "token-weights": lambda shape, xp, dtype: {"token_weights": xp.zeros(shape[0], np.float32)},
    "accum-e-fp32": lambda shape, xp, dtype: {"accum_e_fp32": True},
    "accum-c-fp32": lambda shape, xp, dtype: {"accum_c_fp32": True},
    "several-targets": lambda shape, xp, dtype: {"target_probs": xp.zeros((shape[0], SEVERAL), np.float32)},
    "entropy": lambda shape, xp, dtype: {"entropy": True},
    "sum-squares": lambda shape, xp, dtype: {"sum_squares": True},
    "top-k": lambda shape, xp, dtype: {"top_k": 8},
    "batch-invariant": lambda shape, xp, dtype: {"batch_invariant": True},
    "drop": lambda shape, xp, dtype: {"filter": "drop"},
    "exact": lambda shape, xp, dtype: {"filter_eps": None},
}
