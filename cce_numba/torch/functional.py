"""What PyTorch's users call: `linear_cross_entropy`, its module, the z-loss, and a backward that adds to `.grad` in place."""

from __future__ import annotations

import enum
import numbers
import re
from typing import Any

import torch
from torch.nn import functional as F

from cce_numba import arguments, driver
from cce_numba.arguments import GRADIENTS
from cce_numba.backend import Gradients
from cce_numba.destination import Destination
from cce_numba.options import DEFAULTS, PRESETS, REDUCTIONS, unknown
from cce_numba.ranks import Sharing
from cce_numba.returned import LossStatistics
from cce_numba.torch import autograd, call, checks, on_ranks

STORED_LOGITS = "torch_compile"
_TENSOR_OPTIONS = ("logit_scale", "class_weights", "token_weights", "target_probs")
_BUFFERS = (*_TENSOR_OPTIONS, "filter_seed")  # of the module, where they are tensors
_DEFAULTS = DEFAULTS | {"impl": "cce", "return_lse": False} | dict.fromkeys(on_ranks.NAMES)
_NOT_IN_BASELINE = (
    *_TENSOR_OPTIONS,
    "label_smoothing",
    "z_loss",
    "entropy",
    "sum_squares",
    "top_k",
    "batch_invariant",
    "allow_tf32",
    "process_group",
)


def linear_cross_entropy(
    e: torch.Tensor,
    c: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | enum.Enum = "cce",
    *,
    logit_scale: float | torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weights: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    target_probs: torch.Tensor | None = None,
    entropy: bool = False,
    sum_squares: bool = False,
    top_k: int = 0,
    batch_invariant: bool = False,
    allow_tf32: bool = False,
    filter: str = "unbiased",
    filter_seed: int | torch.Tensor = 0,
    check_targets: bool | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    process_group: Any = None,
    tokens_axis: int | None = None,
    vocab_parallel_options: Any = None,
    **others: Any,
) -> Any:
    """Cross-entropy of `softmax(e @ c.T + bias)` with `targets`, recorded by autograd, without storing the logits.

    Names, defaults and order are those of `cut_cross_entropy.linear_cross_entropy` 25.9, up to `impl`; the others, and all that
    is not said here, are those of `cce_numba.linear_cross_entropy`. It works under `torch.compile(fullgraph=True)`, autocast,
    activation checkpointing and CUDA graphs; under `torch.no_grad` nothing is kept for a backward. What is different:

    - the filter takes single vocabulary entries of 128 tokens, where theirs takes tiles, and it is right on average: what is
      below the threshold survives by chance and is multiplied. "auto" is theirs, `finfo(dtype).eps / 32`. `filter="drop"` drops
      for good, as theirs does; its "auto" is `/ 512`;
    - gradients are always summed in float32 (float64 for float64) and rounded once, to their inputs' dtypes. So `accum_e_fp32`,
      `accum_c_fp32`, and the "kahan" in a preset's name, are accepted and change nothing;
    - loss and lse are float32 (float64), and so are the logits that they are made of;
    - the lse of an ignored token is 0, and its gradient goes nowhere;
    - if every token is ignored, "mean" is nan, as PyTorch has it, "sum" is 0, and gradients are 0;
    - a `shift` that leaves no token is an error, where theirs is nan;
    - tensors may be on the CPU, of float32 and float64, strided or expanded; nothing is copied to be contiguous.

    Args:
        e: (..., D) embeddings: float16, bfloat16, float32 or float64, on the CPU or on CUDA. Under autocast cast to its dtype.
            Embeddings come first: Liger takes the classifier first, and where there are as many tokens as entries (N == V)
            nothing here can tell that the two are exchanged.
        c: (V, D) classifier, as `head.weight`, on e's device; cast to e's dtype.
        targets: (...) integers in [0, V), or `ignore_index`.
        bias: (V,) added to the logits; cast to e's dtype, unless it is float32.
        ignore_index: tokens with this target take no part, whatever stands in their rows.
        softcap: logits become `softcap * tanh(logits / softcap)`, after the bias.
        reduction: "mean" over the tokens that count, "sum", or "none".
        shift: predict `targets[..., shift:]` from `e[..., :-shift, :]`, without copying `e`; True means 1.
        return_lse: return `(loss, lse)`, both with gradients.
        filter_eps: the filter's threshold, a probability; "auto" follows from the dtype; None is exact.
        accum_e_fp32: True or False, see above.
        accum_c_fp32: True or False, see above.
        filter_e_grad: False keeps the gradient of `e` exact.
        filter_c_grad: False keeps the gradients of `c` and `bias` exact.
        impl: "cce", or a preset, which takes the place of the three filter options: "cce_exact", "cce_kahan_full" and
            "cce_kahan_full_c_full_e" filter nothing, "cce_kahan_full_c" the gradient of `e` alone, "cce_kahan_full_e" that of
            `c` alone; "cce_kahan" is "cce". "torch_compile" is the baseline: stored logits, plain PyTorch, yours to compile.
            Members of `cut_cross_entropy`'s enumeration will do.
        logit_scale: multiplies the logits; a number, or a tensor with one for each token of `e`.
        label_smoothing: in [0, 1].
        z_loss: weight of `lse**2` in each token's loss.
        class_weights: (V,). Like all tensors that are not e, c or bias it gets no gradient, and must not require one.
        token_weights: of targets' shape.
        target_probs: (..., K) what each of a few targets counts, for targets (..., K) with `ignore_index` as padding.
        entropy: return each token's entropy too, with its gradient: a `LossStatistics` in place of the loss.
        sum_squares: return the sum of each token's squared probabilities too, which has no gradient.
        top_k: return each token's k largest log-probabilities, which have no gradient, and their entries too.
        batch_invariant: a token's numbers are bitwise the same whatever other tokens stand beside it.
        allow_tf32: float32 numbers may be rounded to tf32 on their way to tensor cores. It is for this call alone:
            `torch.backends.cuda.matmul.allow_tf32` changes nothing here.
        filter: "unbiased" keeps by chance some of what is below `filter_eps` in all of a block's tokens, and multiplies it, so
            that gradients are right on average; "drop" leaves it out; see `cce_numba.linear_cross_entropy`.
        filter_seed: an integer, or a 0-d tensor of one on e's device or on the CPU. One on e's device may change in place from
            step to step, in a CUDA graph too; of one on the CPU a graph keeps the value. A forward alone reads it.
        check_targets: True raises for a target out of range, on any device. None does so on the CPU; on CUDA, where looking
            would wait for the device, such a token's loss and gradient become NaN.
        workspace_bytes: memory for logits that are kept for the backward; see `cce_numba.linear_cross_entropy`.
        backend: "cpu", "simt", "ampere", "hopper", or None to choose by device and dtype.
        process_group: of `torch.distributed`, whose ranks share the vocabulary. Then c and bias are this rank's rows,
            consecutive entries in the order of ranks, any number of them; all else is the same on all ranks: e, targets with
            the entries' numbers in the whole vocabulary, class weights of all entries. So is the loss, bit by bit, and the
            gradient of e, which is summed in float32. A compiler leaves its program for such a call. Not for the baseline.
            e and c may be DTensors instead, c with Shard(0), e with Replicate or Shard along its tokens: results and gradients
            are DTensors then, the loss Replicate, gradients placed as their inputs.
        tokens_axis: with a process group, the axis of e along which each rank has a part of it (sequence parallel), and gets
            the gradient of that part.
        vocab_parallel_options: a `VocabParallelOptions`, ours or `cut_cross_entropy`'s, in place of a process group.
        others: none; an option of another library is refused with its name here.

    Returns:
        The loss: 0-d, or for "none" in the shape of `targets[..., shift:]` with 0 where ignored. With `return_lse` also the
        natural-log log-sum-exp in that shape, 0 where ignored. With `entropy`, `sum_squares` or `top_k` a
        `cce_numba.LossStatistics` of loss, lse and what was asked for.

    Raises:
        TypeError: an argument is no tensor, or has the wrong dtype.
        ValueError: shapes, devices, targets or option values do not fit; `cce_numba.parallel.Disagreement` if ranks differ.
        BackendUnavailable: the backend that was asked for cannot run here.
        NotImplementedError: in a backward through the gradients: they have no derivatives; or the backend does not have what
            is asked for yet.

    >>> e, c = torch.zeros(2, 3, 4, requires_grad=True), torch.ones(8, 4)
    >>> loss, lse = linear_cross_entropy(e, c, torch.tensor([[1, 2, 3], [4, 5, -100]]), shift=True, return_lse=True)
    >>> (loss + 1e-4 * compute_z_loss(lse)).backward()
    >>> lse.shape, e.grad.shape
    (torch.Size([2, 2]), torch.Size([2, 3, 4]))
    """
    if on_ranks.are_named(process_group, tokens_axis, vocab_parallel_options, e, c):
        arguments = locals()
        return on_ranks.call(linear_cross_entropy, {**arguments.pop("others"), **arguments})
    if others:
        raise unknown(next(iter(others)), _DEFAULTS)
    name = _impl(impl)
    optional = {"bias": bias, "logit_scale": logit_scale, "class_weights": class_weights, "token_weights": token_weights}
    checks.check_tensors(e, c, targets, optional | {"target_probs": target_probs})
    e, c, bias = checks.cast(e, c, bias)
    options = {
        "ignore_index": ignore_index,
        "softcap": softcap,
        "reduction": reduction,
        "shift": shift,
        "filter": filter,
        "filter_eps": filter_eps,
        "filter_e_grad": filter_e_grad,
        "filter_c_grad": filter_c_grad,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "check_targets": check_targets,
        "workspace_bytes": workspace_bytes,
        "backend": backend,
        "accum_e_fp32": accum_e_fp32,
        "accum_c_fp32": accum_c_fp32,
        "entropy": entropy,
        "sum_squares": sum_squares,
        "top_k": top_k,
        "batch_invariant": batch_invariant,
        "allow_tf32": allow_tf32,
    }
    checks.check_options(e.dtype, options, return_lse)
    del options["accum_e_fp32"], options["accum_c_fp32"]  # which change nothing here
    scales = None
    if isinstance(logit_scale, torch.Tensor):
        scales = logit_scale
    else:
        options["logit_scale"] = logit_scale
    given = call.given(options)
    if name == STORED_LOGITS:
        terms = {**given, **optional, "target_probs": target_probs}
        terms["process_group"] = process_group
        if refused := [term for term in _NOT_IN_BASELINE if terms.get(term) is not None]:
            raise ValueError(
                f"{refused[0]}: is not in the baseline, impl {STORED_LOGITS!r}; take another impl, or leave it out"
            )
        loss, lse = _from_stored_logits(e, c, targets, bias, ignore_index, softcap, reduction, int(shift))
        return (loss, lse) if return_lse else loss
    seed = checks.filter_seed(filter_seed, e.device)
    seed = None if filter == "drop" else seed
    tensors = e, c, targets, bias, scales, class_weights, token_weights, target_probs, seed
    outputs = autograd.apply(tensors, {**given, **PRESETS[name]}, process_group)
    tokens = on_ranks.shape_of_tokens(process_group, e, targets)
    if entropy or sum_squares or top_k:
        return LossStatistics(outputs.loss, **beside(outputs, tokens, int(shift)))
    return (outputs.loss, per_token(outputs.lse, tokens, int(shift))) if return_lse else outputs.loss


def per_token(flat: torch.Tensor, tokens: torch.Size, shift: int) -> torch.Tensor:
    """(N, ...) as the caller sees it: of e's tokens without the last `shift` of each sequence."""
    batch = flat.reshape((*tokens, *flat.shape[1:]))
    return batch.narrow(len(tokens) - 1, 0, tokens[-1] - shift) if shift else batch


def beside(outputs: call.Outputs, tokens: torch.Size, shift: int) -> dict[str, torch.Tensor | None]:
    """What is returned beside the loss or the log-probabilities, by name."""
    names = ("lse", "entropy", "sum_squares", "top_logprobs", "top_ids")
    of_name = {name: getattr(outputs, name) for name in names}
    return {name: None if x is None else per_token(x, tokens, shift) for name, x in of_name.items()}


class LinearCrossEntropy(torch.nn.Module):
    """`linear_cross_entropy` as a module without parameters: options when it is made, `(e, c, targets, bias=None)` when called.

    The options' order is that of `cut_cross_entropy.LinearCrossEntropy`, and `options` are the others of the function; all but
    tensors are checked when the module is made. Each is an attribute too, which may be set to another value. Tensors are
    buffers: they go where the module goes, but not into its state dict. A `filter_seed` that changes from step to step should
    be such a tensor, changed in place: a compiler makes another program for each integer that a module has.

    >>> criterion = LinearCrossEntropy(shift=True, reduction="sum")
    >>> round(criterion(torch.zeros(3, 4), torch.ones(8, 4), torch.tensor([1, 2, 3])).item(), 4)
    4.1589
    """

    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        shift: bool | int = 0,
        filter_eps: float | str | None = "auto",
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
        impl: str | enum.Enum = "cce",
        return_lse: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        given = {
            "ignore_index": ignore_index,
            "softcap": softcap,
            "reduction": reduction,
            "shift": shift,
            "filter_eps": filter_eps,
            "accum_e_fp32": accum_e_fp32,
            "accum_c_fp32": accum_c_fp32,
            "filter_e_grad": filter_e_grad,
            "filter_c_grad": filter_c_grad,
        } | options
        if "bias" in options:
            raise TypeError("bias: is given when the module is called, not when it is made")
        for name in options:
            if name not in _DEFAULTS:
                raise unknown(name, _DEFAULTS)
        tensors = {name: x for name, x in options.items() if name in _BUFFERS and x is not None}
        for name in ("logit_scale", "filter_seed"):
            if isinstance(tensors.get(name), numbers.Real):
                del tensors[name]
        for name, tensor in tensors.items():
            checks.check_tensor(name, tensor)
        checks.filter_seed(options.get("filter_seed", 0))
        elsewhere = {*tensors, *on_ranks.NAMES}
        checks.check_options(torch.float32, {name: x for name, x in given.items() if name not in elsewhere}, return_lse)
        self._names = (*given, "impl", "return_lse")
        for name, value in (given | {"impl": _impl(impl), "return_lse": return_lse}).items():
            if name in tensors:
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def forward(self, e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """The loss, or `(loss, lse)`."""
        return linear_cross_entropy(e, c, targets, bias, **{name: getattr(self, name) for name in self._names})

    def extra_repr(self) -> str:
        """The options that are not at their defaults; of tensors the shape."""
        options = {name: getattr(self, name) for name in self._names}
        return ", ".join(f"{name}={_shown(value)}" for name, value in options.items() if _is_given(name, value))


def compute_z_loss(
    lse: torch.Tensor,
    targets: torch.Tensor | None = None,
    shift: bool | int = 0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """The square of the log-sum-exp, whose mean times a small weight keeps it near 0 (the z-loss), recorded by autograd.

    `z_loss=weight` of `linear_cross_entropy` adds the same to the loss, in fewer steps.

    Args:
        lse: (...) of `linear_cross_entropy(..., return_lse=True)`.
        targets: those of the loss: tokens that are ignored do not count in the mean. Without them, every token does.
        shift: that of the loss.
        ignore_index: that of the loss.
        reduction: "mean" (nan if no token counts), "sum", or "none".

    Raises TypeError or ValueError, naming the argument, if one does not fit.

    >>> compute_z_loss(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([5, 6, -100]))
    tensor(5.)
    """
    checks.check_tensor("lse", lse)
    if not lse.is_floating_point():
        raise TypeError(f"lse: must be of a floating-point dtype, got {lse.dtype}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    checks.check_options(torch.float32, {"shift": shift, "ignore_index": ignore_index}, False)
    squared = lse * lse
    if targets is None:
        return squared.mean() if reduction == "mean" else squared.sum() if reduction == "sum" else squared
    checks.check_tensor("targets", targets)
    checks.check_integers("targets", targets)
    counts = (targets[..., shift:] if shift else targets) != ignore_index
    if counts.shape != lse.shape:
        raise ValueError(
            f"targets: must have, after the shift, the shape of lse, {tuple(lse.shape)}, got {tuple(counts.shape)}"
        )
    squared = torch.where(counts, squared, 0)
    if reduction == "none":
        return squared
    return squared.sum() / counts.sum() if reduction == "mean" else squared.sum()


def linear_cross_entropy_backward(
    e: torch.Tensor,
    c: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    d_loss: Any = 1.0,
    process_group: Any = None,
    tokens_axis: int | None = None,
    vocab_parallel_options: Any = None,
    **options: Any,
) -> Any:
    """The loss, with its backward done: the kernels add the gradients to `.grad`, in place.

    Autograd makes a gradient and then adds it to a `.grad` that is there, so it holds two of the classifier's for a while. Here
    those of `e`, `c` and `bias` that are leaves have theirs added to `.grad` (made of zeros, if there is none) as they are
    computed, in float32 and rounded once a call; the gradients of others go on through autograd. A float32 parameter under
    autocast gets its gradient without a rounding to 16 bits. It is not for parameters with hooks (DistributedDataParallel's),
    which it does not run, nor for `torch.compile(fullgraph=True)`.

    Args:
        d_loss: the upstream gradient (a loss scale, 1 / micro-batches), as in `cce_numba.backward`.
        process_group, tokens_axis, vocab_parallel_options: as in `linear_cross_entropy`. e and c may be DTensors there too.
        options: those of `cce_numba.linear_cross_entropy`, but `accum_e_fp32` and `accum_c_fp32`.

    Returns the loss, detached, without d_loss; a `LossStatistics` where options ask for one. Raises what
    `linear_cross_entropy` does, and for a `.grad` that does not fit.

    >>> body, weight = torch.ones(4, 4, requires_grad=True), torch.zeros(8, 4, requires_grad=True)
    >>> e = torch.eye(2, 4) @ body
    >>> linear_cross_entropy_backward(e, weight, torch.tensor([3, 5]), d_loss=0.5).requires_grad
    False
    >>> weight.grad[3]
    tensor([-0.1875, -0.1875, -0.1875, -0.1875])
    """
    if on_ranks.are_named(process_group, tokens_axis, vocab_parallel_options, e, c):
        arguments = locals()
        return on_ranks.call(linear_cross_entropy_backward, {**arguments.pop("options"), **arguments}, in_place=True)
    for name in options:
        if name not in DEFAULTS:
            raise unknown(name)
    sharing: Sharing | None = process_group
    tensors = {name: options.get(name) for name in _TENSOR_OPTIONS}
    checks.check_tensors(e, c, targets, {"bias": bias} | tensors)
    inputs = {name: x for name, x in (("e", e), ("c", c), ("bias", bias)) if x is not None and x.requires_grad}
    with torch.no_grad():
        cast_e, cast_c, cast_bias = checks.cast(e, c, bias)
        given = cast_e, cast_c, targets, cast_bias, *[None] * (len(call.TENSORS) - 4)
        if sharing is not None:
            sharing.said["gradients"] = list(inputs)
        with call.prepared(given, options, sharing=sharing) as (problem, plan, together):
            of_caller = problem if together is None else together.problem_of_results(problem)
            grads = {name: _accumulator(name, x) for name, x in inputs.items()}
            try:
                destination = Destination.of(Gradients(**grads), True, frozenset(grads), of_caller)
            except (TypeError, ValueError) as error:
                raise type(error)(re.sub(r"\bout\.(\w+)", r"\1.grad", str(error))) from None
            done = driver.forward(problem, plan, GRADIENTS if grads else (), together)
            loss = done.loss()
            if problem.options.asks_for_more:
                loss = LossStatistics(loss, **done.beside())
            if grads:
                done.backward(d_loss, None, destination)
    onward = [name for name, x in inputs.items() if not x.is_leaf]
    if onward:
        torch.autograd.backward([inputs[name] for name in onward], [grads[name] for name in onward])
    return loss


def _accumulator(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What the gradient of a tensor is added to."""
    if not tensor.is_leaf:
        return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    checks.check_tensor(f"{name}.grad", tensor.grad)
    return tensor.grad


def _shown(value: Any) -> str:
    """An option's value in one line."""
    return f"<{value.dtype} {tuple(value.shape)}>" if isinstance(value, torch.Tensor) else repr(value)


def _is_given(name: str, value: Any) -> bool:
    """Whether an option is not at its default."""
    return isinstance(value, torch.Tensor) or value != _DEFAULTS[name]


def _impl(impl: str | enum.Enum) -> str:
    name = impl.name.lower() if isinstance(impl, enum.Enum) else impl
    if name not in (*PRESETS, STORED_LOGITS):
        raise ValueError(f"impl: must be one of {', '.join(map(repr, (*PRESETS, STORED_LOGITS)))}, got {impl!r}")
    return name


def _from_stored_logits(
    e: torch.Tensor,
    c: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    reduction: str,
    shift: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(loss, lse)` as one writes it without these kernels: logits of e's dtype, stored, and again in float32 (float64)."""
    checks.check_shapes(e, c, targets, bias)
    checks.check_integers("targets", targets)
    if shift:
        arguments.check_shift(shift, tuple(e.shape))
        e, targets = e[..., : e.shape[-2] - shift, :], targets[..., shift:]
    logits = e @ c.T
    logits = logits if e.dtype == torch.float64 else logits.float()
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    flat = logits.reshape(-1, c.shape[0])
    loss = F.cross_entropy(flat, targets.reshape(-1).long(), ignore_index=ignore_index, reduction=reduction)
    loss = loss.reshape(targets.shape) if reduction == "none" else loss
    return loss, torch.where(targets != ignore_index, logits.logsumexp(-1), 0)
