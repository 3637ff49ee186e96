"""What `transformers.Trainer` is taught, for patched models.

Trainer has three ways around a patched model's loss. For `label_smoothing_factor` and `compute_loss_func` it keeps the labels
and computes the loss itself, of stored logits: here the model is given that loss to compute in its own forward. In an
evaluation it has logits made even if it drops them. And a subclass may not ask the model for its loss at all: that warns.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from cce_numba.transformers import calls, patched


@dataclass(frozen=True)
class LossOfOutput:
    """A loss of Trainer's: a function of what the model returns without labels, and of the labels."""

    name: str
    function: Callable[[Any, torch.Tensor], torch.Tensor]
    withheld: tuple[str, ...] = ("labels",)  # arguments that the model itself is not given

    def __call__(self, output: Any, labels: torch.Tensor) -> torch.Tensor:
        """The loss."""
        return self.function(output, labels)


@functools.cache
def teach() -> None:
    """Wraps three methods of `transformers.Trainer`, once, where it can be used: it needs accelerate."""
    if importlib.util.find_spec("accelerate") is None:
        return
    with contextlib.suppress(ImportError):
        from transformers import Trainer

        for name, wrapped in (
            ("compute_loss", _compute_loss),
            ("prediction_step", _prediction_step),
            ("training_step", _training_step),
        ):
            original = getattr(Trainer, name)
            setattr(Trainer, name, functools.wraps(original)(wrapped(original)))


def _compute_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        trainer, loss_of_output = self, _loss_of_output(self, model, inputs, num_items_in_batch)
        if loss_of_output is not None:
            trainer = copy.copy(self)  # one that leaves the loss to the model
            trainer.label_smoother = trainer.compute_loss_func = None
            # By either of the two Trainer decides how to scale the loss among devices.
            trainer.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
            inputs = {**inputs, calls.LOSS_OF_OUTPUT: loss_of_output}
        return original(trainer, model, inputs, return_outputs, num_items_in_batch, **kwargs)

    return compute_loss


def _loss_of_output(trainer: Any, model: Any, inputs: Any, num_items_in_batch: Any) -> LossOfOutput | None:
    """The loss that Trainer would compute of stored logits, if the model can do that without them."""
    patch = patched.patch_of(model)
    if patch is None or inputs.get("labels") is None or not calls.makes_no_logits(model, patch, inputs.get("skip_logits")):
        return None
    if trainer.compute_loss_func is not None:
        func = functools.partial(trainer.compute_loss_func, num_items_in_batch=num_items_in_batch)
        withheld = ("labels",) if trainer.model_accepts_loss_kwargs else ("labels", "num_items_in_batch")
        return LossOfOutput("compute_loss_func", func, withheld)
    from transformers.trainer_pt_utils import LabelSmoother

    smoother = trainer.label_smoother
    if type(smoother) is not LabelSmoother:
        return None
    if "num_items_in_batch" not in inspect.signature(LabelSmoother.__call__).parameters:  # before transformers 5.15
        num_items_in_batch = None
    shift = _is_causal(model)
    func = functools.partial(_smoothed_loss, smoother.epsilon, smoother.ignore_index, shift, num_items_in_batch)
    return LossOfOutput("label_smoothing_factor", func)


def _is_causal(model: Any) -> bool:
    """By which Trainer decides whether labels are to be shifted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return patched.name_of(patched.model_in(model)) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _smoothed_loss(
    epsilon: float, ignore_index: int, shift: bool, n_items: Any, output: Any, labels: torch.Tensor
) -> torch.Tensor:
    """What `transformers.trainer_pt_utils.LabelSmoother` computes."""
    logits = output["logits"]
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    reduction = "mean" if n_items is None else "sum"
    flat = logits.reshape(-1, logits.shape[-1])
    targets = labels.reshape(-1)
    loss = F.cross_entropy(flat, targets, ignore_index=ignore_index, reduction=reduction, label_smoothing=epsilon)
    if n_items is None:
        return loss
    return loss / (n_items.to(loss.device) if isinstance(n_items, torch.Tensor) else n_items)


def _prediction_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def prediction_step(self: Any, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        if patched.patch_of(model) is not None:
            inputs = {"skip_logits": prediction_loss_only, **inputs}
        return original(self, model, inputs, prediction_loss_only, *args, **kwargs)

    return prediction_step


def _training_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        before = calls.losses_in_this_thread()
        with calls.watched():
            result = original(self, model, *args, **kwargs)
        # Neither compiled programs nor other threads count here.
        is_known = self.args.n_gpu <= 1 and not any(hasattr(part, "_orig_mod") for part in (model, self.model))
        if is_known and calls.losses_in_this_thread() == before and patched.patch_of(model) is not None:
            name = patched.name_of(patched.model_in(model))
            calls.warn_once(
                f"{name}: is patched by cce_numba.transformers, but {type(self).__name__} has not asked it for its loss. It "
                "computes one by itself (TRL's trainers have a head of their own) or has replaced the model's forward (as "
                "use_liger_kernel does). Train with transformers.Trainer, or unpatch the model"
            )
        return result

    return training_step
