"""Walks through the shipped kernels: what they read and write against counts made by hand, and what the pictures say."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest

import reference
from lessons import shipped

BLOCK_N, BLOCK_V, BLOCK_K, THREAD_N, THREAD_V = shipped.TINY.values()
THREADS = BLOCK_N // THREAD_N * (BLOCK_V // THREAD_V)
SHAPES = [(4, 16, 8), (6, 17, 10), (1, 3, 1)]  # whole tiles; past their edges; less than one
EPS = 2.0**-4
DROP = {"filter": "drop", "filter_eps": EPS}  # as in the lessons


def problem(N, V, D):
    rng = np.random.default_rng(0)
    e, c = rng.standard_normal((N, D), dtype=np.float32), rng.standard_normal((V, D), dtype=np.float32)
    return e, c, rng.integers(0, V, N)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_forward_by_hand(shape):
    N, V, D = shape
    e, c, targets = problem(*shape)
    n_block = ceil(N / BLOCK_N) - 1
    walk = shipped.forward(e, c, targets, n_block=n_block, **DROP)
    r, tiles, slices, rows = walk.record, ceil(V / BLOCK_V), ceil(D / BLOCK_K), min(BLOCK_N, N - n_block * BLOCK_N)
    # Rows past the last token or entry are read as copies of it; terms past the last are not read.
    assert r.count("e") == tiles * BLOCK_N * D
    assert r.count("c") == tiles * BLOCK_V * D
    assert r.distinct("e") == rows * D
    assert r.distinct("c") == V * D
    # Each thread reads its rows and columns of every staged term, and all of a slice is staged.
    staged = tiles * slices * BLOCK_K
    assert r.count("e_smem", write=True) == staged * BLOCK_N
    assert r.count("c_smem", write=True) == staged * BLOCK_V
    assert r.count("e_smem") == staged * THREADS * THREAD_N
    assert r.count("c_smem") == staged * THREADS * THREAD_V
    # All that is left of the logits.
    assert r.count("part_max", write=True) == r.count("part_sum", write=True) == rows
    assert r.count("survivor_bits", write=True) == tiles
    assert not r.races()
    assert not r.stray_barriers()
    m, s = r.results["part_max"][0], r.results["part_sum"][0]
    np.testing.assert_allclose(reference.to_lse(m, s), reference.forward(e, c, targets).lse, rtol=1e-5, atol=1e-5)


def test_its_picture_shows_logits_rows_and_bits():
    e, c, targets = problem(6, 17, 10)
    walk = shipped.forward(e, c, targets, **DROP)
    z = reference.logits(e, c)
    step = walk.step_that_writes("row_max", 1)  # the first tile, complete
    frame = walk.scene.frames[step]
    words = np.array(frame.words["result"]).reshape(6, 17)
    shown = np.vectorize(lambda word: float(word.replace("−", "-")))(words[:4, :8])
    np.testing.assert_allclose(shown, z[:4, :8], atol=0.051)
    assert not words[4:].any()
    assert not words[:, 8:].any()
    rows = np.array(frame.words["rows"]).reshape(6, 3)
    np.testing.assert_allclose([float(word.replace("−", "-")) for word in rows[:4, 0]], z[:4, :8].max(axis=1), atol=0.0051)
    # In the end the logits are gone. Bits stand for all that survives, and for no more than the reference flags, whose bound
    # does not know the tile itself.
    last = walk.scene.frames[-1]
    result = last.states["result"]
    assert {result[n * 17 + v] for n in range(4) for v in range(17)} == {"o"}
    flags = reference.blocked.forward(e[:4], c, targets[:4], eps=EPS, block_n=4, block_v=8)[2][0]
    survive = reference.column_flags(reference.softmax(z), targets, EPS, block_n=4)[0]
    bits = np.array([state in "hw" for state in last.states["bits"]])
    assert (survive <= bits).all()
    assert (bits <= flags).all()
    assert not bits.all()


def test_every_step_says_what_it_does():
    e, c, targets = problem(6, 17, 10)
    walk = shipped.forward(e, c, targets, **DROP)
    captions = [frame.caption for frame in walk.scene.frames]
    assert not [caption for caption in captions if caption.startswith(("It ", "Then "))]
    folds = (
        "largest of its own",
        "running max",
        "exponentials of its own",
        "join",
        "target",
        "bound",
        "marks",
        "mark",  # the targets
        "bits are written",
    )
    for which in (1, 2, 3):  # writes of the first tile, and of the others
        first = walk.step_that_writes("row_max", which) - 1
        for caption, words in zip(captions[first:], folds, strict=False):
            assert words in caption


def test_a_split_sees_its_part_of_the_vocabulary():
    e, c, targets = problem(4, 24, 5)
    r = shipped.record_forward(e, c, targets, split=1, splits=2, **DROP)
    assert set(r.of("c").element // 5) == set(range(16, 24))
    m, s = reference.merge(*((r.results["part_max"][i], r.results["part_sum"][i]) for i in range(2)))
    np.testing.assert_allclose(reference.to_lse(m, s), reference.forward(e, c, targets).lse, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 16, 8), (6, 24, 10), (5, 8, 3)])
def test_the_backward_by_hand(shape):
    N, V, D = shape
    e, c, targets = problem(*shape)
    options = {**DROP, "reduction": "sum"}
    p = reference.softmax(reference.logits(e, c))
    right = reference.backward(e, c, targets, reduction="sum")

    walk = shipped.gradient_of_logits(e, c, targets, **options)
    rows = min(BLOCK_N, N)
    columns = sorted({int(v) for v in walk.record.of("c").element // D})
    survive = np.flatnonzero(reference.column_flags(p, targets, EPS, block_n=BLOCK_N)[0])
    assert len(columns) <= BLOCK_V
    assert set(survive[:BLOCK_V]) & set(columns)  # the forward may flag more, so the first tile may end earlier
    assert walk.record.count("c") == BLOCK_V * D
    assert walk.record.count("g", write=True) == rows * len(columns)
    g = walk.record.results["g"][columns, :rows].T
    np.testing.assert_allclose(g, (p - reference.onehot(targets, V))[:rows, columns], atol=1e-5)
    assert {state for n in range(rows) for state in [walk.scene.frames[-1].states["result"][n * V + columns[0]]]} == {"w"}

    for walk, array, right_one in (
        (shipped.gradient_of_e(e, c, targets, **options), "sum", right.e),
        (shipped.gradient_of_c(e, c, targets, **options), "d_c", right.c),
    ):
        assert not walk.record.races()
        found = walk.record.results[array]
        mass = reference.dropped_mass(p, reference.column_filter(p, targets, EPS, block_n=BLOCK_N)).sum()
        assert np.abs(found - right_one).max() <= mass * max(np.abs(e).max(), np.abs(c).max()) + 1e-5
        assert np.abs(found).max() > 0.1
        # One owner: no element is written twice.
        written = walk.record.of(array, write=True).element
        assert len(written) == len(set(written)) == min(BLOCK_N, len(found)) * min(BLOCK_V, D)


@pytest.mark.parametrize("filter_seed", range(3))
def test_the_gradient_of_logits_by_chance(filter_seed):
    """The unbiased filter, which the lessons tell of and do not step through, is one more step of the same kernel."""
    N, V, D = 4, 16, 8
    e, c, targets = problem(N, V, D)
    eps = 0.3  # above most probabilities
    options = {"filter_eps": eps, "filter_seed": filter_seed, "reduction": "sum"}
    record = shipped.gradient_of_logits(e, c, targets, **options).record
    columns = sorted({int(v) for v in record.of("c").element // D})
    p = reference.softmax(reference.logits(e, c))
    draws = reference.draws(1, V, reference.draw_seed(targets, filter_seed))
    (scales,) = reference.roulette(p, targets, eps, draws, block_n=BLOCK_N)
    assert (scales[columns] > 1).any()
    assert (scales == 0).any()
    assert len(columns) == BLOCK_V  # the first tile of what is flagged, in order
    assert set(np.flatnonzero(scales[: columns[-1] + 1])) <= set(columns)
    right = (p - reference.onehot(targets, V)) * scales
    np.testing.assert_allclose(record.results["g"][columns, :N].T, right[:, columns], atol=1e-5)
    assert not record.races()


def test_the_tiles_of_a_gpu_are_the_packages():
    from cce_numba.simt.tiles import GPU_TILES

    assert {name: getattr(GPU_TILES, name) for name in shipped.ON_GPU} == shipped.ON_GPU


def test_source_is_found():
    assert "acc[i, j] += a[i] * b[j]" in shipped.source("accumulate_term")
    assert shipped.source("lse_kernel", "forward").startswith("def lse_kernel(")
    with pytest.raises(ValueError, match="no function"):
        shipped.source("nothing_kernel")
