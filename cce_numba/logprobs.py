"""`linear_logprobs`: log-probabilities of given entries, and what else there is to say of each token's distribution."""

from __future__ import annotations

from typing import Any, Unpack

from cce_numba import arguments, driver, ranks
from cce_numba.options import LossOptions
from cce_numba.parallel.communicator import Communicator
from cce_numba.ranks import sharing_of
from cce_numba.returned import Logprobs

# Filters mean nothing where there is no backward; they are taken so that one set of options does for PyTorch and for arrays.
OPTIONS = (
    "bias",
    "softcap",
    "logit_scale",
    "shift",
    "ignore_index",
    "entropy",
    "sum_squares",
    "top_k",
    "batch_invariant",
    "allow_tf32",
    "filter",
    "filter_seed",
    "filter_eps",
    "filter_e_grad",
    "filter_c_grad",
    "check_targets",
    "workspace_bytes",
    "backend",
)


def linear_logprobs(
    e: Any,
    c: Any,
    ids: Any,
    *,
    communicator: Communicator | None = None,
    tokens_axis: int | None = None,
    **options: Unpack[LossOptions],
) -> Logprobs:
    """Log-probabilities `log(softmax(e @ c.T + bias))` of each token's ids, without storing the logits.

    One pass over the logits finds all that is asked for. For gradients, call `forward` and `backward` with `d_logprobs`,
    `d_entropy` and `d_lse`; `cce_numba.torch.linear_logprobs` is recorded by autograd.

    Args:
        e: (..., D) embeddings, as in `linear_cross_entropy`.
        c: (V, D) classifier.
        ids: (...) integers in [0, V), or (..., K) for several entries of each token; `ignore_index` is padding. A token whose
            ids are all padding is ignored.
        communicator, tokens_axis: as in `linear_cross_entropy`.
        bias, softcap, logit_scale, shift, ignore_index, check_targets, backend: as in `linear_cross_entropy`; ids shift as
            targets do, and are what `check_targets` looks at.
        entropy: return the entropy of each token's distribution, in nats.
        sum_squares: return the sum of the squares of all probabilities: 1 / V for a uniform distribution, 1 for a certain one.
        top_k: return the k largest log-probabilities and their entries, exactly: those of the largest logits, as the backend
            computes them in float32 (float64 for float64), equal ones by ascending entry.
        batch_invariant: a token's numbers are bitwise the same whatever other tokens stand beside it, and how many.
        allow_tf32: as in `linear_cross_entropy`.
        filter, filter_seed, filter_eps, filter_e_grad, filter_c_grad, workspace_bytes: accepted, and of no effect, since they
            are about gradients.

    Returns a `Logprobs` of arrays of e's kind, on e's device.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `linear_cross_entropy` does.
        NotImplementedError: the backend does not have what is asked for yet.

    >>> import numpy as np
    >>> found = linear_logprobs(np.zeros((2, 4)), np.ones((8, 4)), np.array([[1, 2], [3, -100]]), entropy=True, top_k=2)
    >>> found.logprobs.round(4).tolist(), found.entropy.round(4).tolist(), found.top_ids.tolist()
    ([[-2.0794, -2.0794], [-2.0794, 0.0]], [2.0794, 2.0794], [[0, 1], [0, 1]])
    """
    sharing = sharing_of(communicator, tokens_axis)
    with ranks.prepared(e, c, arguments.Ids(ids), options, sharing, OPTIONS) as (problem, plan, together):
        done = driver.forward(problem, plan, ranks=together)
        return Logprobs(problem.exported(done.logprobs()), **done.beside())
