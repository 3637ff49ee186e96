"""What follows from options: asked in one place, and the same for values that nobody has checked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from cce_numba import arguments
from cce_numba.options import DEFAULTS, PRESETS, LossOptions, Options, compute_dtype_of

FLOAT32 = np.dtype(np.float32)
GRADIENTS = [names for n in range(4) for names in itertools.combinations(arguments.GRADIENTS, n)]
# Options in canonical form, those that decide on filters above all.
VALUES = st.fixed_dictionaries(
    {
        "ignore_index": st.integers(-200, 10),
        "softcap": st.sampled_from([None, None, 5.0]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "shift": st.integers(0, 3),
        "label_smoothing": st.sampled_from([0.0, 0.0, 0.1]),
        "z_loss": st.sampled_from([0.0, 0.5]),
        "filter": st.sampled_from(["drop", "unbiased"]),
        "filter_eps": st.sampled_from(["auto", None, 2.0**-4]),
        **{name: st.booleans() for name in ("filter_e_grad", "filter_c_grad", "accum_e_fp32", "accum_c_fp32")},
    }
)


def test_defaults_name_every_option():
    assert set(DEFAULTS) == set(LossOptions.__annotations__)


def test_auto_eps_is_the_reference_s():
    for dtype in arguments.DTYPES:
        assert Options.of(dtype, {"filter": "drop"}).filter_eps == reference.auto_eps(dtype, "drop")
        options = Options.of(dtype, {})
        assert options.filter_eps == reference.auto_eps(dtype)
        assert options.filter_is_auto
        assert not Options.of(dtype, {"filter_eps": options.filter_eps}).filter_is_auto


@given(values=VALUES, dtype=st.sampled_from(arguments.DTYPES))
def test_values_that_nobody_checks_mean_the_same(values, dtype):
    assert Options.unchecked(dtype, DEFAULTS | values) == Options.of(dtype, values)


def test_numbers_of_all_kinds_are_made_plain():
    given = {
        "softcap": np.float32(5),
        "shift": True,
        "ignore_index": np.int8(3),
        "label_smoothing": 0,
        "filter_e_grad": np.True_,
    }
    options = Options.of(FLOAT32, given)
    for name, value in {"softcap": 5.0, "shift": 1, "ignore_index": 3, "label_smoothing": 0.0, "filter_e_grad": True}.items():
        assert getattr(options, name) == value
        assert type(getattr(options, name)) is type(value)


@given(values=VALUES)
def test_survivors_are_recorded_for_a_gradient_that_is_filtered(values):
    options = Options.of(FLOAT32, values)
    smooths_capped = values["softcap"] is not None and values["label_smoothing"] > 0
    assert options.smooths_capped == smooths_capped
    filtered = {name for name in "ec" if values[f"filter_{name}_grad"] and values["filter_eps"] and not smooths_capped}
    assert (options.filter_eps_e is not None) == ("e" in filtered)
    assert (options.filter_eps_c is not None) == ("c" in filtered)
    assert options.filters == bool(filtered)
    assert options.is_unbiased == (bool(filtered) and values["filter"] == "unbiased")
    for wrt in GRADIENTS:
        assert options.records_survivors(wrt) == bool({"c" if name == "bias" else name for name in wrt} & filtered)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_options_that_exist(name):
    """And choose filters alone."""
    Options.of(FLOAT32, PRESETS[name])
    assert PRESETS[name].keys() <= {"filter_eps", "filter_e_grad", "filter_c_grad"}


def test_what_is_computed_in():
    assert [compute_dtype_of(dtype) for dtype in arguments.DTYPES] == [FLOAT32, FLOAT32, FLOAT32, np.dtype(np.float64)]
