"""What a backend says of its statistics, for those who must know before anything runs, is what its forward leaves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cce_numba.arguments import Outline
from cce_numba.backend import backend_module
from tests.helpers.cases import cases, filters, make_case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check_form(harness, case, result):
    p, statistics = result._problem, result._statistics
    module = backend_module(harness.backend)
    form = module.statistics_form(p)
    outline = Outline(p.N, p.V, p.D, p.dtype, p.on_device, p.device, p.options)
    assert module.statistics_form(outline) == form, "no array is looked at"
    assert module.why_not(outline) is None
    n_valid, rows, row_bytes = int(statistics.n_valid), *form.survivors_shape(p.N, p.V)
    assert statistics.tokens.dtype == form.tokens
    assert n_valid <= len(statistics.tokens) <= p.N
    assert statistics.survivor_block == form.survivor_block
    for per_token in (statistics.lse, statistics.target_logit):
        assert (per_token.shape, per_token.dtype) == ((p.N,), p.compute_dtype)
    assert (statistics.n_valid.shape, statistics.n_valid.dtype) == ((), np.int64)
    assert (statistics.mean_logit is not None) == p.options.smooths_capped
    bits = statistics.survivors
    if bits is None:
        return False
    assert (bits.dtype, bits.shape[1]) == (np.uint8, -(-p.V // 8))
    leaves_rows_out = harness.backend == "cpu"  # of blocks in which no token counts
    assert len(bits) == rows or (leaves_rows_out and len(bits) == -(-n_valid // form.survivor_block))
    assert bits.strides[0] == row_bytes or bits.size == 0
    assert result.plan.survivor_bytes == form.survivor_bytes(p.N, p.V)
    return True


@given(data=st.data())
def test_any_problem(harness, edges, data):
    case = data.draw(cases(edges))
    case = case.with_options(label_smoothing=data.draw(st.sampled_from([0.0, 0.1])), **data.draw(filters()))
    check_form(harness, case, harness.forward(case))


@pytest.mark.parametrize("options", [{}, {"filter_c_grad": False}, {"filter_eps": 2.0**-6}], ids=str)
def test_sizes_around_tiles(harness, edges, options):
    recorded = 0
    for N in (edges.n[-1] - 1, edges.n[-1], edges.n[-1] + 1):
        for V in (edges.v[-1] - 1, edges.v[-1] + 9):
            case = make_case(N, (N,), V, edges.d[-1], edges.dtype, spread=12.0, ignored=0.1, **options)
            recorded += check_form(harness, case, harness.forward(case))
    assert recorded == 6
