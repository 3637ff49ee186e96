"""Tiles by the shared memory of a machine; and each machine's tiles on the GPU that is here."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.cases import DTYPES, make_case
from tests.helpers.checks import check_forward, check_gradients, expect
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.ampere.backward import host as backward_host
from cce_numba.ampere.backward.tiles import BackwardTiles, backward_tiles_for
from cce_numba.ampere.tiles import AmpereTiles, smem_bytes_of, tiles_for

MACHINES = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)]


@pytest.mark.parametrize("cc", MACHINES, ids=str)
@pytest.mark.parametrize("choose", [tiles_for, backward_tiles_for])
def test_tiles_fit_their_machine_and_one_stage_more_would_not_or_is_not_wanted(cc, choose):
    tiles = choose(cc)
    assert tiles.smem_bytes <= smem_bytes_of(cc)
    assert tiles.stages >= (3 if choose is tiles_for else 2)
    most = 4 if choose is tiles_for and tiles.block_v == 256 else 3 if choose is tiles_for else 5
    assert tiles.stages == most or tiles.smem_bytes + tiles.stage_bytes > smem_bytes_of(cc)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AmpereTiles(block_n=64), "block_n must be 128"),
        (lambda: AmpereTiles(block_v=192), "block_v must be 128 or 256"),
        (lambda: AmpereTiles(block_d=32), "block_d must be 64"),
        (lambda: AmpereTiles(stages=1), "stages must be at least 2"),
        (lambda: AmpereTiles(stages=5), "a CTA has at most 232448: fewer stages, or a smaller block_v"),
        (lambda: BackwardTiles(stages=1), "stages must be at least 2"),
        (lambda: BackwardTiles(stages=3, smem_limit_bytes=99 * 1024), "a CTA has at most 101376: fewer stages"),
    ],
)
def test_tiles_that_cannot_be_are_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.gpu
@pytest.mark.parametrize("cc", [(8, 0), (8, 6)], ids=str)
def test_tiles_of_other_machines(ampere, monkeypatch, cc):
    """With less shared memory; the instructions are those of the GPU that is here."""
    from cce_numba.ampere import backend

    monkeypatch.setattr(backend, "tiles_for", lambda _: tiles_for(cc))
    monkeypatch.setattr(backward_host, "backward_tiles_for", lambda _: backward_tiles_for(cc))
    for options in ({}, {"filter_eps": None}):
        case = make_case(3, (300,), 5000, 200, DTYPES[1], ignored=0.2, bias=True).with_options(**options)
        expected, result = expect(case), ampere.forward(case)
        assert result.plan.tiles == tiles_for(cc)
        check_forward(expected, ampere.numbers(result))
        kept = ampere.kept(result, case.c.shape[0])
        check_gradients(expected, ampere.backward(result), kept, coarse_eps=result.plan.coarse_eps)
    assert np.isfinite(ampere.host(result.loss))
