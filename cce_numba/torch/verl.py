"""verl's `linear_cross_entropy` on these kernels: its signature, and what it returns.

In place of verl's own: `from cce_numba.torch.verl import linear_cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch

from cce_numba.ranks import Sharing
from cce_numba.torch.logprobs import linear_logprobs


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(logprobs, entropy)` of each label, at a temperature, recorded by autograd; float32, in the shape of labels.

    Args:
        hidden: (..., D) hidden states.
        weight: (V, D) of the output layer.
        labels: (...) integers in [0, V).
        temperature: divides the logits.
        reduction: "none", which verl's models pass.
        dist_process_group: whose ranks share the vocabulary, each having some rows of `weight`; None if this one has all. As
            with verl's own, each rank then gets its part of the gradient of `hidden`, and their sum is the gradient.

    Raises ValueError for another reduction, and what `linear_logprobs` raises.

    >>> logprobs, entropy = linear_cross_entropy(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([1, 2]))
    >>> round(logprobs[0].item(), 4), round(entropy[0].item(), 4)
    (-2.0794, 2.0794)
    """
    if reduction != "none":
        raise ValueError(f"reduction: must be 'none', got {reduction!r}; reduce the log-probabilities that are returned")
    sharing = None
    if dist_process_group is not None:
        from cce_numba.torch.communicator import communicator_of

        sharing = Sharing(communicator_of(dist_process_group), sums_e_grad=False)
    found = linear_logprobs(hidden, weight, labels, entropy=True, logit_scale=1 / temperature, process_group=sharing)
    assert found.entropy is not None, "it was asked for"
    return found.logprobs, found.entropy
