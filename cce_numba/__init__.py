"""Cut Cross-Entropy: loss and gradients of a linear layer with cross-entropy, without ever storing the logits.

>>> import numpy as np, cce_numba as cce
>>> e, c, targets = np.zeros((2, 4)), np.ones((8, 4)), np.array([3, 5])
>>> loss, grads = cce.linear_cross_entropy_with_grad(e, c, targets)
>>> loss.round(4), grads.c.shape
(np.float64(2.0794), (8, 4))
"""

from cce_numba.backend import BackendUnavailable, Gradients
from cce_numba.distillation import linear_distillation, linear_distillation_with_grad
from cce_numba.logprobs import linear_logprobs
from cce_numba.loss import (
    Result,
    backward,
    explain,
    forward,
    indexed_dot,
    linear_cross_entropy,
    linear_cross_entropy_with_grad,
    linear_logsumexp,
)
from cce_numba.plan import Plan
from cce_numba.returned import Logprobs, LossStatistics
from cce_numba.shards import ShardResult, forward_shard, merge

__version__ = "0.2.0"

__all__ = [
    "BackendUnavailable",
    "Gradients",
    "Logprobs",
    "LossStatistics",
    "Plan",
    "Result",
    "ShardResult",
    "backward",
    "explain",
    "forward",
    "forward_shard",
    "indexed_dot",
    "linear_cross_entropy",
    "linear_cross_entropy_with_grad",
    "linear_distillation",
    "linear_distillation_with_grad",
    "linear_logprobs",
    "linear_logsumexp",
    "merge",
]
