"""Who computes which tiles: all of them once, in slots of their own, and every worker about as many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from cce_numba.tensor_core import schedule


@dataclass(frozen=True)
class Launch:
    """What `schedule.segment` is asked about."""

    workers: int
    groups: int
    per_round: int
    tiles: int

    def pieces(self, worker):
        """All pieces of work of a worker, as integers: `(group, first, last, step, slot)`."""
        pieces = []
        while (piece := self.piece(len(pieces), worker))[-1] != schedule.NO_SLOT:
            pieces.append(piece)
        return pieces

    def piece(self, index, worker):
        return tuple(map(int, schedule.segment(index, worker, self.workers, self.groups, self.per_round, self.tiles)))

    def slots_of(self, group):
        """As the kernel that merges them walks through them."""
        found = schedule.slots_of(group, self.workers, self.groups, self.per_round, self.tiles)
        first, step, count, extra = map(int, found)
        return [first + i * step for i in range(count)] + ([extra] if extra >= 0 else [])


@st.composite
def launches(draw, most_tiles=60):
    """Up to three rounds and a last one, of up to 80 workers: a GPU has 66 clusters of two CTAs."""
    workers = draw(st.integers(1, 80), label="workers")
    per_round = draw(st.integers(1, workers), label="per_round")
    return Launch(workers, draw(st.integers(0, 4 * per_round)), per_round, draw(st.integers(1, most_tiles)))


LEFT_OVER = Launch(workers=66, groups=32, per_round=33, tiles=50)  # two workers are left over, for the ends of all groups


@given(launch=launches())
@example(launch=LEFT_OVER)
def test_each_tile_is_computed_once(launch):
    times = np.zeros((launch.groups, launch.tiles), int)
    for worker in range(launch.workers):
        for group, first, last, step, _ in launch.pieces(worker):
            assert first >= 0
            assert last <= launch.tiles
            times[group, first:last:step] += 1
    assert (times == 1).all()


@given(launch=launches())
@example(launch=LEFT_OVER)
def test_each_piece_has_a_slot_and_the_merge_finds_them_all(launch):
    written = [[] for _ in range(launch.groups)]
    for worker in range(launch.workers):
        for group, _, _, _, slot in launch.pieces(worker):
            written[group].append(slot)
    slots = [slot for group in written for slot in group]
    assert len(slots) == len(set(slots)), "a slot is written twice"
    assert all(0 <= slot < schedule.count_slots(launch.workers, launch.groups, launch.per_round) for slot in slots)
    for group in range(launch.groups):
        assert sorted(launch.slots_of(group)) == sorted(written[group])


@given(launch=launches())
def test_no_more_slots_for_fewer_tokens(launch):
    """How many tokens count is known on the device alone; the host makes room for all of them."""
    fewer = [schedule.count_slots(launch.workers, groups, launch.per_round) for groups in range(launch.groups + 1)]
    assert fewer == sorted(fewer)


@given(launch=launches())
def test_workers_take_a_groups_tiles_in_turn(launch):
    """So that all of a round are at about the same place in the vocabulary: after i turns, at tile i * step or the next few."""
    for worker in range(launch.workers):
        for index, (group, first, last, step, _) in enumerate(launch.pieces(worker)):
            in_turn, at_the_end = first < step == len(launch.slots_of(group)), step == 1 and last == launch.tiles
            with_an_end = first < step == len(launch.slots_of(group)) - 1
            assert in_turn or with_an_end or at_the_end
            if group < launch.groups // launch.per_round * launch.per_round:
                assert in_turn
                assert group // launch.per_round == index, "all workers are in the same round"


@given(launch=launches())
def test_no_work_is_left_once_there_is_none(launch):
    for worker in range(launch.workers):
        end = len(launch.pieces(worker))
        assert {launch.piece(end + i, worker)[-1] for i in range(5)} == {schedule.NO_SLOT}


@given(launch=launches(most_tiles=2000))
@example(launch=LEFT_OVER)
@example(launch=Launch(workers=66, groups=32, per_round=33, tiles=10))
def test_every_worker_has_about_as_many_tiles(launch):
    """In a full round, as many as its group's tiles divided by the workers that share it, rounded up.

    In the last round a worker has up to a third more than the mean: where there are a little less than two workers for each
    group, those left over take the ends of two groups, a third of the tiles each, and leave the others two thirds where half
    would be fair. Rounding adds at most two tiles: one where the end begins, one where the rest is shared.
    """
    full, rest = divmod(launch.groups, launch.per_round)
    in_full_rounds = -(-launch.tiles // (launch.workers // launch.per_round))
    in_last_round = 4 / 3 * rest * launch.tiles / launch.workers + 2
    for worker in range(launch.workers):
        loads = [len(range(first, last, step)) for _, first, last, step, _ in launch.pieces(worker)]
        rounds = full if worker < launch.workers // launch.per_round * launch.per_round else 0
        assert all(load <= in_full_rounds for load in loads[:rounds])
        assert sum(loads[rounds:]) <= in_last_round


@given(workers=st.integers(1, 200), most=st.integers(0, 300))
@example(workers=66, most=0)  # not even one group's rows of e fit in the cache
def test_groups_of_a_round(workers, most):
    """No worker is idle in a full round, and no more groups at a time would do the same."""
    chosen = schedule.groups_per_round(workers, most)
    assert 1 <= chosen <= max(1, most)
    assert workers % chosen == 0
    assert all(workers % groups for groups in range(chosen + 1, min(most, workers) + 1))


@given(a=st.integers(0, 2**31 - 1), b=st.integers(1, 2**31 - 1))
def test_quotient(a, b):
    assert schedule.quotient(a, b) == a // b
