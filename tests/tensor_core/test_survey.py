"""The plan of work for the backward: every table against a NumPy model, which small examples check; compiled without a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.launch.kernel import Kernel, pointer_to
from cce_numba.launch.record import kind_of
from cce_numba.tensor_core.records import SurvivorBits, WeightedTokens
from cce_numba.tensor_core.survey import Products, host, survey
from cce_numba.tensor_core.survey.tables import SurveyLayout, Tables, tiles_of_dense_round

KERNELS = ("weigh", "list", "order", "sort", "rounds", "slots", "phases")


@dataclass(frozen=True)
class Inputs:
    """What a survey is told.

    Attributes:
        tokens: (n_valid,) those that are listed.
        survivors: (blocks, V) bool; None if all are kept.
        coarse: (blocks, V) bool, those of the survivors that dC is made for; None if for all.
        softmax_weight, target_weight, max_logit, log_sum, target_logit, targets: (N,).
        jobs: d_tiles_c, d_tiles_e.
        e_gate: whether others leave dE to this survey's jobs, 0 or 1; None if nobody is asked.
    """

    tokens: np.ndarray
    survivors: np.ndarray | None
    softmax_weight: np.ndarray
    target_weight: np.ndarray
    max_logit: np.ndarray
    log_sum: np.ndarray
    target_logit: np.ndarray
    targets: np.ndarray
    dense_share: float = 0.7
    jobs: tuple[int, int] = (3, 2)
    zero_fill: bool = True
    coarse: np.ndarray | None = None
    e_gate: int | None = None


# ---- the model


def words(bits: np.ndarray) -> np.ndarray:
    """(..., n) bool as (..., ceil(n / 32)) uint32, the first bit the lowest."""
    padding = [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 32)]
    return np.ascontiguousarray(np.packbits(np.pad(bits, padding), axis=-1, bitorder="little")).view(np.uint32)


def keys_of(survives: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    """(V,) of columns, by whether they survive somewhere, and by the groups of blocks in which dC is made for them.

    0 for those that survive nowhere, 1 for those that dC needs nowhere; the others by their pattern's place in Gray code, 1 to
    255. One more than that, as far as 170: so there is room for the 1, and 170 and 171 share a key.
    """
    ranks = np.array([bin(x).count("1") & 1 for x in range(256)])  # of each bit: the parity of itself and all higher ones
    places = sum(ranks[patterns >> bit] << bit for bit in range(8))
    return np.where(~survives, 0, np.where(patterns == 0, 1, places + (places < 171)))


def dense_tiles(cap: int, active_blocks: int) -> int:
    """Tiles of a round in which all columns survive: whole threes, which whole lists of 192 columns fill, if there is room."""
    tiles = cap // (128 * active_blocks)
    return max(1, tiles if tiles < 3 else tiles - tiles % 3)


def cut_evenly(layout: SurveyLayout, n_live: int, active_blocks: int, with_e: bool) -> tuple[list[int], int]:
    """Where the rounds of a dense survey begin, and their end; and how many of them, the first ones, borrow memory."""
    tiles, more, n_borrowed = dense_tiles(layout.dense_cap, active_blocks), 0, 0
    if with_e:
        tiles, more = (dense_tiles(cap, active_blocks) for cap in (layout.large_cap, layout.borrowed_cap))
        n_borrowed = min(layout.borrowed_tiles, n_live) // more if more > tiles else 0
    edges = [0]
    while edges[-1] < n_live:
        edges.append(min(n_live, edges[-1] + (more if len(edges) <= n_borrowed else tiles)))
    return edges, n_borrowed


def model(layout: SurveyLayout, x: Inputs) -> dict[str, np.ndarray]:
    """All tables, those of rounds only as far as there are rounds."""
    blocks, column_tiles, V, n_valid = layout.blocks, layout.column_tiles, layout.V, len(x.tokens)
    weights = np.stack([x.softmax_weight, x.target_weight])[:, x.tokens]
    found = {}

    # Tokens.
    sizes = np.abs(weights[np.isfinite(weights)])
    largest = sizes.max(initial=0)
    power = 0 if largest == 0 else np.clip(13 - (np.frexp(largest)[1] - 1), -100, 100)
    found["weight_scale"] = np.array([2.0**power, 2.0**-power], np.float32)
    has_weight = (weights != 0).any(0)
    row_of = np.full(blocks * 128, -1, np.int32)
    row_of[:n_valid][has_weight] = x.tokens[has_weight]
    rows = np.tile(np.array([0, 0, np.inf, 0], np.float32), (blocks * 128, 1))
    rows.view(np.int32)[:, 3] = -1
    log_sums = np.zeros(blocks * 128, np.float32)
    for p, n in enumerate(row_of):
        if n >= 0:
            lost = np.isnan(x.target_logit[n])
            # The shift is rounded, and so are exponentials that have it; a softmax is made of both.
            shift = x.max_logit[n] * np.float32(math.log2(math.e))
            log_sum = (float(x.max_logit[n]) + float(x.log_sum[n])) * np.float64(np.float32(math.log2(math.e))) - float(shift)
            rows[p, 0] = np.nan if lost else x.softmax_weight[n] * found["weight_scale"][0] * np.exp2(-log_sum)
            log_sums[p] = np.nan if lost else log_sum
            rows[p, 1] = x.target_weight[n] * found["weight_scale"][0]
            rows[p, 2] = shift
            if abs(x.targets[n]) < 2**31:
                rows.view(np.int32)[p, 3] = x.targets[n]
    found["rows"], found["log_sums"], found["row_of"] = rows, log_sums, row_of
    in_blocks = row_of.reshape(blocks, 128)
    active = (in_blocks >= 0).any(1)
    whole = (in_blocks >= 0).all(1) & (np.diff(in_blocks, axis=1) == 1).all(1)
    found["active"], found["whole"] = words(active), words(whole)

    # Columns.
    kept = np.repeat(active[:, None], V, axis=1)
    dense = x.survivors is None
    if x.survivors is not None:
        dense = float((kept & x.survivors).sum()) > float(np.float32(x.dense_share)) * float(kept.sum())
        if not dense:
            kept &= x.survivors
    found["dense"] = np.array([dense], np.int32)
    order, needed = np.arange(V), kept
    if not dense:
        if x.coarse is not None:
            needed = kept & x.coarse
        n_blocks = -(-n_valid // 128)
        patterns = np.zeros(V, int)
        for b in range(n_blocks):
            patterns |= needed[b].astype(int) << (7 - b * 8 // n_blocks)
        order = np.argsort(-keys_of(kept.any(0), patterns), kind="stable")
    found["order"] = np.full(column_tiles * 128, -1, np.int32)
    found["order"][:V] = order
    in_order = np.zeros((blocks, column_tiles * 128), bool)
    in_order[:, :V] = kept[:, order]
    found["bits"] = words(in_order)
    counts = in_order.reshape(blocks, column_tiles, 128).sum(2)
    needed_in_order = np.zeros_like(in_order)
    needed_in_order[:, :V] = needed[:, order]
    found["needed"] = words(needed_in_order.reshape(blocks, column_tiles, 128).any(2).T)
    before = np.zeros((blocks, column_tiles + 1), np.int32)
    before[:, 1:] = np.cumsum(counts, axis=1)
    found["before"] = before

    # Rounds.
    n_live, d_tiles_e = int(counts.any(0).sum()), 0 if x.e_gate == 0 else x.jobs[1]
    first_tile, n_borrowed = np.full(layout.rounds_max + 1, n_live, np.int32), 0
    if dense:
        edges, n_borrowed = cut_evenly(layout, n_live, max(1, int(active.sum())), d_tiles_e > 0)
        rounds = max(1, len(edges) - 1)
        first_tile[: len(edges)] = edges
    else:
        round_of = before.sum(0, dtype=np.int64)[:n_live] // layout.cap
        rounds = int(round_of[-1]) + 1 if n_live else 1
        if n_live:
            first_tile[:rounds] = np.searchsorted(round_of, np.arange(rounds))
    found["n_live_tiles"], found["n_rounds"] = np.array([n_live], np.int32), np.array([rounds], np.int32)
    found["n_borrowed"], found["d_tiles_e"] = np.array([n_borrowed], np.int32), np.array([d_tiles_e], np.int32)
    found["first_tile"] = first_tile
    found["first_slot"], found["first_job"] = np.zeros((2, rounds, blocks + 1), np.int32)
    lists = before[:, first_tile[1 : rounds + 1]] - before[:, first_tile[:rounds]]  # (blocks, rounds)
    for r in range(rounds):
        found["first_job"][r, 1:] = np.cumsum(-(-lists[:, r] // 192))
        # In a dense survey a block has the same slots in all rounds of a kind, as in the first of them, which is the longest.
        of = (0 if r < n_borrowed else n_borrowed) if dense else r
        found["first_slot"][r, 1:] = np.cumsum(-(-lists[:, of] // 64) * 64)

    found["first_job"][:, blocks] += found["first_job"][:, blocks] % 2  # pairs of CTAs take jobs

    # Phases.
    def products(r):
        dead = column_tiles - n_live if x.zero_fill else 0
        tiles = first_tile[r + 1] - first_tile[r] + (r + 1) * dead // rounds - r * dead // rounds
        return tiles * x.jobs[0] + -(-n_valid // 128) * d_tiles_e

    logits = found["first_job"][:, blocks]
    jobs = [logits[0]]
    for r in range(1, rounds):
        jobs += [logits[r], products(r - 1)]
    found["phase_end"] = np.cumsum([*jobs, products(rounds - 1)]).astype(np.int32)
    return found


# ---- inputs


def make_inputs(seed, N, V, *, listed=1.0, dead=0.0, density=0.1, coarse=None, **named) -> Inputs:
    """Columns survive with their own probabilities, of `density` on average, and in some blocks more than in others.

    coarse: this share of a column's survivors, on average, is what dC is made for; of every third column nothing is.
    """
    rng = np.random.default_rng(seed)
    tokens = np.flatnonzero(rng.random(N) < listed).astype(np.int32)
    blocks = -(-N // 128)
    survivors = None
    if density is not None:
        of_column = rng.random(V) ** (1 / density - 1) if 0 < density < 1 else np.full(V, density)
        survivors = rng.random((blocks, V)) < of_column * rng.choice([0.5, 1, 1.5], (blocks, 1)) ** (density < 1)
    weights = rng.normal(size=(2, N)).astype(np.float32) / N
    weights[:, rng.random(N) < dead] = 0
    weights[rng.integers(0, 2, N), np.arange(N)] *= rng.random(N) < 0.9  # one of the two may be 0
    z = rng.normal(size=(3, N)).astype(np.float32) * 5
    x = Inputs(tokens, survivors, *weights, *z, rng.integers(0, V, N), **named)
    if coarse is not None and survivors is not None:
        of_column = rng.random(V) ** (1 / coarse - 1) * (np.arange(V) % 3 > 0)
        x = replace(x, coarse=survivors & (rng.random((blocks, V)) < of_column))
    return x


def strange(x: Inputs) -> Inputs:
    """Targets out of range, weights that are no numbers."""
    weights, logits, targets = x.softmax_weight.copy(), x.target_logit.copy(), x.targets.copy()
    weights[x.tokens[:3]] = np.nan, np.inf, -np.inf
    lost = x.tokens[3:9]
    logits[lost], targets[lost] = np.nan, [-1, -(2**40), 2**40, 2**31, 2**31 - 1, 2**20]
    return replace(x, softmax_weight=weights, target_logit=logits, targets=targets)


def rescaled(x: Inputs, factor: float) -> Inputs:
    return replace(x, softmax_weight=x.softmax_weight * np.float32(factor), target_weight=x.target_weight * np.float32(factor))


CASES = {
    # One block, less than a tile; a tile and one column more.
    "tiny": (3, 7, {"density": 0.8, "dense_share": 1.0}, 1),
    "one block": (128, 129, {"density": 0.3}, 1),
    # A chunk of 4096 columns; one column more; three of them. Words of 32 blocks end within a CTA of 8.
    "one chunk": (700, 4096, {"density": 0.08, "listed": 0.9}, 1),
    "a chunk and a column": (257, 4097, {"density": 0.08}, 2),
    "three chunks": (640, 9000, {"density": 0.1, "dead": 0.3}, 1),
    # More than 32 blocks, and more rounds than one or two.
    "many blocks": (33 * 128 + 1, 3000, {"density": 0.07}, 1),
    "many rounds": (384, 60_000, {"density": 0.3}, 1),
    # Past what 1024 threads take at a time: tiles and phases; blocks.
    "many tiles": (200, 200_000, {"density": 0.9, "dense_share": 1.0}, 1),
    "many, many blocks": (1024 * 128 + 1, 200, {"density": 0.1}, 1),
    # Tokens that do not count, or that have no weight.
    "few listed": (700, 1000, {"listed": 0.1}, 1),
    "none listed": (300, 1000, {"listed": 0.0}, 1),
    "none has weight": (300, 1000, {"dead": 1.0}, 1),
    "dead blocks": (700, 1000, {"dead": 0.99}, 1),
    # Nothing survives; nearly all do; all are kept.
    "no survivors": (300, 1000, {"density": 0.0}, 1),
    "dense": (600, 5000, {"density": 0.9, "dead": 0.2}, 1),
    "all survive": (300, 1000, {"density": 1.0, "dense_share": 1.0}, 1),
    "keep all": (700, 5000, {"density": None, "listed": 0.6, "dead": 0.995}, 1),
    "keep all, none listed": (300, 1000, {"density": None, "listed": 0.0}, 1),
    # One round; products that are not wanted.
    "one round": (300, 3000, {}, 100),
    "no products": (300, 3000, {"jobs": (0, 0)}, 1),
    "dC alone, no zeros": (300, 3000, {"jobs": (4, 0), "zero_fill": False}, 1),
    # dC is made for some of what survives, and tiles survive that it does not need; or for nothing.
    "coarse": (1000, 9000, {"density": 0.15, "listed": 0.9, "dead": 0.2, "coarse": 0.4}, 1),
    "coarse, many blocks": (40 * 128 + 1, 5000, {"density": 0.07, "coarse": 0.3}, 1),
    "coarse, dead blocks": (700, 3000, {"dead": 0.99, "density": 0.3, "coarse": 0.4}, 1),
    "coarse, dense": (600, 5000, {"density": 1.0, "dead": 0.2, "coarse": 0.4}, 1),
    "coarse, all patterns": (1024, 60_000, {"density": 0.6, "coarse": 0.5}, 100),
    "coarse, nothing": (300, 1000, {"density": 0.3, "coarse": 1e-9}, 1),
    # Of dense surveys: larger rounds with dE than without, borrowed ones before them, and whether others make dE. How much room
    # each kind of rounds has is in `ROOM`.
    "large": (600, 5000, {"density": None}, 1),
    "large, nearly all survive": (600, 5000, {"density": 0.9, "dead": 0.2}, 1),
    "large, dead blocks": (700, 5000, {"density": None, "listed": 0.6, "dead": 0.995}, 1),
    "dense, dE not wanted": (600, 5000, {"density": None, "jobs": (3, 0)}, 1),
    "dense, gate shut": (600, 5000, {"density": None, "e_gate": 0}, 1),
    "dense, gate open": (600, 5000, {"density": None, "e_gate": 1}, 1),
    "filtered, gate shut": (600, 5000, {"density": 0.2, "e_gate": 0}, 1),
    "filtered, gate open": (600, 5000, {"density": 0.2, "e_gate": 1}, 1),
    "borrowed": (600, 5000, {"density": None}, 1),
    "borrowed, nearly all survive": (600, 5000, {"density": 0.9, "dead": 0.2}, 1),
    "borrowed, dead blocks": (700, 20_000, {"density": None, "listed": 0.6, "dead": 0.995}, 1),
    "borrowed, no larger": (600, 5000, {"density": None}, 1),
    "borrowed, too few rows": (600, 5000, {"density": None}, 1),
    "borrowed, all": (600, 36 * 128, {"density": None}, 1),
    "borrowed, none listed": (300, 5000, {"density": None, "listed": 0.0}, 1),
    "borrowed, filtered": (600, 5000, {"density": 0.3}, 1),
    "borrowed, one tile": (100, 77, {"density": None}, 1),
    "many dense rounds": (100, 1200 * 128 - 5, {"density": None}, 1),
}
# Tiles of all blocks that a round has room for: without dE, with it, borrowed. And the tiles that borrowed rounds may have
# together. For cases that are not listed, the first two are what other rounds have, and nothing is borrowed.
PLENTY = (4, 7, 10, 30)
ROOM = {
    **{name: (4, 7, 0, 0) for name in CASES if name.startswith("large")},
    **{name: PLENTY for name in CASES if name.startswith(("dense, ", "filtered, ", "borrowed"))},
    "borrowed, no larger": (4, 7, 8, 30),
    "borrowed, too few rows": (4, 7, 10, 8),
    "borrowed, all": (4, 7, 10, 40),
    "borrowed, dead blocks": (4, 7, 10, 130),
    "many dense rounds": (1, 1, 2, 100),
}
CHANGES = {
    "strange": strange,
    "tiny weights": lambda x: rescaled(x, 2.0**-120),
    "huge weights": lambda x: rescaled(x, 2.0**125),
    "subnormal weights": lambda x: rescaled(x, 2.0**-135),
}


def layout_of(N: int, V: int, cap: int, *room: int) -> SurveyLayout:
    """room: dense_cap, large_cap, borrowed_cap, borrowed_tiles; the first two are cap unless they are given."""
    return SurveyLayout(N, V, cap, *(room or (cap, cap)))


def make_case(name: str) -> tuple[SurveyLayout, Inputs]:
    if name in CHANGES:
        return layout_of(300, 1000, 3 * 128), CHANGES[name](make_inputs(1, 300, 1000, listed=0.9))
    N, V, named, tiles_of_round = CASES[name]
    tile_pairs = -(-N // 128) * 128
    room = [tile_pairs * tiles for tiles in ROOM[name][:3]] + [ROOM[name][3]] if name in ROOM else []
    return layout_of(N, V, tile_pairs * tiles_of_round, *room), make_inputs(len(name), N, V, **named)


# ---- the model itself


def plain(N: int) -> Inputs:
    """All tokens listed, with weight 1 and zeros for all else."""
    zeros = np.zeros((4, N), np.float32)
    return Inputs(np.arange(N, dtype=np.int32), None, np.ones(N, np.float32), *zeros, np.zeros(N, np.int64))


def test_keys_are_places_in_gray_code():
    """In which one bit is different of neighbours. Two patterns, of many groups, share a key."""
    places = np.arange(256)
    patterns = places ^ (places >> 1)
    assert patterns[[0, 1, 2, 3, 170, 171, 255]].tolist() == [0b0, 0b1, 0b11, 0b10, 0b11111111, 0b11111110, 0b10000000]
    np.testing.assert_array_equal(np.bitwise_count(patterns[1:] ^ patterns[:-1]), 1)
    assert keys_of(np.ones(256, bool), patterns).tolist() == [*range(1, 172), *range(171, 256)]
    assert keys_of(np.zeros(2, bool), np.zeros(2, int)).tolist() == [0, 0]


def test_columns_that_survive_in_the_same_blocks_lie_together():
    """Two blocks, groups 0 and 4 of 8: 0x80 for column 4, 0x88 for 1, 0x08 for 2, 0 for the others, in Gray code's order."""
    survivors = np.zeros((2, 6), bool)
    survivors[0, [1, 4]] = survivors[1, [1, 2]] = True
    found = model(layout_of(256, 6, 256), replace(plain(256), survivors=survivors))
    assert found["order"][:8].tolist() == [4, 1, 2, 0, 3, 5, -1, -1]
    assert found["bits"].tolist() == [[0b011, 0, 0, 0], [0b110, 0, 0, 0]]
    assert found["needed"].tolist() == [[0b11]]
    assert found["before"].tolist() == [[0, 2], [0, 2]]
    assert found["first_tile"].tolist() == [0, 1]
    assert found["first_slot"].tolist() == [[0, 64, 128]]
    assert found["first_job"].tolist() == [[0, 1, 2]]
    assert found["phase_end"].tolist() == [2, 2 + 3 + 2 * 2], "two lists of logits; one tile of dC, two blocks of dE"
    assert found["whole"].tolist() == found["active"].tolist() == [0b11]
    assert found["weight_scale"].tolist() == [2.0**13, 2.0**-13]


def test_columns_are_sorted_by_what_dc_needs():
    """Then come those that it does not need, then those that survive nowhere. The rest knows what survives alone."""
    survivors, coarse = np.zeros((2, 400), bool), np.zeros((2, 400), bool)
    survivors[:, 50:350] = True
    survivors[1, 300:350] = False
    coarse[0, 60:160] = coarse[1, 150:200] = True
    inputs = replace(plain(256), survivors=survivors, coarse=coarse)
    found = model(layout_of(256, 400, 256), inputs)
    order = [*range(60, 160), *range(160, 200), *range(50, 60), *range(200, 350), *range(50), *range(350, 400)]
    order = [*range(60, 150), *range(150, 160), *order[100:]]  # 0x80, 0x88, 0x08, 0 that survive, 0 that do not
    assert found["order"].tolist() == [*order, *[-1] * 112]
    assert found["needed"].tolist() == [[0b11], [0b10], [0b00], [0b00]]
    assert found["n_live_tiles"] == [3]
    assert found["before"].tolist() == [[0, 128, 256, 300, 300], [0, 128, 250, 250, 250]]
    in_order = survivors[:, order]
    np.testing.assert_array_equal(found["bits"], words(np.pad(in_order, ((0, 0), (0, 112)))))
    everything = model(layout_of(256, 400, 256), replace(inputs, dense_share=0.5))
    assert everything["dense"] == [1]
    assert everything["needed"].tolist() == [[0b11]] * 4


def test_rounds_and_phases():
    """Four tiles, all of them live, and room for one at a time. Its one job for G is two, for a pair of CTAs."""
    found = model(layout_of(128, 512, 128), replace(plain(128), jobs=(2, 1)))
    assert found["dense"] == [1]
    assert found["order"].tolist() == list(range(512))
    assert found["n_rounds"] == [4]
    assert found["first_tile"].tolist() == [0, 1, 2, 3, 4]
    assert found["first_slot"].tolist() == [[0, 128]] * 4
    #                      G(0), G(1), P(0), G(2), P(1), G(3), P(2), P(3)
    jobs = np.cumsum([2, 2, 3, 2, 3, 2, 3, 3])
    assert found["phase_end"].tolist() == jobs.tolist()


def test_tiles_without_survivors_are_shared_out():
    """Five tiles, of which 200 columns fill one and a half; the three others go to the two rounds as one and two."""
    survivors = np.zeros((1, 640), bool)
    survivors[0, 7:207] = True
    found = model(layout_of(128, 640, 128), replace(plain(128), survivors=survivors, jobs=(1, 0)))
    assert found["order"][:202].tolist() == [*range(7, 207), 0, 1]
    assert (found["n_live_tiles"], found["n_rounds"]) == ([2], [2])
    assert found["before"].tolist() == [[0, 128, 200, 200, 200, 200]]
    assert found["first_slot"].tolist() == [[0, 128], [0, 128]]
    assert found["phase_end"].tolist() == np.cumsum([2, 2, 1 + 1, 1 + 2]).tolist()


def test_rounds_of_a_dense_survey():
    """Eleven tiles, the last of 100 columns; two blocks. Borrowed memory has a round of six; then come threes, and a rest."""
    layout = layout_of(256, 10 * 128 + 100, 256, 256 * 2, 256 * 5, 256 * 6, 10)
    found = model(layout, replace(plain(256), jobs=(1, 2)))
    assert (found["n_rounds"], found["n_borrowed"], found["d_tiles_e"]) == ([3], [1], [2])
    assert found["first_tile"].tolist() == [0, 6, 9, *[11] * 9]
    # Two lists of six tiles, of three, of two whose slots are those of three.
    assert found["first_slot"].tolist() == [[0, 768, 1536], [0, 384, 768], [0, 384, 768]]
    assert found["first_job"].tolist() == [[0, 4, 8], [0, 2, 4], [0, 2, 4]]
    assert found["phase_end"].tolist() == np.cumsum([8, 4, 6 + 2 * 2, 4, 3 + 2 * 2, 2 + 2 * 2]).tolist()
    without = model(layout, replace(plain(256), jobs=(1, 2), e_gate=0))
    assert (without["n_rounds"], without["n_borrowed"], without["d_tiles_e"]) == ([6], [0], [0])
    assert without["first_tile"].tolist()[:7] == [0, 2, 4, 6, 8, 10, 11]
    assert without["first_slot"].tolist() == [[0, 256, 512]] * 6
    assert without["first_job"][:, -1].tolist() == [4] * 5 + [2]
    for e_gate in (None, 1):
        np.testing.assert_array_equal(model(layout, replace(plain(256), jobs=(1, 2), e_gate=e_gate))["n_borrowed"], [1])


@given(cap=st.integers(128, 2**31), blocks=st.integers(1, 3000))
def test_tiles_of_dense_rounds(cap, blocks):
    """The model's and the package's are the same. They fit, and whole lists fill them if they are three or more."""
    tiles = tiles_of_dense_round(cap, blocks)
    assert tiles == dense_tiles(cap, blocks)
    if cap >= 128 * blocks:
        assert cap - 3 * 128 * blocks < 128 * blocks * tiles <= cap
    assert tiles in (1, 2) or 128 * tiles % 192 == 0
    assert tiles_of_dense_round(cap + 1, blocks) >= tiles >= tiles_of_dense_round(cap, blocks + 1)


def test_rows_of_tokens():
    x = plain(256)
    x.softmax_weight[:] = 0.25
    x.softmax_weight[2] = 0
    x.target_logit[5] = np.nan
    x.targets[4:6] = 77, 2**40
    x.max_logit[4] = 1
    x.log_sum[6] = math.log(4)
    tokens = np.delete(x.tokens, 100)
    found = model(layout_of(256, 512, 256), replace(x, tokens=tokens))
    assert found["weight_scale"].tolist() == [2.0**15, 2.0**-15]
    assert found["rows"][4, :3].tolist() == [2.0**13, 0, np.float32(math.log2(math.e))]
    np.testing.assert_allclose(found["rows"][6, 0], 2.0**11, rtol=1e-6)
    assert found["rows"].view(np.int32)[:8, 3].tolist() == [0, 0, -1, 0, 77, -1, 0, 0]
    assert found["rows"][[2, 255], :3].tolist() == [[0, 0, np.inf]] * 2
    assert np.isnan(found["rows"][5, 0])
    assert found["row_of"][[0, 2, 99, 100, 254, 255]].tolist() == [0, -1, 99, 101, 255, -1]
    assert found["whole"] == [0], "one token has no weight, one is not listed"
    assert found["active"] == [0b11]


# ---- the host's side


@pytest.mark.parametrize("name", [*CASES, *CHANGES])
def test_tables_hold_what_the_model_says(name):
    layout, x = make_case(name)
    found = model(layout, x)
    assert int(found["n_rounds"][0]) <= layout.rounds_max
    survives = np.flatnonzero(np.diff(found["before"], axis=1).any(0))
    assert np.array_equal(survives, np.arange(found["n_live_tiles"][0])), "tiles with survivors are first"
    needed = np.flatnonzero(found["needed"].any(1))
    assert np.array_equal(needed, np.arange(len(needed))), "and of these, what dC needs"
    assert len(needed) <= len(survives)
    assert len(needed) == len(survives) or x.coarse is not None
    for table, expected in found.items():
        dtype, shape = layout.tables[table]
        assert expected.dtype == dtype
        assert all(have <= room for have, room in zip(expected.shape, shape, strict=True))
    counts = found["first_slot"][:, -1]
    if found["dense"][0]:
        n_borrowed, cap = int(found["n_borrowed"][0]), layout.large_cap if found["d_tiles_e"][0] else layout.dense_cap
        assert counts[:n_borrowed].max(initial=0) <= layout.borrowed_cap
        assert counts[n_borrowed:].max(initial=0) <= cap
        assert found["first_tile"][n_borrowed] <= layout.borrowed_tiles or n_borrowed == 0
    else:
        assert counts.max() <= layout.cap + layout.blocks * (128 + 63), "a round's last tile may pass the capacity"


def test_cases_are_what_they_are_called():
    """So that no case of the list is another one in disguise."""
    found = {name: model(*make_case(name)) for name in CASES}
    dense = {"dense", "coarse, dense", "keep all", "keep all, none listed", "many dense rounds"}
    dense |= {name for name in ROOM if name.startswith(("large", "dense", "borrowed"))} - {"borrowed, filtered"}
    assert {name for name in CASES if found[name]["dense"][0]} == dense
    assert {name: int(found[name]["n_borrowed"][0]) for name in CASES if found[name]["n_borrowed"][0]} == {
        "dense, gate open": 3,
        "borrowed": 3,
        "borrowed, nearly all survive": 3,
        "borrowed, dead blocks": 2,
        "borrowed, all": 4,
        "many dense rounds": 50,
    }
    sizes = {name: np.diff(found[name]["first_tile"][: found[name]["n_rounds"][0] + 1]).tolist() for name in ROOM}
    assert sizes["dense, gate shut"] == sizes["dense, dE not wanted"] == [3] * 13 + [1]
    assert sizes["large"] == sizes["borrowed, no larger"] == sizes["borrowed, too few rows"] == [6] * 6 + [4]
    assert sizes["dense, gate open"] == sizes["borrowed"] == [9] * 3 + [6] * 2 + [1]
    assert sizes["borrowed, all"] == [9] * 4
    assert sizes["large, dead blocks"][0] > 6
    assert len(sizes["many dense rounds"]) > 1024
    assert found["filtered, gate shut"]["d_tiles_e"][0] == 0 < found["filtered, gate open"]["d_tiles_e"][0]
    assert found["many rounds"]["n_rounds"][0] > 32
    assert min(found["many tiles"]["n_live_tiles"][0], 2 * found["many tiles"]["n_rounds"][0]) > 1024
    assert found["tiny"]["n_live_tiles"][0] == 1
    assert found["one round"]["n_rounds"][0] == 1
    for name in ("none listed", "none has weight", "no survivors", "keep all, none listed", "borrowed, none listed"):
        assert found[name]["n_live_tiles"][0] == 0
    for name in ("dead blocks", "coarse, dead blocks", "large, dead blocks", "borrowed, dead blocks"):
        assert 0 < found[name]["active"][0] < 2**6 - 1
    needed = {name: found[name]["needed"].any(1).sum() / found[name]["n_live_tiles"][0] for name in CASES if "coarse" in name}
    assert {name for name in needed if 0 < needed[name] < 0.9} == set(needed) - {"coarse, dense", "coarse, nothing"}
    assert needed["coarse, nothing"] == 0
    for name in ("coarse", "coarse, many blocks", "coarse, dead blocks", "coarse, all patterns"):
        layout, x = make_case(name)
        plain_live = model(layout, replace(x, coarse=None))["needed"]
        assert np.bitwise_count(found[name]["needed"]).sum() < np.bitwise_count(plain_live).sum()
    assert any(table["whole"].any() for table in found.values())


def test_places_of_tables():
    layout = layout_of(1000, 5000, 8 * 128)
    assert list(layout.tables) == list(Tables._fields)
    assert kind_of(Tables).types == tuple(pointer_to(dtype) for dtype, _ in layout.tables.values())
    ends = [0]
    for (dtype, shape), offset in zip(layout.tables.values(), layout.offsets, strict=True):
        assert offset % 256 == 0
        assert ends[-1] <= offset < ends[-1] + 256
        ends.append(offset + math.prod(shape) * np.dtype(dtype).itemsize)
    assert ends[-1] <= layout.nbytes < ends[-1] + 256
    assert layout.at(2**40) == Tables(*(2**40 + offset for offset in layout.offsets))


def test_a_round_holds_a_tile():
    with pytest.raises(ValueError, match="at least the 1024 pairs of a tile, got 1023"):
        layout_of(1000, 5000, 1023)


@pytest.mark.parametrize(("keep_all", "coarse_rows"), [(False, 0), (False, 1024), (True, 0)])
def test_launches_are_few_and_take_these_arguments(monkeypatch, keep_all, coarse_rows):
    grids = {}

    def launch(kernel, ctas, *values):
        kernel.layout.pack(*kernel._numbers(values))  # raises if they are too many, too few, or too large
        grids[kernel.function.__name__] = ctas

    monkeypatch.setattr(Kernel, "launch", launch)
    layout = layout_of(131_072, 500_000, 2**24, 2**25, 2**26, 2**27, 1000)
    tokens = WeightedTokens(**dict.fromkeys(WeightedTokens.declared, 2**40))
    survivors = None
    if not keep_all:
        survivors = SurvivorBits(words=2**40, pitch_words=15_630, coarse_words=15_630 * coarse_rows)
    products = Products(d_tiles_c=9, d_tiles_e=9, zero_fill=True, e_gate=2**42)
    survey(layout, 2**41, tokens=tokens, survivors=survivors, dense_share=0.7, products=products, dense=2**43)
    assert list(grids) == [f"{name}_kernel" for name in KERNELS]
    assert grids["list_kernel"] == 1024 // 8 + (0 if keep_all else -(-500_000 // 4096))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile(name):
    kernel = getattr(host, f"make_{name}_kernel")()
    compiled = offline.compile_hopper(kernel)
    assert compiled.spilled_bytes == compiled.stack_bytes == 0
    assert compiled.notices == []
    assert compiled.count(r"call(\.uni)?") == 0
    assert compiled.registers <= 65536 // kernel.threads
    assert compiled.smem_bytes <= 48 * 1024
    assert compiled.count(r"(atom|red)\.\S*global\S*") == 0, "no order of arrival"


# ---- on a GPU


@pytest.fixture(scope="module")
def hopper(request):
    request.getfixturevalue("gpu")
    from tests.helpers.harness import HopperHarness

    if reason := HopperHarness.why_not():
        pytest.skip(reason)


def survey_on_gpu(layout: SurveyLayout, x: Inputs) -> dict[str, np.ndarray]:
    """All tables, as they are left in memory that held other things before."""
    import cupy

    gate, said = cupy.full(1, x.e_gate or 0, np.int32), cupy.full(1, -1, np.int32)
    base = cupy.full(layout.nbytes, 0xFF, np.uint8)
    named = ("softmax_weight", "target_weight", "max_logit", "log_sum", "target_logit")
    arrays = {name: getattr(x, name) for name in named}
    arrays["listed"] = np.pad(x.tokens, (0, layout.N - len(x.tokens)), constant_values=2**30)  # nobody reads those
    arrays["n_valid"], arrays["targets"] = np.array([len(x.tokens)]), x.targets.astype(np.int64)
    arrays = {name: cupy.asarray(array) for name, array in arrays.items()}
    pointers = {name: array.data.ptr for name, array in arrays.items()}
    bits = None
    if x.survivors is not None:
        planes = [words(plane) for plane in (x.survivors, x.coarse) if plane is not None]
        for plane in planes:
            plane[-(-len(x.tokens) // 128) :] = 0x55555555  # nor these
        both = np.concatenate(planes)
        survivors = cupy.asarray(np.pad(both, ((0, 0), (0, 3)), constant_values=2**32 - 1))  # nor what is past the last
        pitch_words = survivors.shape[1]
        coarse_words = 0 if x.coarse is None else layout.blocks * pitch_words
        bits = SurvivorBits(words=survivors.data.ptr, pitch_words=pitch_words, coarse_words=coarse_words)
    survey(
        layout,
        base.data.ptr,
        tokens=WeightedTokens(**pointers, largest_weight=pointers["softmax_weight"]),
        survivors=bits,
        dense_share=x.dense_share,
        products=Products(*x.jobs, x.zero_fill, 0 if x.e_gate is None else gate.data.ptr),
        dense=said.data.ptr,
    )
    found = tables_of(layout, base.get())
    assert said.get().tolist() == found["dense"].tolist()
    return found


def tables_of(layout: SurveyLayout, memory: np.ndarray) -> dict[str, np.ndarray]:
    """The tables in an allocation, by name."""
    found = {}
    for name, offset in layout.offsets._asdict().items():
        dtype, shape = layout.tables[name]
        found[name] = memory[offset:][: math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
    return found


def check_tables(layout: SurveyLayout, found: dict[str, np.ndarray], x: Inputs) -> None:
    """Every table is the model's, to the bit; but for weights of softmaxes, of which each has an exponential."""
    for name, expected in model(layout, x).items():
        got = found[name]
        if name in ("first_slot", "first_job", "phase_end"):  # as far as there are rounds
            got = got[: len(expected)]
        if name == "rows":
            # Its exponent, of up to 40, is rounded to 24 bits.
            np.testing.assert_allclose(got[:, 0], expected[:, 0], rtol=2.0**-17)
            np.testing.assert_array_equal(got.view(np.int32)[:, 3], expected.view(np.int32)[:, 3])
            got, expected = got[:, 1:3], expected[:, 1:3]
        if name == "log_sums":  # of which that exponential is made
            np.testing.assert_allclose(got, expected, rtol=2.0**-22, atol=2.0**-20)
            continue
        np.testing.assert_array_equal(got, expected, err_msg=name, strict=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, *CHANGES])
def test_tables_are_the_models(hopper, name):
    layout, x = make_case(name)
    check_tables(layout, survey_on_gpu(layout, x), x)


@pytest.mark.gpu
def test_the_same_tables_each_time(hopper):
    layout, x = make_case("many rounds")
    first, second = survey_on_gpu(layout, x), survey_on_gpu(layout, x)
    for name in Tables._fields:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
