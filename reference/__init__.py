"""Cut Cross-Entropy written down plainly: NumPy, float64, the logits stored. The definition of right.

Every kernel is tested against this package, and it is the place to start reading. In order:

* `building_blocks`  logits, log-sum-exp, softmax, one-hot rows: one formula each
* `tokens`           which tokens take part, and what belongs to each of them
* `loss`             `forward` and `backward`: the loss and its gradients, from stored logits
* `distribution`     log-probabilities, entropy and the likeliest entries of each token, and gradients through them
* `distillation`     how far a student's distribution is from a teacher's, and the gradients for the student
* `online`           the log-sum-exp folded tile by tile, and why tiles may be merged in any grouping
* `filters`          which entries of the gradient are too small to matter, known already in the forward
* `roulette`         a filter that is right on average: what is too small survives by chance, and is multiplied
* `blocked`          all of it together in the kernels' loop order: a tile of logits at a time, none stored

>>> import numpy as np
>>> e, c, targets = np.eye(3), np.eye(4, 3), np.array([0, 1, -100])
>>> result = forward(e, c, targets)
>>> result.nll.round(3).tolist(), float(result.loss.round(3)), result.n_valid
([0.744, 0.744, 0.0], 0.744, 2)
>>> backward(e, c, targets).c.shape
(4, 3)
"""
# ruff: noqa: F401 - everything imported here is a public name

from . import blocked
from .building_blocks import (
    distribution_gradient,
    entropy_terms,
    log_softmax,
    logit_gradient,
    logits,
    logsumexp,
    onehot,
    softcap_slope,
    softmax,
    target_logit,
    weighted,
)
from .distillation import Distillation, Head, distillation, distillation_backward, divergence_and_gradient, union
from .distribution import Distribution, distribution, distribution_backward
from .filters import auto_eps, column_filter, column_flags, dropped_mass, forward_flags, tile_filter
from .loss import Forward, Gradients, backward, forward, weights
from .online import merge, online_logsumexp, to_lse
from .roulette import draw_seed, draws, of_tokens, roulette
