"""The stepper: what it records against counts made by hand, broken kernels, and the pictures of both."""

from __future__ import annotations

import json
import re
from math import ceil

import numpy as np
import pytest

from lessons import stepper, worker
from lessons.stepper import Layout, Shown
from tests.notebooks import kernels
from tests.notebooks.kernels import T

# Whole tiles; one row, one column and one term past a tile; less than a tile.
SHAPES = [(4, 8, 8), (5, 9, 6), (3, 2, 5)]


def problem(N, V, D):
    rng = np.random.default_rng(0)
    e, c = rng.standard_normal((N, D), dtype=np.float32), rng.standard_normal((V, D), dtype=np.float32)
    return {"e": e, "c": c, "z": np.zeros((N, V), np.float32)}


def record(kernel, shape, block=(0, 0)):
    N, V, _ = shape
    return worker.record(kernel, (ceil(V / T), ceil(N / T)), (T, T), problem(*shape), block)


def layout(shape):
    return Layout(
        left=Shown("e", "e"),
        top=Shown("c", "c", turned=True),
        result=("z", "z"),
        shape=shape[:2],
        sums=lambda held, x, y: [(held["n"], held["v"], held["total"])],
        stored=Shown("z", "z"),
        shared=[Shown("e_smem", "e", words=1), Shown("c_smem", "c", words=1)],
        tile=lambda held: [(held["n"] - held["y"], held["v"] - held["x"], T, T)],
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", ["first", "last"])
def test_counts_are_those_made_by_hand(shape, where):
    N, V, D = shape
    block = (0, 0) if where == "first" else (ceil(V / T) - 1, ceil(N / T) - 1)
    r = record(kernels.tiled_kernel, shape, block)
    rows, columns, slices = min(T, N - T * block[1]), min(T, V - T * block[0]), ceil(D / T)
    # Each element of the tile's rows travels once, each staged one is written once and read by T threads.
    assert r.count("e") == rows * D
    assert r.count("c") == columns * D
    assert r.distinct("e", "c") == (rows + columns) * D
    assert r.reuse("e") == 1
    for smem in ("e_smem", "c_smem"):
        assert r.count(smem, write=True) == T * T * slices
        assert r.count(smem) == T * T * T * slices
        assert r.reuse(smem) == T * slices
    assert r.count("z", write=True) == rows * columns
    assert r.count("z") == 0
    assert r.steps == 2 * slices + 1
    assert [len(set(row)) for row in r.barriers] == [1] * r.steps
    assert not r.races()
    assert not r.stray_barriers()
    np.testing.assert_allclose(r.results["z"], r_inputs(shape), rtol=1e-4, atol=1e-5)


def r_inputs(shape):
    p = problem(*shape)
    return p["e"] @ p["c"].T


def test_values_and_registers_are_those_of_the_step():
    shape = 5, 9, 6
    r, p = record(kernels.tiled_kernel, shape, (1, 0)), problem(5, 9, 6)
    np.testing.assert_array_equal(r.values("e_smem", 0), p["e"][:4, :4])
    np.testing.assert_array_equal(r.values("e_smem", 1), p["e"][:4, :4])  # read, not written
    np.testing.assert_array_equal(r.values("c_smem", 2), np.pad(p["c"][4:8, 4:6], ((0, 0), (0, 2))))
    held = r.registers[1][T + 2]  # thread y = 1, x = 2, after the first slice
    assert (held["n"], held["v"], held["d0"]) == (1, 6, 0)
    assert held["total"] == pytest.approx(float(p["e"][1, :4] @ p["c"][6, :4]), abs=1e-5)
    assert r.registers[0][0]["total"] == 0
    assert [line.text.strip() for line in r.lines[1]][:2] == ["for k in range(T):", "total += e_smem[y, k] * c_smem[x, k]"]


def test_a_missing_barrier_is_seen_as_a_race_and_in_the_picture():
    shape = 4, 8, 8
    r = record(kernels.no_first_barrier_kernel, shape)
    races = r.races()
    assert {race.array for race in races} == {"e_smem", "c_smem"}
    assert {race.step for race in races} == {0, 1}
    assert len(races) == 2 * 2 * T * T  # two slices, two arrays, every element: T threads read what one writes
    assert all(len(race.writers) == 1 and len(race.readers) == T for race in races)
    walk = stepper.drawn(r, layout(shape))
    assert walk.scene.frames[0].states["e_smem"] == "x" * T * T
    assert "RACE" in walk.scene.frames[0].caption
    assert 'class="k p-e x"' in walk.still(0).svg()
    assert 'class="k p-e x"' not in stepper.drawn(record(kernels.tiled_kernel, shape), layout(shape)).still(0).svg()


def test_the_second_barrier_is_as_needed_as_the_first():
    r = record(kernels.no_second_barrier_kernel, (4, 8, 8))
    # Step 1 reads the first slice and writes the second.
    assert {race.step for race in r.races()} == {1}
    assert not record(kernels.no_second_barrier_kernel, (4, 8, 4)).races()  # with one slice nobody overwrites


def test_a_wrong_tile_is_seen_in_record_and_picture():
    shape = 8, 8, 6
    good, bad = (record(kernel, shape, (1, 0)) for kernel in (kernels.tiled_kernel, kernels.wrong_tile_kernel))
    assert good.count("e") == bad.count("e")  # so counting alone would not tell
    assert set(good.of("e").element // 6) == {0, 1, 2, 3}
    assert set(bad.of("e").element // 6) == {4, 5, 6, 7}
    frame = stepper.drawn(bad, layout(shape)).scene.frames[0]
    rows = [frame.states["left"][6 * n : 6 * n + 6] for n in range(8)]
    assert rows == ["......"] * 4 + ["rrrr.."] * 4  # outside of the tile that is outlined
    left = stepper.drawn(bad, layout(shape)).scene.panels[0]
    assert frame.outlines[0][:2] == left.corner(0, 0)


def test_threads_at_different_barriers_are_told():
    r = worker.record(kernels.divergent_kernel, 1, 4, {"out": np.zeros(4)}, (0,))
    assert r.stray_barriers() == [0]


def test_bank_conflicts_are_those_made_by_hand():
    r = worker.record(kernels.banks_kernel, 1, 32, {"x": np.ones((32, 32), np.float32), "out": np.zeros(32)}, (0,))
    # A row takes 1 turn. A column takes 32, since its words are 32 apart, all in one bank. One word for all threads takes 1,
    # and so do 16 words of 16 banks, each for two threads.
    square = r.bank_conflicts("square")
    assert (square.requests, square.wavefronts, square.worst) == (4, 1 + 32 + 1 + 1, 32)
    assert r.bank_conflicts("padded").per_request == 1
    assert r.bank_conflicts("wide").wavefronts == 2  # 64-bit words: half a warp at a time
    assert r.sectors("x") == 32 + 4  # a column: a piece for each thread; a row: 128 bytes
    assert r.sectors("out", write=True) == 32 * 8 // 32


def test_device_functions_and_constants_travel_along():
    r = worker.record(kernels.calling_kernel, 1, 4, {"x": np.arange(3, dtype=np.float32)}, (0,))
    assert r.results["x"].tolist() == [0, 2, 4]
    assert (r.count("x"), r.count("x", write=True)) == (3, 3)


def test_an_index_out_of_bounds_is_an_error_that_names_the_array():
    with pytest.raises(IndexError, match=r"out: index \(3,\) is outside \(3,\)"):
        worker.record(kernels.divergent_kernel, 1, 4, {"out": np.zeros(3)}, (0,))


def test_the_budget_is_compared():
    walk = stepper.drawn(record(kernels.tiled_kernel, (4, 8, 8)), layout((4, 8, 8)))
    assert walk.compare(e=4 * 8, c=4 * 8, e_smem=T**3 * 2, write_z=16).holds
    off = walk.compare(e=4 * 8, c=17)
    assert not off.holds
    assert off.rows[1] == ("reads of c, global memory", 17, 32.0)
    assert "≠" in off._repr_html_()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_has_all_that_it_needs_and_a_state_for_every_cell(shape):
    walk = stepper.drawn(record(kernels.tiled_kernel, shape), layout(shape))
    page = walk._repr_html_()
    assert not re.search(r'(?:src|href)="|https?://(?!www\.w3\.org)', page)  # nothing comes from elsewhere
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data["frames"]) == walk.record.steps
    assert page.count("<g data-panel>") == len(data["panels"])
    cells = [rows * columns for _, _, rows, columns, *_ in data["panels"]]
    assert cells == [panel.cells for panel in walk.scene.panels]
    for frame in data["frames"]:
        assert [len(states) for states in frame["s"]] == cells
        assert len(frame["o"]) == page.split("class='outlines'")[1].split("</g>")[0].count("<rect")
    # The last sums are the results, in cells as they are in memory.
    words = walk.scene.frames[-1].words["result"]
    N, V, _ = shape
    z = r_inputs(shape)
    for n in range(min(T, N)):
        for v in range(min(T, V)):
            assert float(words[n * V + v].replace("−", "-")) == pytest.approx(z[n, v], abs=0.051)


def test_a_threads_own_accesses_are_in_the_page():
    walk = stepper.drawn(record(kernels.tiled_kernel, (4, 8, 8)), layout((4, 8, 8)))
    touched = walk.scene.frames[1].touched["e_smem"]
    # Row y of the staged slice is read by the threads of row y, and by no other.
    assert touched == {cell: (0b1111 << (T * (cell // T)), 0) for cell in range(T * T)}
    assert walk.scene.threads == "threads"
