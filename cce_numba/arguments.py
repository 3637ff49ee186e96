"""The arrays that callers may pass, made canonical. Every check that needs no kernel is made here, and says what must come.

`options.py` has the options that are not arrays.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cce_numba import interchange
from cce_numba.interchange import BFLOAT16, Kind
from cce_numba.options import DEFAULTS, Options, compute_dtype_of, integer, positive
from cce_numba.parallel.bounds import Bounds
from cce_numba.parallel.shard import IGNORED, Shard, coded

DTYPES = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))
GRADIENTS = ("e", "c", "bias")
NO_TARGETS = object()  # in place of targets, where only the log-sum-exp is wanted
# What a problem may ask for that not every backend has.
SEVERAL_TARGETS = "several targets of a token"
DISTILLATION = "distillation"  # which no problem asks for by itself, but two of them together
FILTERED_DISTILLATION = "a filter of `linear_distillation`"  # likewise
_OPTIONS = frozenset({"entropy", "sum_squares", "top_k", "batch_invariant", "allow_tf32"})
EXTRAS = _OPTIONS | {SEVERAL_TARGETS, DISTILLATION, FILTERED_DISTILLATION}


@dataclass(frozen=True)
class Rows:
    """Which rows of a vocabulary a caller's `c` has: those from `start` on, of `total` entries that all ranks have together."""

    start: int
    total: int


@dataclass(frozen=True)
class Ids:
    """In place of targets, ids (...) or (..., K) whose log-probabilities are wanted: there is no loss."""

    ids: Any


class _Sized:
    """What follows from `N`, `V`, `dtype` and `options`, which a problem has with its arrays or without."""

    @property
    def compute_dtype(self: Any) -> np.dtype:
        """The dtype of logits, loss and accumulators: float64 for float64 inputs, float32 for all others."""
        return compute_dtype_of(self.dtype)

    @property
    def logits_bytes(self: Any) -> int:
        """What the logits would take if they were stored once."""
        return self.N * self.V * self.compute_dtype.itemsize

    @property
    def grad_e_dtype(self: Any) -> np.dtype:
        """The dtype of `dE`."""
        return self.compute_dtype if self.options.accum_e_fp32 else self.dtype

    @property
    def grad_c_dtype(self: Any) -> np.dtype:
        """The dtype of `dC`."""
        return self.compute_dtype if self.options.accum_c_fp32 else self.dtype

    @property
    def extras(self: Any) -> frozenset[str]:
        """Which of `EXTRAS` it asks for."""
        several = () if self.K is None else (SEVERAL_TARGETS,)
        asked = {name for name in EXTRAS if getattr(self.options, name, False)}
        return frozenset(asked.union(several)) if asked or several else _NO_EXTRAS


_NO_EXTRAS: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Outline(_Sized):
    """A problem without its arrays: all that decides which backend takes it, and what shapes its statistics have.

    Attributes:
        N, V, D: sizes; under a compiler that leaves them open, its symbols for them.
        dtype: the dtype of e and c.
        on_device: whether the arrays are on a GPU.
        device: `"cpu"` or `"cuda:<index>"`.
        options: the checked options.
        K: how many targets a token has room for, where targets have an axis for them; None where they have none.
    """

    N: int
    V: int
    D: int
    dtype: np.dtype
    on_device: bool
    device: str
    options: Options
    K: int | None = None


@dataclass(frozen=True)
class Problem(_Sized):
    """One call's inputs in the one form that backends take: NumPy or CuPy arrays, flattened, checked.

    Attributes:
        e: (N, D) float, any strides.
        c: (V, D) of e's dtype, any strides.
        targets: (N,) or (N, K) int64, contiguous, already shifted, or None when only the log-sum-exp is wanted. One of several
            that is `ignore_index` is padding; a token is ignored if all of its targets are.
        bias: (V,) of e's dtype or float32, contiguous, or None.
        logit_scale: (N,) of the compute dtype, contiguous, what multiplies each token's logits before the softcap; None for 1.
        class_weights: (V,) of the compute dtype, contiguous, or None.
        token_weights: (N,) of the compute dtype, contiguous, already shifted, as targets are; or None.
        target_probs: (N, K) of the compute dtype, contiguous, already shifted, 0 where padded: what each target counts in the
            loss. None where targets are (N,), which count 1, and where there is no loss.
        has_loss: whether a loss is made of the targets. Otherwise only their log-probabilities are wanted.
        filter_seed: what the caller adds to the seed of the unbiased filter's draws: an integer in [0, 2**32), or (1,) int64 on
            the device, whose lower 32 bits count. A forward alone reads it.
        options: the checked options.
        e_shape: shape of the caller's `e`.
        token_shape: shape of the tokens before the shift; their product is N.
        kind: how to give results back.
        shard: which rows of the vocabulary c has, where it has not all of them. Then c, bias and class_weights are of these
            rows, targets are coded (`parallel.shard`), V is the number of these rows and may be 0; or None.
    """

    e: Any
    c: Any
    targets: Any  # or None
    bias: Any  # or None
    logit_scale: Any  # or None
    class_weights: Any  # or None
    token_weights: Any  # or None
    target_probs: Any  # or None
    has_loss: bool
    filter_seed: Any
    options: Options
    e_shape: tuple[int, ...]
    token_shape: tuple[int, ...]
    kind: Kind
    shard: Shard | None = None

    @property
    def N(self) -> int:
        """Tokens, those that are ignored or shifted away included."""
        return self.e.shape[0]

    @property
    def V(self) -> int:
        """Vocabulary entries."""
        return self.c.shape[0]

    @property
    def total_V(self) -> int:
        """Entries of the whole vocabulary, of which c may have some alone."""
        return self.V if self.shard is None else self.shard.total

    @property
    def bounds(self) -> Bounds | None:
        """How ranks exchange bounds in a forward that records survivors; None if they do not, or there are no tokens."""
        return self.shard.bounds if self.shard is not None and self.N else None

    @property
    def D(self) -> int:
        """Hidden size."""
        return self.c.shape[1]

    @property
    def K(self) -> int | None:
        """How many targets a token has room for, where targets have an axis for them."""
        return None if self.targets is None or self.targets.ndim == 1 else self.targets.shape[1]

    @property
    def is_padding(self) -> Any:
        """Bool, in the shape of the targets: which of them are `ignore_index`."""
        return self.targets == self.options.ignore_index

    @property
    def counts(self) -> Any:
        """(N,) bool: which tokens count, having a target that is not `ignore_index`."""
        present = ~self.is_padding
        return present if present.ndim == 1 else present.any(axis=1)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `e` and `c`."""
        return np.dtype(self.e.dtype)

    @property
    def on_device(self) -> bool:
        """True for CuPy arrays."""
        return interchange.is_on_device(self.e)

    @property
    def device(self) -> str:
        """`"cpu"` or `"cuda:<index>"`."""
        return interchange.device_of(self.e)

    @property
    def xp(self) -> Any:
        """`numpy` or `cupy`."""
        return interchange.array_module(self.e)

    def with_own_small_arrays(self) -> Problem:
        """The same with copies of all arrays but e and c, which the caller may then change."""
        small = ("targets", "bias", "logit_scale", "class_weights", "token_weights", "target_probs")
        given = {name: array for name in small if (array := getattr(self, name)) is not None}
        copies = {name: array.copy() for name, array in given.items()}
        if self.shard is not None and self.shard.class_weights is not None:
            copies["shard"] = replace(self.shard, class_weights=self.shard.class_weights.copy())
        return replace(self, **copies)

    def per_token(self, flat: Any) -> Any:
        """(N, ...) as the caller sees it: tokens have the shape of those of `targets[..., shift:]`."""
        batch = flat.reshape(self.token_shape + flat.shape[1:])
        if not self.options.shift:
            return batch
        sequences = (slice(None),) * (len(self.token_shape) - 1)
        return batch[(*sequences, slice(0, max(0, self.token_shape[-1] - self.options.shift)))]

    def exported(self, flat: Any) -> Any:
        """(N, ...) as `per_token` has it, and as an array of the caller's kind."""
        return self.kind.export(self.per_token(flat))


def problem(
    e: Any,
    c: Any,
    targets: Any,
    given: Mapping[str, Any],
    only: Iterable[str] = DEFAULTS,
    kind: Kind | None = None,
    rows: Rows | None = None,
) -> Problem:
    """Checks the arrays and the options against each other and makes them canonical, without a copy where strides allow.

    `NO_TARGETS` makes a problem without targets (every token counts), `Ids` one without a loss. `only`: options that mean
    something here.
    `kind`: how to give results back; that of `e`, if left out. `rows`: of which entries c has the rows, where these are not
    all; then class weights are those of the whole vocabulary, and the bias is of these entries.

    Raises TypeError for what is not an array or has a wrong dtype, ValueError for shapes, devices, targets and option values
    that do not fit.

    >>> p = problem(np.ones((2, 3, 4)), np.ones((5, 4)), np.zeros((2, 3), int), {"shift": 1})
    >>> p.N, p.V, p.D, p.targets.tolist()
    (6, 5, 4, [0, 0, -100, 0, 0, -100])
    """
    native_e, native_c = interchange.take("e", e), interchange.take("c", c)
    kind = kind or interchange.kind_of(e, native_e)
    dtype = np.dtype(native_e.dtype)
    if dtype not in DTYPES:
        raise TypeError(f"e: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    checked = Options.of(dtype, given, only)
    _check_classifier(native_c, native_e, 1 if rows is None else 0)
    if rows is not None:
        _check_rows(rows, native_c)
    total = native_c.shape[0] if rows is None else rows.total
    has_loss = not isinstance(targets, Ids)
    name = "targets" if has_loss else "ids"
    targets = targets.ids if isinstance(targets, Ids) else targets
    native_targets = None if targets is NO_TARGETS else interchange.take(name, targets)
    devices = {"e": interchange.device_of(native_e), "c": interchange.device_of(native_c)}
    check_devices(devices if native_targets is None else devices | {name: interchange.device_of(native_targets)})
    if checked.top_k > total:
        raise ValueError(f"top_k: must be at most V = {total}, the entries that there are, got {checked.top_k}")
    token_shape = tuple(native_e.shape[:-1])
    if checked.shift:
        check_shift(checked.shift, tuple(native_e.shape))
    bias, look, class_weights = given.get("bias"), given.get("check_targets"), given.get("class_weights")
    token_weights, target_probs = given.get("token_weights"), given.get("target_probs")
    several = not has_loss and native_targets is not None and native_targets.ndim == native_e.ndim
    if target_probs is not None:
        several, target_probs = True, _target_probs(target_probs, native_targets, native_e, checked)
    p = Problem(
        e=native_e.reshape(math.prod(token_shape), native_e.shape[-1]),
        c=native_c,
        targets=None if native_targets is None else _targets(name, native_targets, native_e, native_c, checked, kind, several),
        bias=None if bias is None else _bias(bias, native_e, native_c),
        logit_scale=_logit_scale(given.get("logit_scale"), native_e),
        class_weights=None if class_weights is None else _class_weights(class_weights, native_e, total),
        token_weights=None if token_weights is None else _token_weights(token_weights, native_e, checked),
        target_probs=target_probs,
        has_loss=has_loss,
        filter_seed=filter_seed(given.get("filter_seed", 0), native_e),
        options=checked,
        e_shape=tuple(native_e.shape),
        token_shape=token_shape,
        kind=kind,
    )
    if p.targets is not None and (look or (look is None and not p.on_device)):  # on a device, looking would wait for it
        _check_range_of_targets(name, p, total)
    return p if rows is None else _of_shard(p, rows)


def _of_shard(p: Problem, rows: Rows) -> Problem:
    """A problem whose targets and class weights are those of the whole vocabulary, as one of a shard."""
    options, start, stop = p.options, rows.start, rows.start + p.V
    shard = Shard(start, rows.total, p.targets, p.class_weights, options.top_k)
    targets = None
    if p.targets is not None:
        targets = coded(p.targets, start, p.V, rows.total, options.ignore_index)
        # What is hashed for the draws' seed must not take the caller's padding for an entry.
        shard = replace(shard, targets=p.xp.where(p.is_padding, np.int64(IGNORED), p.targets))
    return replace(
        p,
        targets=targets,
        class_weights=None if p.class_weights is None else p.class_weights[start:stop],
        options=replace(options, ignore_index=IGNORED, top_k=min(options.top_k, p.V) if p.V else options.top_k),
        shard=shard,
    )


def _check_rows(rows: Rows, c: Any) -> None:
    if not 0 <= rows.start <= rows.start + c.shape[0] <= rows.total or rows.total < 1:
        raise ValueError(
            f"vocab_start: the rows of c must lie in the vocabulary, got {c.shape[0]} rows from {rows.start} on of {rows.total}"
        )


def upstream(name: str, gradient: Any, p: Problem, shape: tuple[int, ...], flat_shape: tuple[int, ...] | None = None) -> Any:
    """An upstream gradient as a flat (N,) array of the compute dtype: zero for tokens that the shift took away.

    `shape` is what the caller's may have, `flat_shape` that of the flat array where it is not (N,). A scalar counts for every
    token. Raises TypeError or ValueError, naming the argument, if it is not a real number or an array of `shape` on the
    problem's device.
    """
    flat = (p.xp.zeros if p.options.shift else p.xp.empty)(flat_shape or p.N, dtype=p.compute_dtype)
    p.per_token(flat)[...] = _upstream(name, gradient, p, shape)
    return flat


def upstream_scalar(name: str, gradient: Any, p: Problem) -> Any:
    """An upstream gradient of a scalar as a float, or as a 0-d array of the compute dtype on the problem's device.

    Raises what `upstream` does.
    """
    return _upstream(name, gradient, p, ())


def _upstream(name: str, gradient: Any, p: Problem, shape: tuple[int, ...]) -> Any:
    if isinstance(gradient, numbers.Real):
        try:
            return float(gradient)  # no array of it: that would travel from the host
        except OverflowError:
            raise ValueError(f"{name}: must fit in {p.compute_dtype}, got an integer that is too large") from None
    native = interchange.take(name, gradient)
    if native.dtype.kind not in "fiu" and native.dtype != BFLOAT16:
        raise TypeError(f"{name}: must be real numbers, got dtype {native.dtype}")
    if native.ndim or interchange.is_on_device(native):  # a host scalar is welcome anywhere
        _check_same_device(name, native, p.e)
    native = p.xp.asarray(native).astype(p.compute_dtype, copy=False)
    if native.shape not in ((), shape):
        raise ValueError(f"{name}: must be a scalar or have shape {shape}, got shape {native.shape}")
    return native


def wanted(wrt: Any, p: Problem) -> frozenset[str]:
    """Checks the names of the gradients that are asked for; None means all that exist."""
    if wrt is None:
        return frozenset(GRADIENTS if p.bias is not None else GRADIENTS[:2])
    if not isinstance(wrt, Iterable):
        raise TypeError(f"wrt: must name gradients out of {', '.join(map(repr, GRADIENTS))}, got {wrt!r}")
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in names:
        if name not in GRADIENTS:
            raise ValueError(f"wrt: must name gradients out of {', '.join(map(repr, GRADIENTS))}, got {name!r}")
    if "bias" in names and p.bias is None:
        raise ValueError("wrt: asks for the gradient of bias, but no bias was given")
    return frozenset(names)


def check_devices(devices: Mapping[str, Any]) -> None:
    """Raises ValueError unless arguments, e first, are on one device; where e alone is on another one, it is e that is named.

    >>> check_devices({"e": "cpu", "c": "cuda:0", "targets": "cuda:0"})
    Traceback (most recent call last):
    ValueError: e: must be on the device of c and targets, cuda:0, got cpu
    """
    on_e, *others = devices.values()
    if others and len(others) > 1 and all(device == others[0] != on_e for device in others):
        raise ValueError(f"e: must be on the device of {' and '.join([*devices][1:])}, {others[0]}, got {on_e}")
    for name, device in devices.items():
        if device != on_e:
            raise ValueError(f"{name}: must be on the device of e, {on_e}, got {device}")


def check_shift(shift: int, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the shift leaves a token to each sequence of e, which is of this shape."""
    if len(shape) < 2:
        raise ValueError(f"shift: needs a token axis to shift along, but e has shape {shape}; shift must be 0")
    if shift >= shape[-2]:
        raise ValueError(
            f"shift: must be less than the number of tokens of a sequence, {shape[-2]} of e {shape}, got {shift}: it would "
            "leave none; leave such a batch out"
        )


def _check_classifier(c: Any, e: Any, fewest_rows: int) -> None:
    """Its dtype and shape, which are often those of another argument."""
    if np.dtype(c.dtype) != e.dtype:
        hint = "cast one of them, for example c.astype(e.dtype)"
        if c.dtype.kind in "iub":
            hint = "quantized weights must be made floating-point first, and targets come third"
        raise TypeError(f"c: dtype must be that of e, {e.dtype}, got {c.dtype}; {hint}")
    if c.ndim != 2:
        hint = "; e and c look exchanged: the embeddings come first" if c.ndim > 2 and e.ndim == 2 else ""
        raise ValueError(f"c: must have shape (V, D), got shape {c.shape}{hint}")
    if c.shape[0] < fewest_rows or c.shape[1] < 1:
        raise ValueError(f"c: must have V >= {fewest_rows} and D >= 1, got shape {c.shape}")
    if e.ndim < 1:
        raise ValueError("e: must have shape (..., D), got a 0-d array")
    if e.shape[-1] != c.shape[1]:
        hint = ""
        if e.shape[-1] == c.shape[0]:
            hint = "; c looks transposed, pass c.T (or e are logits: pass the embeddings that they are made of)"
        raise ValueError(f"e: last dimension must be the hidden size D = {c.shape[1]} of c {c.shape}, got {e.shape}{hint}")


def _check_same_device(name: str, array: Any, e: Any) -> None:
    check_devices({"e": interchange.device_of(e), name: interchange.device_of(array)})


def _targets(name: str, native: Any, e: Any, c: Any, checked: Options, kind: Kind, several: bool) -> Any:
    """(N,) int64; (N, K) where a token may have several of them."""
    if native.dtype.kind not in "iu":
        cast = f"{name}.long()" if kind.library == "torch" else f"{name}.astype(int)"
        way = f"; if they are whole numbers, pass {cast}"
        if native.shape == (*e.shape[:-1], len(c)):
            way = f"; of one-hot rows pass {name}.argmax(-1); probabilities cannot be targets here"
            way += "; those of few entries are target_probs"
        raise TypeError(f"{name}: must be integers, the ids of entries, got dtype {native.dtype}{way}")
    tokens = tuple(e.shape[:-1])
    if native.shape[: len(tokens)] != tokens or native.ndim != len(tokens) + several or (several and native.shape[-1] < 1):
        hint = ""
        if native.shape == (*tokens, len(c)):
            hint = f"; of one-hot rows pass {name}.argmax(-1)"
        elif native.shape == c.shape[:-1]:
            hint = "; e and c look exchanged: the embeddings come first, then the classifier (V, D)"
        elif native.shape[:-1] == tokens and not several:
            hint = "; of several targets a token, pass what each counts as target_probs"
        if name == "ids":
            what = f"the shape of e without its last dimension, {tokens}, or that and K of them"
        else:
            what = f"the shape of e without its last dimension, {tokens}"
            what += ", and then K, how many there are of a token" if several else ""
        raise ValueError(f"{name}: must have {what}, got {native.shape}{hint}")
    if native.dtype == np.uint64:
        native = native.clip(max=2**63 - 1)  # so that the cast cannot turn a target out of range into an ignored one
    shifted = _shifted(native.astype(np.int64, copy=False), checked, checked.ignore_index, len(tokens) - 1)
    return _flat(shifted, several)


def _target_probs(target_probs: Any, targets: Any, e: Any, checked: Options) -> Any:
    """(N, K) of the compute dtype, 0 where padded. The targets are those of the caller, not yet checked."""
    native = _real("target_probs", target_probs, e)
    if targets is None:
        raise ValueError("target_probs: need targets (..., K) of which they are")
    if native.shape != targets.shape or native.ndim != e.ndim:
        expected = f"{tuple(e.shape[:-1])} and then K"
        raise ValueError(f"target_probs: must have the shape of targets, {expected}, got {native.shape} for {targets.shape}")
    native = interchange.array_module(native).where(targets == checked.ignore_index, native.dtype.type(0), native)
    return _flat(_shifted(native, checked, 0, e.ndim - 2), several=True)


def _shifted(native: Any, checked: Options, fill: int, axis: int = -1) -> Any:
    """Tokens stay where they are and meet a later target; those at the end meet none, but `fill`. So e is never copied."""
    if not checked.shift:
        return native
    shifted = interchange.array_module(native).full_like(native, fill)
    before = (slice(None),) * (axis % native.ndim)
    shifted[(*before, slice(0, -checked.shift))] = native[(*before, slice(checked.shift, None))]
    return shifted


def _flat(native: Any, several: bool = False) -> Any:
    """One dimension of all; or, of several numbers of a token, two."""
    shape = (math.prod(native.shape[:-1]), native.shape[-1]) if several else -1
    return interchange.array_module(native).ascontiguousarray(native.reshape(shape))


def _check_range_of_targets(name: str, p: Problem, total: int) -> None:
    wrong = ~p.is_padding & ((p.targets < 0) | (p.targets >= total))
    if bool(wrong.any()):
        first = int(wrong.argmax())
        token = first if p.K is None else first // p.K
        how_many = f"{int(wrong.sum())} of {p.N} tokens" if p.K is None else f"{int(wrong.sum())} of {p.targets.size} {name}"
        raise ValueError(
            f"{name}: must lie in [0, V) = [0, {total}) or equal ignore_index = {p.options.ignore_index}, got "
            f"{int(p.targets.reshape(-1)[first])} for token {token} ({how_many} out of range)"
        )


def _bias(bias: Any, e: Any, c: Any) -> Any:
    native = interchange.take("bias", bias)
    allowed = {np.dtype(e.dtype)} if e.dtype == np.float64 else {np.dtype(e.dtype), np.dtype(np.float32)}
    if np.dtype(native.dtype) not in allowed:
        raise TypeError(f"bias: dtype must be {' or '.join(sorted(map(str, allowed)))}, got {native.dtype}")
    if native.shape != (c.shape[0],):
        raise ValueError(f"bias: must have shape (V,) = ({c.shape[0]},), got shape {native.shape}")
    _check_same_device("bias", native, e)
    return interchange.array_module(native).ascontiguousarray(native)


def _logit_scale(logit_scale: Any, e: Any) -> Any:
    """(N,) of the compute dtype, or None where it would change nothing."""
    dtype = np.dtype(e.dtype)
    wide, xp, N = compute_dtype_of(dtype), interchange.array_module(e), math.prod(e.shape[:-1])
    if logit_scale is None:
        return None
    if isinstance(logit_scale, np.ndarray) and not logit_scale.ndim:
        logit_scale = logit_scale[()]
    if isinstance(logit_scale, numbers.Real | str):
        value = positive("logit_scale", logit_scale, dtype, "a positive number, an array of one for each token")
        return None if value == 1 else xp.full(N, value, wide)
    native = _real("logit_scale", logit_scale, e)
    if native.shape not in ((), e.shape[:-1]):
        raise ValueError(
            f"logit_scale: must be a number or have the shape of e without its last dimension, {e.shape[:-1]}, got shape "
            f"{native.shape}"
        )
    return _flat(xp.broadcast_to(native, e.shape[:-1]))


def _class_weights(class_weights: Any, e: Any, total: int) -> Any:
    native = _real("class_weights", class_weights, e)
    if native.shape != (total,):
        raise ValueError(f"class_weights: must have shape (V,) = ({total},), got shape {native.shape}")
    return _flat(native)


def _token_weights(token_weights: Any, e: Any, checked: Options) -> Any:
    native = _real("token_weights", token_weights, e, booleans=True)
    if native.shape != e.shape[:-1]:
        raise ValueError(f"token_weights: must have the shape of targets, {e.shape[:-1]}, got {native.shape}")
    return _flat(_shifted(native, checked, 0))


def filter_seed(filter_seed: Any, e: Any) -> Any:
    """An integer in [0, 2**32), or (1,) int64 where it is on e's device: to read it there would wait for the device."""
    if not hasattr(filter_seed, "dtype") or isinstance(filter_seed, np.generic):
        return integer("filter_seed", filter_seed) % 2**32
    native = interchange.take("filter_seed", filter_seed)
    if native.dtype.kind not in "iu":
        raise TypeError(f"filter_seed: must be an integer or a 0-d array of one, got dtype {native.dtype}")
    if native.shape != ():
        raise ValueError(f"filter_seed: must be an integer or a 0-d array of one, got shape {native.shape}")
    if not interchange.is_on_device(native):  # a host scalar is welcome anywhere
        return int(native) % 2**32
    _check_same_device("filter_seed", native, e)
    return native.reshape(1).astype(np.int64, copy=False)


def _real(name: str, array: Any, e: Any, *, booleans: bool = False) -> Any:
    """The array, on e's device, as one of the compute dtype."""
    native = interchange.take(name, array)
    if native.dtype.kind not in ("fiub" if booleans else "fiu") and native.dtype != BFLOAT16:
        raise TypeError(f"{name}: must be real numbers{' or booleans' if booleans else ''}, got dtype {native.dtype}")
    _check_same_device(name, native, e)
    return native.astype(compute_dtype_of(np.dtype(e.dtype)), copy=False)
