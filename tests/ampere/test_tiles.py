"""Tiles by the shared memory of a machine; and each machine's tiles on the GPU that is here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.cases import DTYPES, make_case
from tests.helpers.checks import check_forward, check_gradients, expect
from tests.helpers.harness import AmpereFloat32Harness, SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba import gpu
from cce_numba.ampere.backward import host as backward_host
from cce_numba.ampere.backward.tiles import BackwardTiles, backward_tiles_for
from cce_numba.ampere.tiles import AmpereTiles, smem_bytes_of, tiles_for
from cce_numba.options import Options
from cce_numba.tensor_core import layout

FLOAT32 = np.dtype(np.float32)
MACHINES = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)]


def wide_tiles_for(cc):
    """Of the forward, for float32."""
    return tiles_for(cc, wide=True)


@pytest.mark.parametrize("cc", MACHINES, ids=str)
@pytest.mark.parametrize("choose", [tiles_for, wide_tiles_for, backward_tiles_for])
def test_tiles_fit_their_machine_and_one_stage_more_would_not_or_is_not_wanted(cc, choose):
    tiles = choose(cc)
    assert tiles.smem_bytes <= smem_bytes_of(cc)
    assert tiles.stages >= (2 if choose is backward_tiles_for else 3)
    most = {tiles_for: 4 if tiles.block_v == 256 else 3, wide_tiles_for: 4, backward_tiles_for: 5}[choose]
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


@pytest.mark.parametrize("cc", [cc for cc in MACHINES if cc != (13, 0)], ids=str)
def test_the_page_of_kernels_tells_the_tiles(cc):
    """docs/which_kernels.md, in the row that names the compute capability."""
    page = (Path(__file__).parents[2] / "docs" / "which_kernels.md").read_text().partition("## Tiles and shared memory")[2]
    name = "{}.{}".format(*cc)
    rows = [line.split("|") for line in page.partition("## float32")[0].splitlines() if line.startswith("| ")]
    (row,) = [row for row in rows if name in row[1].strip().split(", ")]
    cells = [f"{smem_bytes_of(cc) // 1024} KiB"]
    chosen = tiles_for(cc), wide_tiles_for(cc), backward_tiles_for(cc)
    cells += [f"128 x {tiles.block_v}, {tiles.stages} stages" for tiles in chosen]
    assert [cell.strip() for cell in row[2:6]] == cells


@pytest.mark.parametrize(
    ("name", "multiprocessors", "l2_mib", "at_most"),
    [("H100", 132, 50, 24), ("A100", 108, 40, 21), ("RTX 3090", 82, 6, 3), ("RTX 4090", 128, 72, 24)],
)
def test_rows_of_e_that_are_used_at_a_time_fit_the_cache(monkeypatch, name, multiprocessors, l2_mib, at_most):
    """So many blocks of 128 rows of 2304 numbers, 0.56 MiB each, in 14 MiB or in 30 % of a smaller cache."""
    dtype = np.dtype(np.float16)
    p = SimpleNamespace(N=8192, V=256_000, D=2304, dtype=dtype, e=None, c=None, options=Options.of(dtype, {}))
    monkeypatch.setattr(layout.matrices, "why_not", lambda matrix: None)
    monkeypatch.setattr(gpu, "current", lambda: gpu.Gpu((8, 0), multiprocessors, l2_mib * 2**20))
    found = layout.Layout.of(p, tiles_for((8, 0)))
    assert at_most / 2 < found.per_round <= at_most
    assert found.per_round * 128 * 2304 * 2 <= min(14, 0.3 * l2_mib) * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [DTYPES[1], FLOAT32], ids=str)
@pytest.mark.parametrize("cc", [(8, 0), (8, 6)], ids=str)
def test_tiles_of_other_machines(ampere, monkeypatch, cc, dtype):
    """With less shared memory; the instructions are those of the GPU that is here."""
    from cce_numba.ampere import backend

    if dtype == FLOAT32:
        ampere = AmpereFloat32Harness()
    monkeypatch.setattr(backend, "tiles_for", lambda _, wide: tiles_for(cc, wide))
    monkeypatch.setattr(backward_host, "backward_tiles_for", lambda _: backward_tiles_for(cc))
    for options in ({}, {"filter_eps": None}):
        case = make_case(3, (300,), 5000, 200, dtype, ignored=0.2, bias=True).with_options(**options)
        expected, result = expect(case), ampere.forward(case)
        assert result.plan.tiles == tiles_for(cc, dtype == FLOAT32)
        check_forward(expected, ampere.numbers(result))
        kept = ampere.kept(result, case.c.shape[0])
        check_gradients(expected, ampere.backward(result), kept, coarse_eps=result.plan.coarse_eps)
    assert np.isfinite(ampere.host(result.loss))
