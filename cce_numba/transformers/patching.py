"""`patch` and `unpatch`, and what is on a model or a class in between.

A patched instance has another class: one made from its own, whose `forward` is that of a patched model. So this `forward` is an
ordinary method: copies and pickles of the model, replicas, and those who wrap a method by its function, have their own. What
`patch` was told is an attribute of the model. A patched class has another `forward`.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch

from cce_numba.torch import LinearCrossEntropy
from cce_numba.transformers import patched, tensor_parallel, trainer
from cce_numba.transformers.calls import head_of, run
from cce_numba.transformers.patched import BASE, PATCH, Patch, name_of

# The others of `linear_cross_entropy` are the model's to choose.
OPTIONS = (
    "filter",
    "filter_seed",
    "filter_eps",
    "accum_e_fp32",
    "accum_c_fp32",
    "filter_e_grad",
    "filter_c_grad",
    "impl",
    "label_smoothing",
    "z_loss",
    "check_targets",
    "workspace_bytes",
    "backend",
)

Model = TypeVar("Model")


def patch(model_or_type: Model, *, logits_in_evaluation: bool = True, **options: Any) -> Model:
    """Lets a causal language model, or every instance of its class, compute its training loss without the logits.

    Logits are not made when the model is in training mode and `labels` are given, with or without `torch.no_grad`: then
    `logits` of what it returns is an object that says so when it is used. In evaluation mode, and without labels, nothing
    changes. The loss is that of the model's own `forward`, with its softcap and scale, `num_items_in_batch`, `shift_labels`,
    `logits_to_keep` and auxiliary losses; but its logits are of float32, not rounded to 16 bits. Parameters and the state dict
    stay as they are.

    Adapters on the head (PEFT), gradient checkpointing, autocast, `torch.compile(fullgraph=True)` and `torch.export` work, and
    several threads may use one model. The head runs when the loss is asked for, on the tokens that the loss takes.

    `transformers.Trainer` computes a loss of its own with `label_smoothing_factor` and `compute_loss_func`. After the first
    `patch` it lets patched models compute these without logits too, and evaluates them without logits where nobody asks for
    predictions. Training that does not use the patch warns.

    The patch of an instance goes with its copies and pickles; that of a class stays in this process. Patching again replaces
    the options; an instance's go before its class's. A model may come in wrappers (PeftModel, DistributedDataParallel, FSDP,
    `torch.compile`): then the model within is patched.

    Args:
        model_or_type: a model whose output head (`get_output_embeddings()`) is an `nn.Linear`, with or without adapters, or its
            class.
        logits_in_evaluation: False leaves them out in evaluation mode too, where `labels` are given: for the loss alone.
            `model(..., skip_logits=True)`, or False, says so for one call, in either mode.
        options: those of `cce_numba.torch.linear_cross_entropy` in `OPTIONS`. `filter_eps=None` gives exact gradients;
            `label_smoothing` and `z_loss` change the loss. `filter_seed` may be a 0-d tensor on the CPU, which you change in
            place from step to step: then batches that come again are filtered by other draws.

    Returns `model_or_type`.

    Raises:
        TypeError: it is no model or class with a loss, or there is no such option.
        ValueError: an option's value does not fit.
        NotImplementedError: the model has no output head, or a `forward` that can only be called as it is; later, in training:
            the head is no linear layer with adapters and scales alone, or is in shards; or the model does something with its
            logits that needs them, or computes no cross-entropy of them. It is named, with what it did.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> model = patch(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), filter_eps=None).train()
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> output = model(tokens, labels=tokens)
    >>> output.loss.backward()
    >>> output.logits
    NoLogits(model_name='LlamaForCausalLM')
    >>> unpatch(model)(tokens, labels=tokens).logits.shape
    torch.Size([1, 4, 50])
    """
    model = patched.model_in(model_or_type)
    if unknown := [name for name in options if name not in OPTIONS]:
        raise TypeError(f"{unknown[0]}: is no option of patch, which takes {', '.join(OPTIONS)}; the model says the rest")
    if not isinstance(logits_in_evaluation, bool):
        raise TypeError(f"logits_in_evaluation: must be True or False, got {logits_in_evaluation!r}")
    LinearCrossEntropy(**options)  # checks the values
    told = functools.partial(Patch, options, logits_in_evaluation, _place_of_labels(model))
    if isinstance(model, type):
        _patch_class(unpatch(model), told)
    else:
        _check_head(model)
        _patch_instance(model, told)
    trainer.teach()
    return model_or_type


def unpatch(model_or_type: Model) -> Model:
    """Takes back what `patch` did to this very model or class; does nothing where it did nothing. Returns `model_or_type`.

    Raises TypeError if it is no model or class of one, and ValueError if the model's `forward` was replaced both before and
    after the patch: the latter must be taken back first.
    """
    model = patched.model_in(model_or_type)
    if isinstance(model, type):
        _unpatch_class(model)
    else:
        _unpatch_instance(model)
    return model_or_type


def _place_of_labels(model_or_type: Any) -> int:
    names = [each for each in inspect.signature(model_or_type.forward).parameters if each != "self"]
    if "labels" not in names:
        raise TypeError(
            f"model_or_type: must be a model with a loss, but the forward of {name_of(model_or_type)} takes no labels"
        )
    return names.index("labels")


def _check_head(model: Any) -> None:
    head = head_of(model)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        what = f"weights of {weight.dtype}" if isinstance(weight, torch.Tensor) else "no weight"
        raise NotImplementedError(
            f"{name_of(model)}: cannot be patched, since its output head, a {type(head).__name__}, has {what} (quantized?)"
        )
    if (reason := tensor_parallel.why_not(head)) is not None:
        raise NotImplementedError(f"{name_of(model)}: cannot be patched, since it has {reason}")


def _patch_instance(model: Any, told: Callable[..., Patch]) -> None:
    names = vars(model)
    if PATCH in names:  # with what it had of its own before the first patch
        names[PATCH] = told(names[PATCH].before)
        return
    own = names.get("forward")
    is_hooked = "_hf_hook" in names and isinstance(names.get("_old_forward"), MethodType)  # accelerate's offloading
    if own is not None and not is_hooked and not (isinstance(own, MethodType) and own.__self__ is model):
        raise NotImplementedError(
            f"{name_of(model)}: cannot be patched, since its forward was replaced by {_described(own)}, which is no method of "
            "it; patch it before that, or replace it by a types.MethodType"
        )
    a_class: Any = type(model)
    if BASE not in vars(a_class):
        model.__class__ = _patched_class(a_class)
    if is_hooked:
        names["_old_forward"] = MethodType(type(model).forward, model)
    elif own is not None:
        del names["forward"]
    names[PATCH] = told(None if is_hooked else own)


def _described(function: Any) -> str:
    """What a function is called and where it is from; its repr may hold the whole model's."""
    what = function if hasattr(function, "__qualname__") else type(function)
    return f"{what.__module__}.{what.__qualname__}"


def _unpatch_instance(model: Any) -> None:
    names = vars(model)
    patch = names.get(PATCH)
    if patch is not None and patch.before is not None:
        if "forward" in names:
            above = _described(names["forward"])
            raise ValueError(f"{name_of(model)}: {above} has taken the place of the patched forward; take it back first")
        names["forward"] = patch.before
    names.pop(PATCH, None)
    base = vars(type(model)).get(BASE)
    if base is not None:
        if _is_of_patch(names.get("_old_forward")):
            names["_old_forward"] = MethodType(base.forward, model)
        model.__class__ = base


@functools.cache
def _patched_class(base: Any) -> Any:
    """The class of a patched instance of `base`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch = vars(self).get(PATCH)
        if patch is None:
            return base.forward(self, *args, **kwargs)
        # A bound method is pickled by its name, so in a copy it may be this very one.
        before = base.forward if patch.before is None or _is_of_patch(patch.before) else patch.before.__func__
        return run(patch, before, self, args, kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        made_by, args, *state = base.__reduce_ex__(self, protocol)
        if made_by is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(f"{base.__name__}: cannot be copied or pickled while it is patched; unpatch it first")
        return _new, (base, *args[1:]), *state

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, BASE: base}
    a_class = type(base.__name__, (base,), names | {"forward": _like(base.forward, forward), "__reduce_ex__": reduce_ex})
    return a_class


def _new(base: Any, *args: Any) -> Any:
    """A patched instance of a class, without its attributes: for copies and pickles."""
    a_class = _patched_class(base)
    return a_class.__new__(a_class, *args)


def _is_of_patch(method: Any) -> bool:
    """Whether it is the bound `forward` that a patched instance has of its class."""
    names = vars(type(method.__self__)) if isinstance(method, MethodType) else {}
    return BASE in names and method.__func__ is names["forward"]


def _patch_class(a_class: Any, told: Callable[..., Patch]) -> None:
    original = patched.without_patch(a_class.forward)
    patch = told(vars(a_class).get("forward"))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if PATCH in vars(self):  # it goes before this one, and has called it
            return original(self, *args, **kwargs)
        return run(patch, original, self, args, kwargs)

    a_class.forward = _like(original, forward)
    patched.mark(forward, patch, original)


def _unpatch_class(a_class: Any) -> None:
    patch = patched.of_forward(vars(a_class).get("forward"))
    if patch is not None and patch.before is None:
        del a_class.forward
    elif patch is not None:
        a_class.forward = patch.before


def _like(original: Callable[..., Any], forward: Any) -> Any:
    """`forward` with the signature and names of `original`; not with `__wrapped__`, which accelerate would unwrap."""
    functools.update_wrapper(forward, original, updated=())
    del forward.__wrapped__
    forward.__signature__ = inspect.signature(original)
    return forward
