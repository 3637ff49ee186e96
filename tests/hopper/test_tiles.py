"""Tile sizes that the kernels take, and why others are refused."""

from __future__ import annotations

import dataclasses

import pytest

from cce_numba.hopper.tiles import MAX_SMEM_BYTES, HopperTiles


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"block_n": 64}, "block_n must be 128"),
        ({"block_v": 200}, "block_v must be a multiple of 32, up to 192"),
        ({"block_v": 224}, "block_v must be a multiple of 32, up to 192"),
        ({"block_d": 32}, "block_d must be 64"),
        ({"block_v": 0}, "block_v must be a multiple of 32, up to 192"),
        ({"cluster": 0}, "cluster must be 1 to 4"),
        ({"block_v": 128, "cluster": 8}, "cluster must be 1 to 4"),
        ({"block_v": 160, "cluster": 3}, r"block_v must be a multiple of 8 \* cluster"),
        ({"stages": 3}, "stages must be at least 4"),
        ({"stages": 6}, f"takes 254064 bytes of shared memory, but a CTA has at most {MAX_SMEM_BYTES}: fewer stages"),
    ],
)
def test_sizes_that_do_not_work_are_refused(sizes, reason):
    """The message begins with all sizes."""
    with pytest.raises(ValueError, match=rf"HopperTiles\(block_n=.*\): {reason}"):
        HopperTiles(**sizes)


@pytest.mark.parametrize("block_v", [32, 64, 96, 128, 160, 192])
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_sizes_that_work(block_v, cluster):
    tiles = HopperTiles(block_v=block_v, cluster=cluster, stages=4)
    assert tiles.survivor_block == 128
    assert tiles.group_n == 128 * cluster
    assert tiles.smem_bytes <= MAX_SMEM_BYTES


def test_bytes_and_threads():
    """By hand: 5 stages of 128 + 192 rows of 128 bytes with two barriers each, and one for each consumer."""
    tiles = HopperTiles()
    assert dataclasses.astuple(tiles) == (128, 192, 64, 5, 2)
    assert (tiles.e_bytes, tiles.c_bytes, tiles.stage_bytes) == (16384, 24576, 40960)
    assert tiles.ring_bytes == 5 * (40960 + 16) + 16
    # The ring may begin up to 1023 bytes into what the kernel gets. After it come 8 numbers and a scale for each of 128 rows,
    # and for each consumer a number for each column and one for each row.
    assert tiles.smem_bytes == 1024 + tiles.ring_bytes + 4 * (128 * (8 + 1) + 2 * 192 + 2 * 128)
    assert tiles.threads == 384


def test_registers_are_those_of_a_multiprocessor():
    """What the kernel starts with, at most 65536 in all, must cover what its warpgroups have after the exchange."""
    tiles = HopperTiles()
    at_start = 65536 // tiles.threads // 8 * 8
    assert at_start == 168
    assert 128 * (tiles.producer_registers + tiles.consumers * tiles.consumer_registers) <= tiles.threads * at_start
