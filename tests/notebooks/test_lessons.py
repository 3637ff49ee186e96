"""The lessons' own kernels compile for GPUs; colours can be read; what was recorded on a GPU is read as it is written."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from numba import cuda

pytest.importorskip("matplotlib", reason="the notebooks extra is not installed: pip install '.[notebooks]'")

from lessons import counters, drawings, figures, measured, sources, style, texts
from lessons.svg import Picture, text
from tests.helpers import offline

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
F32, I64, U16 = cuda.types.float32, cuda.types.int64, cuda.types.uint16


def array(dtype, dimensions):
    return cuda.types.Array(dtype, dimensions, "C")


MATRIX, VECTOR = array(F32, 2), array(F32, 1)
PRODUCT = MATRIX, MATRIX, MATRIX
KERNELS = {
    "2 online_lse": (2, lambda d: d["online_lse_kernel"], (MATRIX, VECTOR)),
    "3 naive": (3, lambda d: d["naive_kernel"], PRODUCT),
    "3 turned": (3, lambda d: d["turned_kernel"], PRODUCT),
    "3 exchanged": (3, lambda d: d["exchanged_kernel"], PRODUCT),
    "3 lse": (3, lambda d: d["lse_kernel"], (MATRIX, MATRIX, VECTOR)),
    "4 tiled": (4, lambda d: d["make_tiled_kernel"](32), PRODUCT),
    "4 padded": (4, lambda d: d["make_tiled_kernel"](32, unused=1), PRODUCT),
    "4 two buffers": (4, lambda d: d["make_two_buffers_kernel"](16), PRODUCT),
    "5 blocked": (5, lambda d: d["make_blocked_kernel"](16, 8, 8), PRODUCT),
    "8 atomic": (8, lambda d: d["atomic_sum_kernel"], (VECTOR, VECTOR)),
    "9 row": (9, lambda d: d["make_row_kernel"](4), (MATRIX, VECTOR)),
    "10 tile": (10, lambda d: cuda.jit(d["tile_kernel"]), (array(U16, 2), array(U16, 2), MATRIX)),
}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", KERNELS)
def test_a_lessons_kernel_compiles_for_a_gpu(name):
    lesson, kernel, parameters = KERNELS[name]
    function = kernel(sources.definitions(lesson)).py_func
    compiled = offline.compile_function(function, cuda.types.void(*parameters), None, (8, 0))
    assert compiled.spilled_bytes == 0
    if name == "5 blocked":
        assert compiled.stack_bytes == 0  # its sums are registers
        assert compiled.registers <= 255
    if name == "10 tile":
        assert compiled.count(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32") == 1
        assert compiled.count(r"ldmatrix\.sync\.aligned\.m8n8\.x[24]\.shared\.b16") == 2


def load_recorder():
    spec = importlib.util.spec_from_file_location("record_on_gpu", NOTEBOOKS / "record_on_gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("compiler")
def test_the_forwards_kernel_compiles_with_stamps():
    from cce_numba.hopper.forward import kernel
    from cce_numba.hopper.tiles import HopperTiles
    from cce_numba.interchange import BFLOAT16
    from cce_numba.tensor_core.folds import MAX_SUM

    recorder = load_recorder()
    with recorder.stamped(0x7F0000000000):
        made = kernel.make_forward_kernel.__wrapped__(HopperTiles(), BFLOAT16, None, False, False, (MAX_SUM,))
        compiled = offline.compile_hopper(made)
    assert compiled.count(r"mov\.u64 %\w+, %clock64") >= 8  # two of the producer, two of each consumer and of its turns
    assert compiled.spilled_bytes == 0
    assert not compiled.notices


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["atomics", "fragment"])
def test_what_is_quick_to_record_can_be_recorded(name):
    assert load_recorder().RECORDINGS[name]()


def made_up_timeline():
    """Consumers in turn, four tiles of three stages of 100 cycles; a fold takes 120, so nobody waits for it."""
    released, asks = {0: [], 1: []}, {0: [], 1: []}
    for tile in range(4):
        begin = 1000 + 300 * tile
        released[tile % 2] += [[3 * tile + k, begin + 100 * (k + 1)] for k in range(3)]
        asks[tile % 2].append(begin + 300 + 120)
    return {
        "problem": {"D": 130},
        "tiles": {"block_d": 64, "stages": 2},
        "uses": {
            "released_0": released[0],
            "released_1": released[1],
            "asks": [[use, 100 * use] for use in range(12)],
            "gets": [[use, 100 * use + 40] for use in range(12)],
        },
        "turns": {"asks_0": asks[0], "asks_1": asks[1], "hands_0": [], "hands_1": []},
    }


def test_counters_become_spans():
    (name, spans), (_, second) = counters.consumers(made_up_timeline(), 0, 1e9)
    assert name == "consumer A"
    assert spans == [
        (1000, 1300, "z", "tile 0"),
        (1300, 1420, "row", "fold"),
        (1420, 1600, "line", "waits"),
        (1600, 1900, "z", "tile 2"),
        (1900, 2020, "row", "fold"),
    ]
    assert second[0] == (1300, 1600, "z", "tile 1")
    cut = counters.consumers(made_up_timeline(), 1200, 1700)[0][1]
    assert cut[0][:2] == (0, 100)
    assert cut[-1][:2] == (400, 500)
    assert (counters.stage_cycles(made_up_timeline()) == 100).all()
    assert counters.producer_waits(made_up_timeline()).tolist() == [40] * 10


def test_the_medians_of_the_spans():
    assert counters.medians(made_up_timeline()) == {"products": 300, "fold": 120, "waits": 180}


@pytest.mark.parametrize("name", ["ladder", "atomics", "fragment", "timeline"])
def test_what_was_recorded_can_be_read(name):
    recorded = measured.lesson(name)
    assert measured.source(recorded)
    assert measured.gpu(recorded) in measured.BANDWIDTH
    if name == "fragment":
        assert sorted(np.ravel(recorded["lanes"])) == list(range(128))
    if name == "timeline":
        assert counters.consumers(recorded, 0, 1e6)
        assert np.median(counters.stage_cycles(recorded)) > 700
    if name == "ladder":
        assert set(recorded["ms"]) == {*measured.RUNGS, measured.CUBLAS}


def test_the_ladder_has_its_rungs_in_order():
    rungs = measured.ladder().up_to("tiled_kernel")
    assert [name for name, _ in rungs] == ["naive_kernel", "turned_kernel", "tiled_kernel", "cuBLAS"]
    assert all(slower > faster for (_, slower), (_, faster) in itertools.pairwise(rungs))


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_words_and_colours_stand_out_from_the_paper(theme):
    """WCAG 2: 4.5 for words, 3 for shapes; lines between cells are meant to be quiet."""
    paper = luminance(style.COLOURS["paper"][theme])
    for name, pair in style.COLOURS.items():
        if name in ("paper", "line"):
            continue
        light, dark = sorted((paper, luminance(pair[theme])), reverse=True)
        least = 4.5 if name in ("ink", "quiet", "thread") else 2.8
        assert (light + 0.05) / (dark + 0.05) >= least, name


def test_pictures_follow_the_theme_and_escape_words():
    picture = Picture(100, 20, text(1, 2, "a < b & c", "e"), "<title>").svg()
    assert "a &lt; b &amp; c" in picture
    assert "<title>&lt;title&gt;</title>" in picture
    assert "prefers-color-scheme:dark" in picture
    figure, axes = figures.new(2, 2)
    axes.plot([1, 2], color=figures.light("e"))
    shown = figures.show(figure, "a line")._repr_mimebundle_()["image/svg+xml"]
    assert f"stroke: {style.COLOURS['e'][0]}" in shown
    assert f"stroke:{style.COLOURS['e'][1]}!important" in shown


def test_the_extract_is_the_models_softmax():
    real = texts.smollm2()
    z = real.logits.astype(np.float64)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    assert real.logits.shape == (128, 49152)
    nll = -np.log(p[np.arange(128), real.targets])
    assert nll.mean() == pytest.approx(3.606, abs=2e-3)
    assert ((p >= 2.0**-16).sum(axis=1) > 10).all()
    assert set(real.targets.tolist()) <= real.words.keys()
    assert (np.diff(real.mean) <= 0).all()


def test_a_gantt_chart_draws_what_fits():
    spans = [(0, 50, "z", "first"), (80, 500, "c", "second"), (600, 700, "c", "late")]
    picture = drawings.gantt([("a", spans)], "t", "ms", until=200)
    shapes = re.findall(r'<rect [^>]*class="f-[zc] ', picture.body)
    assert len(shapes) == 2  # what begins after the end is not there


def test_the_worker_says_what_went_wrong():
    from lessons import worker

    with pytest.raises(ZeroDivisionError):
        worker.run(divmod, 1, 0)
    assert worker.run(divmod, 7, 2) == (3, 1)  # and goes on
