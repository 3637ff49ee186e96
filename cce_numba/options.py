"""The options of the loss that are not arrays: what they may be, their defaults, and what follows from several of them at once.

Whoever needs to know something that follows from options asks `Options`: whether anything is filtered, at which threshold,
whether a forward must record survivors. `arguments.py` has the arrays.
"""

from __future__ import annotations

import difflib
import functools
import math
import numbers
import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, cast

import ml_dtypes
import numpy as np

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")
Filter = Literal["drop", "unbiased"]
FILTERS = ("drop", "unbiased")
# What filter_eps="auto" stands for, in units of finfo(dtype).eps. On the data of the benchmarks, gradients of bfloat16 are then
# off by at most three times what rounding them costs.
AUTO_SHARES = {"drop": 2.0**-9, "unbiased": 2.0**-5}

WORKSPACE_VARIABLE = "CCE_WORKSPACE_BYTES"  # the environment's default of workspace_bytes

# What other functions call our options (those of PyTorch, Liger, transformers, ...), and what there is to say of ours.
_ELSEWHERE = {
    "weight": ("class_weights", " (one weight for each entry; the classifier is c)"),
    "ce_weight": ("class_weights", ""),
    "temperature": ("logit_scale", " (which is 1 / temperature)"),
    "lse_square_scale": ("z_loss", ""),
    "z_loss_weight": ("z_loss", ""),
    "z_loss_multiplier": ("z_loss", ""),
    "return_z_loss": ("return_lse", " (of which cce_numba.torch.compute_z_loss makes it)"),
    "final_logit_softcapping": ("softcap", ""),
    "logit_softcap": ("softcap", ""),
    "label_smoothing_factor": ("label_smoothing", ""),
    "loss_mask": ("token_weights", ""),
    "use_token_scaling": ("token_weights", ""),
    "num_items_in_batch": ("reduction", "='sum' (and divide the loss by it)"),
    "size_average": ("reduction", ""),
    "reduce": ("reduction", ""),
    "accum_dtype": ("accum_c_fp32", " (and 'accum_e_fp32')"),
}
IMMUTABLE = (bool, int, float, str, type(None))
# Options that `Options` knows nothing of: arrays, or what may be one.
_ARRAYS = ("bias", "target_probs", "logit_scale", "class_weights", "token_weights", "filter_seed")


class LossOptions(TypedDict, total=False):
    """The options that the public functions take by name, arrays among them; `linear_cross_entropy` tells what they mean."""

    bias: Any
    ignore_index: int
    softcap: float | None
    logit_scale: Any
    reduction: Reduction
    shift: int | bool
    label_smoothing: float
    z_loss: float
    class_weights: Any
    token_weights: Any
    target_probs: Any
    entropy: bool
    sum_squares: bool
    top_k: int
    batch_invariant: bool
    allow_tf32: bool
    filter: Filter
    filter_seed: Any
    filter_eps: float | str | None
    filter_e_grad: bool
    filter_c_grad: bool
    accum_e_fp32: bool
    accum_c_fp32: bool
    check_targets: bool | None
    workspace_bytes: int | None
    backend: str | None


DEFAULTS: dict[str, Any] = {
    "bias": None,
    "ignore_index": -100,
    "softcap": None,
    "logit_scale": None,
    "reduction": "mean",
    "shift": 0,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "class_weights": None,
    "token_weights": None,
    "target_probs": None,
    "entropy": False,
    "sum_squares": False,
    "top_k": 0,
    "batch_invariant": False,
    "allow_tf32": False,
    "filter": "unbiased",
    "filter_seed": 0,
    "filter_eps": "auto",
    "filter_e_grad": True,
    "filter_c_grad": True,
    "accum_e_fp32": False,
    "accum_c_fp32": False,
    "check_targets": None,
    "workspace_bytes": None,
    "backend": None,
}

# The names of `cut_cross_entropy`'s implementations that differ in their filters: each with the options that it stands for.
# Those that it does not name are the caller's.
PRESETS: dict[str, dict[str, Any]] = {
    "cce": {},
    "cce_exact": {"filter_eps": None},
    "cce_kahan": {},
    "cce_kahan_full": {"filter_eps": None},
    "cce_kahan_full_c": {"filter_eps": "auto", "filter_e_grad": True, "filter_c_grad": False},
    "cce_kahan_full_e": {"filter_eps": "auto", "filter_e_grad": False, "filter_c_grad": True},
    "cce_kahan_full_c_full_e": {"filter_eps": None},
}


@dataclass(frozen=True)
class Options:
    """The options of the loss that are not arrays, in canonical form.

    Attributes:
        ignore_index, softcap, reduction, label_smoothing, z_loss, filter, filter_e_grad, filter_c_grad, accum_e_fp32,
            accum_c_fp32, entropy, sum_squares, top_k, batch_invariant: as in `LossOptions`.
        workspace_bytes: memory for logits that are kept; 0 for none.
        allow_tf32: the same; False where the arrays are not float32, since it means nothing there.
        shift: how many tokens later the target of a token stands.
        filter_eps: a probability, or None where all gradients are exact.
        filter_is_auto: the threshold was not the caller's choice, so with `filter="drop"` a backend may leave out more where
            that costs no accuracy to speak of.
    """

    ignore_index: int
    softcap: float | None
    reduction: Reduction
    shift: int
    label_smoothing: float
    z_loss: float
    filter: Filter
    filter_eps: float | None
    filter_is_auto: bool
    filter_e_grad: bool
    filter_c_grad: bool
    accum_e_fp32: bool
    accum_c_fp32: bool
    entropy: bool
    sum_squares: bool
    top_k: int
    batch_invariant: bool
    workspace_bytes: int
    allow_tf32: bool

    @staticmethod
    def of(dtype: np.dtype, given: Mapping[str, Any], only: Iterable[str] = DEFAULTS) -> Options:
        """Checks the options that a caller gave by name, for e and c of `dtype`; those that are left out have their defaults.

        `only`: the options that mean something to the function that was called. Raises TypeError or ValueError, naming the
        option; an unknown one is told from its likely neighbour.

        >>> Options.of(np.dtype(np.float32), {"shift": True}).shift
        1
        """
        for name in given:
            if name not in DEFAULTS:
                raise unknown(name)
            if name not in only:
                raise TypeError(f"{name}: means nothing here; this function takes {', '.join(only)}")
        values = {name: value for name, value in given.items() if name not in _ARRAYS}
        if all(type(value) in IMMUTABLE for value in values.values()):
            return _checked_once(dtype, **values)
        return _checked(dtype, DEFAULTS | values)

    @staticmethod
    def unchecked(dtype: np.dtype, values: Mapping[str, Any]) -> Options:
        """The same for values, all by name, that were checked, or will be; so a compiler's symbols may stand for numbers."""
        is_auto = isinstance(values["filter_eps"], str)
        options = Options(
            ignore_index=values["ignore_index"],
            softcap=values["softcap"],
            reduction=values["reduction"],
            shift=values["shift"],
            label_smoothing=values["label_smoothing"],
            z_loss=values["z_loss"],
            filter=values["filter"],
            filter_eps=_auto_eps(dtype, values["filter"]) if is_auto else values["filter_eps"],
            filter_is_auto=is_auto,
            filter_e_grad=values["filter_e_grad"],
            filter_c_grad=values["filter_c_grad"],
            accum_e_fp32=values["accum_e_fp32"],
            accum_c_fp32=values["accum_c_fp32"],
            entropy=values["entropy"],
            sum_squares=values["sum_squares"],
            top_k=values["top_k"],
            batch_invariant=values["batch_invariant"],
            workspace_bytes=_workspace_default() if (given := values["workspace_bytes"]) is None else given,
            allow_tf32=values["allow_tf32"] and dtype == _FLOAT32,
        )
        if options.batch_invariant:  # the filter looks at all tokens of a block
            options = replace(options, filter_e_grad=False)
        # The uniform term of label smoothing then reaches all entries, and no sum over them is known beforehand.
        return replace(options, filter_eps=None) if options.smooths_capped else options

    @property
    def filter_eps_e(self) -> float | None:
        """The threshold for `dE`, or None where it is exact."""
        return self.filter_eps if self.filter_e_grad else None

    @property
    def filter_eps_c(self) -> float | None:
        """The threshold for `dC` and `dbias`, or None where they are exact."""
        return self.filter_eps if self.filter_c_grad else None

    @property
    def filters(self) -> bool:
        """Whether any gradient is filtered."""
        return self.records_survivors(("e", "c"))

    def records_survivors(self, wrt: Collection[str]) -> bool:
        """Whether a forward records survivors, if a backward is to come with gradients of these names ("e", "c", "bias")."""
        if self.filter_eps is None:
            return False
        return ("e" in wrt and self.filter_e_grad) or (("c" in wrt or "bias" in wrt) and self.filter_c_grad)

    def keeps_logits(self, wrt: Collection[str]) -> bool:
        """Whether logits are kept for a backward that gives gradients of these names: where one of them is exact.

        How many are kept depends on the number of tokens, so none are where nothing may depend on it.
        """
        of_e, of_c = "e" in wrt and self.filter_eps_e is None, ("c" in wrt or "bias" in wrt) and self.filter_eps_c is None
        return self.workspace_bytes > 0 and (of_e or of_c) and not self.batch_invariant

    @property
    def asks_for_more(self) -> bool:
        """Whether more is to be returned than a loss or log-probabilities, and the log-sum-exp."""
        return self.entropy or self.sum_squares or self.top_k > 0

    @property
    def is_unbiased(self) -> bool:
        """Whether a gradient is filtered by chance, so that it is right on average; see `survivors.py`."""
        return self.filter == "unbiased" and self.filters

    @property
    def smooths_capped(self) -> bool:
        """Whether label smoothing meets a softcap: its uniform term is then not linear in e and c, so kernels take it."""
        return self.label_smoothing > 0 and self.softcap is not None


def compute_dtype_of(dtype: np.dtype) -> np.dtype:
    """The dtype of logits, loss and accumulators, for arrays of `dtype`: float64 for float64, float32 for all others."""
    return _FLOAT64 if dtype == _FLOAT64 else _FLOAT32


_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def unknown(name: str, options: Iterable[str] = DEFAULTS) -> TypeError:
    """The error for an option that does not exist, which names the likely one of `options`.

    >>> unknown("temperature")
    TypeError("temperature: is not an option; did you mean 'logit_scale' (which is 1 / temperature)?")
    """
    ours, note = _ELSEWHERE.get(name, ("", ""))
    if ours not in options:
        ours, note = next(iter(difflib.get_close_matches(name, options, n=1)), ""), ""
    return TypeError(
        f"{name}: is not an option; " + (f"did you mean {ours!r}{note}?" if ours else f"options are {', '.join(options)}")
    )


@functools.lru_cache(maxsize=256, typed=True)
def _checked_once(dtype: np.dtype, **values: Any) -> Options:
    """`_checked` for the others' defaults, remembered: a program has few sets of options, and checks take time."""
    return _checked(dtype, DEFAULTS | values)


def _checked(dtype: np.dtype, value: Mapping[str, Any]) -> Options:
    if not isinstance(value["reduction"], str) or value["reduction"] not in REDUCTIONS:
        raise ValueError(f"reduction: must be one of {', '.join(map(repr, REDUCTIONS))}, got {value['reduction']!r}")
    if not isinstance(value["filter"], str) or value["filter"] not in FILTERS:
        raise ValueError(f"filter: must be one of {', '.join(map(repr, FILTERS))}, got {value['filter']!r}")
    if value["check_targets"] is not None:
        flag("check_targets", value["check_targets"])
    largest = float(np.finfo(compute_dtype_of(dtype)).max)
    canonical = {
        "reduction": cast(Reduction, value["reduction"]),
        "filter": cast(Filter, value["filter"]),
        "softcap": None if value["softcap"] is None else positive("softcap", value["softcap"], dtype, "a positive number"),
        "filter_eps": _filter_eps(value["filter_eps"]),
        "label_smoothing": _number("label_smoothing", value["label_smoothing"], "a number in [0, 1]", lambda x: 0 <= x <= 1),
        "ignore_index": integer("ignore_index", value["ignore_index"]),
        "shift": _shift(value["shift"]),
        "z_loss": _number("z_loss", value["z_loss"], "a finite number >= 0", lambda x: 0 <= x <= largest),
    }
    if (top_k := integer("top_k", value["top_k"])) < 0 or isinstance(value["top_k"], bool):
        raise ValueError(f"top_k: must be an integer >= 0, how many entries to return, got {value['top_k']!r}")
    canonical["top_k"] = top_k
    room = value["workspace_bytes"]
    if room is not None and (isinstance(room, bool) or integer("workspace_bytes", room) < 0):
        raise ValueError(f"workspace_bytes: must be an integer >= 0, a number of bytes, or None, got {room!r}")
    canonical["workspace_bytes"] = None if room is None else int(room)
    flags = (
        *("filter_e_grad", "filter_c_grad", "accum_e_fp32", "accum_c_fp32", "entropy", "sum_squares", "batch_invariant"),
        "allow_tf32",
    )
    return Options.unchecked(dtype, canonical | {name: flag(name, value[name]) for name in flags})


def flag(name: str, value: Any) -> bool:
    """`value` if it is True or False; raises TypeError, naming the argument, if it is anything else."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: must be True or False, got {value!r}")
    return bool(value)


def positive(name: str, value: Any, dtype: np.dtype, what: str) -> float:
    """A number that is positive and finite in what arrays of `dtype` are computed in.

    Raises TypeError or ValueError, naming the argument; "`what` or None" tells what may come.
    """
    computed = np.finfo(compute_dtype_of(dtype))
    number = _float(name, value, f"{what} or None")
    if not float(computed.smallest_normal) <= number <= float(computed.max):
        raise ValueError(f"{name}: must be positive and finite in {computed.dtype}, or None, got {value!r}")
    return number


def _number(name: str, value: Any, what: str, fits: Callable[[float], bool]) -> float:
    number = _float(name, value, what)
    if not fits(number):  # nor does NaN
        raise ValueError(f"{name}: must be {what}, got {value!r}")
    return number


@functools.cache
def _workspace_default() -> int:
    """What the environment says, when it is first asked for; 0 if it says nothing."""
    said = os.environ.get(WORKSPACE_VARIABLE, "").strip() or "0"
    if not said.isdecimal():
        raise ValueError(f"{WORKSPACE_VARIABLE}: must be an integer >= 0, a number of bytes, got {said!r}; unset it for none")
    return int(said)


def _float(name: str, value: Any, what: str) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: must be {what}, got {value!r}")
    try:
        return float(value)
    except OverflowError:  # an integer
        return math.inf


def integer(name: str, value: Any) -> int:
    """An integer of 64 bits; raises TypeError or ValueError, naming the argument, for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: must be an integer, got {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name}: must fit in 64 bits, got {value!r}")
    return number


def _shift(shift: Any) -> int:
    value = int(shift) if isinstance(shift, bool | np.bool_) else integer("shift", shift)
    if value < 0:
        raise ValueError(f"shift: must be False, True or an integer >= 0, got {shift!r}")
    return value


def _auto_eps(dtype: np.dtype, filter: str) -> float:
    return float(ml_dtypes.finfo(dtype).eps) * AUTO_SHARES[filter]


def _filter_eps(filter_eps: Any) -> float | str | None:
    if filter_eps is None:
        return None
    if isinstance(filter_eps, str):
        if filter_eps != "auto":
            raise ValueError(f"filter_eps: must be 'auto', a number in (0, 1) or None, got {filter_eps!r}")
        return filter_eps
    eps = _float("filter_eps", filter_eps, "'auto', a number in (0, 1) or None")
    if not 0 < eps < 1:
        raise ValueError(f"filter_eps: must be 'auto', a number in (0, 1) or None (exact), got {filter_eps!r}")
    return eps
