"""Problems for every backend: what hypothesis draws, and the arrays that are made of it.

Structure (sizes, options, what is ignored) is drawn, so that failures shrink; contents come from a drawn seed, since
drawing thousands of numbers one by one would be slow and shrinking them tells nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

DTYPES = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
IGNORE = -100
DROPPING = {"filter": "drop"}


@dataclass(frozen=True)
class Edges:
    """Sizes at which something begins anew in a backend (a tile, a block, a byte of bits), and the largest to draw."""

    n: tuple[int, ...]
    v: tuple[int, ...]
    d: tuple[int, ...]
    max_n: int
    max_v: int
    max_d: int
    long_v: int = 0  # a vocabulary that takes many tiles
    dtypes: tuple[np.dtype, ...] = DTYPES  # that it takes

    @property
    def dtype(self) -> np.dtype:
        """The one for tests that are about something else: float32 where it is taken."""
        return DTYPES[2] if DTYPES[2] in self.dtypes else self.dtypes[-1]


@dataclass(frozen=True)
class Case:
    """One problem: NumPy arrays and the options of the public functions."""

    e: np.ndarray
    c: np.ndarray
    targets: np.ndarray
    options: dict[str, Any] = field(default_factory=lambda: dict(DROPPING))

    def with_options(self, **options: Any) -> Case:
        return replace(self, options=self.options | options)

    def __repr__(self) -> str:  # small enough to paste into an issue
        options = {k: v if not isinstance(v, np.ndarray) else f"array{v.shape}" for k, v in self.options.items()}
        return f"Case(e={self.e.dtype}{self.e.shape}, c={self.c.shape}, targets={self.targets.tolist()}, {options})"


def sizes(edges: tuple[int, ...], largest: int, smallest: int = 1) -> st.SearchStrategy[int]:
    """A size next to an edge (one less, on it, one more), or any; small ones first, so that failures shrink."""
    near = sorted({x for edge in edges for x in (edge - 1, edge, edge + 1) if smallest <= x <= largest})
    return st.integers(smallest, largest) | st.sampled_from(near or [smallest])


def make_case(
    seed: int,
    shape: tuple[int, ...],
    V: int,
    D: int,
    dtype: np.dtype = DTYPES[2],
    *,
    spread: float = 2.0,
    ignored: float = 0.0,
    **options: Any,
) -> Case:
    """A problem with random contents.

    shape: of the tokens. spread: standard deviation of the logits. ignored: share of tokens with the ignored target.
    bias=True makes a random bias. The filter is the one that drops, unless the options say otherwise: bits tell all of what it
    keeps. test_unbiased.py is about the other one.
    """
    rng = np.random.default_rng(seed)
    e = rng.normal(size=(*shape, D)).astype(dtype)
    c = (rng.normal(size=(V, D)) * spread / np.sqrt(D)).astype(dtype)
    targets = rng.integers(0, V, size=shape)
    targets[rng.random(shape) < ignored] = options.get("ignore_index", IGNORE)
    if options.pop("bias", False):
        options["bias"] = rng.normal(size=V).astype(dtype)
    return Case(e, c, targets, DROPPING | options)


@st.composite
def cases(draw: st.DrawFn, edges: Edges, dtypes: tuple[np.dtype, ...] | None = None, *, smallest_n: int = 0) -> Case:
    """The widest domain that every backend must take: any sizes, dtype and options, finite numbers."""
    N = draw(sizes(edges.n, edges.max_n, smallest_n), label="N")
    rows = draw(st.sampled_from([1, 1, 2, 3]), label="rows")
    shape = (N,) if rows == 1 else (rows, N // rows)
    shift = draw(st.sampled_from([shift for shift in (0, 0, 0, 1, True, 2) if shift == 0 or shift < shape[-1]]), label="shift")
    case = make_case(
        seed=draw(st.integers(0, 2**16), label="seed"),
        shape=shape,
        V=draw(sizes(edges.v, edges.max_v), label="V"),
        D=draw(sizes(edges.d, edges.max_d), label="D"),
        dtype=draw(st.sampled_from(dtypes or edges.dtypes), label="dtype"),
        spread=draw(st.sampled_from([2.0, 0.0, 0.1, 6.0, 30.0]), label="spread"),
        ignored=draw(st.sampled_from([0.0, 0.0, 0.0, 0.3, 0.3, 0.9, 1.0]), label="ignored"),
        ignore_index=draw(st.sampled_from([IGNORE, IGNORE, 0, -1]), label="ignore_index"),
        bias=draw(st.booleans(), label="bias"),
        softcap=draw(st.sampled_from([None, None, 5.0, 30.0]), label="softcap"),
        reduction=draw(st.sampled_from(["mean", "sum", "none"]), label="reduction"),
        shift=shift,
    )
    if "bias" in case.options and draw(st.booleans(), label="fp32 bias") and case.e.dtype != np.float64:
        case.options["bias"] = case.options["bias"].astype(np.float32)
    return case


@st.composite
def with_terms(draw: st.DrawFn, case: Case) -> Case:
    """The case with any terms of the loss, and weights of any shape that they may have, zeros among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16), label="seed of the weights"))
    shape, V = case.targets.shape, len(case.c)
    kinds = {
        "logit_scale": st.sampled_from([None, None, "number", "array"]),
        "label_smoothing": st.sampled_from([0.0, 0.0, 0.1, 0.75, 1.0]),
        "z_loss": st.sampled_from([0.0, 0.0, 1e-4, 0.25]),
        "class_weights": st.sampled_from([None, None, "array"]),
        "token_weights": st.sampled_from([None, None, "array", "mask"]),
    }
    drawn = {name: draw(kind, label=name) for name, kind in kinds.items()}
    dtype = draw(st.sampled_from([np.float64, np.float32]), label="dtype of the weights")
    made = {
        "logit_scale": {"number": 0.625, "array": rng.uniform(0.25, 1.5, shape).astype(dtype)},
        "class_weights": {"array": (rng.uniform(0.1, 2, V) * (rng.random(V) < 0.9)).astype(dtype)},
        "token_weights": {
            "array": (rng.uniform(0.1, 2, shape) * (rng.random(shape) < 0.8)).astype(dtype),
            "mask": rng.random(shape) < 0.7,
        },
    }
    terms = {name: made.get(name, {}).get(kind, kind) for name, kind in drawn.items()}
    return case.with_options(**terms)


def filters() -> st.SearchStrategy[dict[str, Any]]:
    """The options that choose what the gradients leave out."""
    return st.fixed_dictionaries(
        {
            "filter_eps": st.sampled_from(["auto", None, 2.0**-4, 2.0**-8, 2.0**-12]),
            "filter_e_grad": st.booleans(),
            "filter_c_grad": st.booleans(),
            "accum_e_fp32": st.booleans(),
            "accum_c_fp32": st.booleans(),
        }
    )
