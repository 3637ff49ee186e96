"""`linear_logprobs` for tensors, recorded by autograd."""

from __future__ import annotations

from typing import Any

import torch

from cce_numba import logprobs
from cce_numba.options import DEFAULTS, unknown
from cce_numba.returned import Logprobs
from cce_numba.torch import autograd, call, checks, on_ranks
from cce_numba.torch.functional import beside, per_token


def linear_logprobs(
    e: torch.Tensor,
    c: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float | torch.Tensor | None = None,
    filter_seed: int | torch.Tensor = 0,
    process_group: Any = None,
    tokens_axis: int | None = None,
    vocab_parallel_options: Any = None,
    **options: Any,
) -> Logprobs:
    """Log-probabilities `log(softmax(e @ c.T + bias))` of each token's ids, recorded by autograd, without storing the logits.

    Gradients of any function of `logprobs`, `lse` and `entropy` flow to e, c and bias; `sum_squares`, `top_logprobs` and
    `top_ids` have none. It works under `torch.compile(fullgraph=True)` and autocast, as `linear_cross_entropy` does.

    Args:
        e: (..., D) embeddings, as in `linear_cross_entropy`.
        c: (V, D) classifier.
        ids: (...) integers in [0, V), or (..., K) for several entries of each token; `ignore_index` is padding. A token whose
            ids are all padding is ignored: all of its numbers are 0.
        bias: (V,) added to the logits.
        logit_scale: multiplies the logits, 1 / temperature; a number, or a tensor with one for each token of `e`.
        filter_seed, process_group, tokens_axis, vocab_parallel_options: as in `linear_cross_entropy`.
        options: others of `cce_numba.linear_logprobs`: softcap, shift, ignore_index, entropy, sum_squares, top_k,
            batch_invariant, allow_tf32, filter, filter_eps, filter_e_grad, filter_c_grad, check_targets,
            workspace_bytes, backend.

    Returns a `cce_numba.Logprobs` of tensors, None for what was not asked for. Raises what `linear_cross_entropy` does.

    >>> e, c = torch.zeros(2, 4, requires_grad=True), torch.ones(8, 4)
    >>> found = linear_logprobs(e, c, torch.tensor([1, 2]), entropy=True)
    >>> (found.logprobs.sum() + 0.01 * found.entropy.sum()).backward()
    >>> [round(x, 4) for x in found.logprobs.tolist()], e.grad.shape
    ([-2.0794, -2.0794], torch.Size([2, 4]))
    """
    if on_ranks.are_named(process_group, tokens_axis, vocab_parallel_options, e, c):
        arguments = locals()
        return on_ranks.call(linear_logprobs, {**arguments.pop("options"), **arguments})
    for name in options:
        if name not in logprobs.OPTIONS:
            raise unknown(name, logprobs.OPTIONS)
    checks.check_tensors(e, c, ids, {"bias": bias, "logit_scale": logit_scale}, name_of_ids="ids")
    e, c, bias = checks.cast(e, c, bias)
    checks.check_options(e.dtype, options, False)
    given = {"reduction": call.LOGPROBS, **call.given({name: DEFAULTS[name] for name in logprobs.OPTIONS} | options)}
    scales = logit_scale if isinstance(logit_scale, torch.Tensor) else None
    if scales is None and logit_scale is not None:
        given["logit_scale"] = logit_scale
    seed = None if options.get("filter") == "drop" else checks.filter_seed(filter_seed, e.device)
    outputs = autograd.apply((e, c, ids, bias, scales, None, None, None, seed), given, process_group)
    tokens, shift = on_ranks.shape_of_tokens(process_group, e, ids), int(options.get("shift", 0))
    assert outputs.logprobs is not None, "they were asked for"
    return Logprobs(per_token(outputs.logprobs, tokens, shift), **beside(outputs, tokens, shift))
