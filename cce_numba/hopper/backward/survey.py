"""Survivor bits become a plan of work for the backward, on the device: what each block of tokens keeps, and when its turn is.

Columns of the vocabulary that survive in the same blocks come to lie together, in tiles of 128 sorted columns. Tiles go in
rounds, each with about as many surviving (block, column) pairs as the workspace has slots. Nothing depends on who comes first:
atomics only count.

    weigh    the scale of the weights; blocks with work
    list     each listed token's row; each column's key (which eighths of the blocks it survives in), and how many have which
    order    columns, sorted by key
    sort     survivor bits in that order
    rounds   how many columns of a block come before each tile; the rounds
    slots    where each block's columns go in a round's workspace
    phases   jobs of each phase of the backward
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.hopper.backward.tiles import COLUMN_TILE, K_STEP, LIST_TILE
from cce_numba.hopper.fold import LOG2E
from cce_numba.hopper.launch import Kernel, kernel_factory, pointer_to
from cce_numba.hopper.tiles import SURVIVOR_BLOCK
from cce_numba.plan import ceil_div
from cce_numba.ptx import control

GROUPS = 8  # of blocks, one for each bit of a column's key
WEIGHT_EXPONENT = 13  # the largest weight, scaled, is in [2^13, 2^14)

_THREADS = 1024
_CHUNK = 4096  # columns that a CTA sorts
_WORDS = _CHUNK // 32
_KEYS = 2**GROUPS
_ALIGNMENT_BYTES = 256
_LARGEST_EXPONENT = 100  # of the scale, either way, so that it and its inverse are normal numbers
_FULL = 0xFFFFFFFF


class Tables(NamedTuple):
    """Addresses of what `survey` makes, `blocks` for ceil(N / 128). Sorted columns are numbered j, tiles of 128 of them t."""

    rows: int  # (blocks * 128, 4) float32: softmax_weight * scale, target_weight * scale, lse * log2(e), bits of the target
    row_of: int  # (blocks * 128,) int32: row of e of each listed token, -1 if it has no weight
    whole: int  # (block_words,) uint32: bit b: block b is 128 consecutive rows of e
    alive: int  # (block_words,) uint32: bit b: some token of block b has weight
    scale: int  # (2,) float32: the power of two that weights are multiplied by, and its inverse
    order: int  # (n_ctiles * 128,) int32: the vocabulary's column, -1 past the last
    dense: int  # (1,) int32: 1 if all columns survive in all blocks, or are taken to
    bits: int  # (blocks, n_ctiles * 4) uint32: bit j & 31 of word j >> 5: sorted column j survives in the block
    live: int  # (n_ctiles, block_words) uint32: bit b: some column of the tile survives in block b
    before: int  # (blocks, n_ctiles + 1) int32: columns that survive in the block, in tiles before t
    n_live_tiles: int  # (1,) int32: tiles with a survivor; they are the first
    n_rounds: int  # (1,) int32
    first_tile: int  # (rounds_max + 1,) int32: of each round; n_live_tiles after the last round
    slot0: int  # (rounds_max, blocks + 1) int32: columns, padded to multiples of 64, of blocks before b
    first_g: int  # (rounds_max, blocks + 1) int32: jobs of 192 columns of blocks before b
    phase_end: int  # (2 * rounds_max,) int32: jobs up to the end of each phase
    # What only the survey itself needs.
    n_alive: int  # (1,) int32: blocks with work
    keys: int  # (chunks * 4096,) uint8 for each column
    key_counts: int  # (chunks, 256) int32
    pairs: int  # (chunks,) int64: surviving (block, column) pairs
    tile_pairs: int  # (n_ctiles,) int32


@dataclass(frozen=True)
class SurveyLayout:
    """Sizes of the tables, and their places in one allocation.

    Attributes:
        N, V: of the problem.
        cap: surviving (block, column) pairs of a round, at least those of one tile.
    """

    N: int
    V: int
    cap: int

    def __post_init__(self) -> None:
        if self.cap < max(1, self.blocks * COLUMN_TILE):
            raise ValueError(f"cap must be at least the {self.blocks * COLUMN_TILE} pairs of a tile, got {self.cap}")

    @property
    def blocks(self) -> int:
        """Blocks of tokens, at most."""
        return ceil_div(self.N, SURVIVOR_BLOCK)

    @property
    def block_words(self) -> int:
        """32-bit words with a bit for each block."""
        return ceil_div(self.blocks, 32)

    @property
    def n_ctiles(self) -> int:
        """Tiles of sorted columns."""
        return ceil_div(self.V, COLUMN_TILE)

    @property
    def chunks(self) -> int:
        """CTAs that sort columns."""
        return ceil_div(self.n_ctiles * COLUMN_TILE, _CHUNK)

    @property
    def rounds_max(self) -> int:
        """Rounds, at most."""
        return self.blocks * self.n_ctiles * COLUMN_TILE // self.cap + 1

    @functools.cached_property
    def tables(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """`(dtype, shape)` of each of `Tables`."""
        blocks, block_words, n_ctiles, chunks, rounds = (
            self.blocks, self.block_words, self.n_ctiles, self.chunks, self.rounds_max,
        )  # fmt: skip
        i32, u32, f32 = np.int32, np.uint32, np.float32
        return {
            "rows": (f32, (blocks * SURVIVOR_BLOCK, 4)),
            "row_of": (i32, (blocks * SURVIVOR_BLOCK,)),
            "whole": (u32, (block_words,)),
            "alive": (u32, (block_words,)),
            "scale": (f32, (2,)),
            "order": (i32, (n_ctiles * COLUMN_TILE,)),
            "dense": (i32, (1,)),
            "bits": (u32, (blocks, n_ctiles * COLUMN_TILE // 32)),
            "live": (u32, (n_ctiles, block_words)),
            "before": (i32, (blocks, n_ctiles + 1)),
            "n_live_tiles": (i32, (1,)),
            "n_rounds": (i32, (1,)),
            "first_tile": (i32, (rounds + 1,)),
            "slot0": (i32, (rounds, blocks + 1)),
            "first_g": (i32, (rounds, blocks + 1)),
            "phase_end": (i32, (2 * rounds,)),
            "n_alive": (i32, (1,)),
            "keys": (np.uint8, (chunks * _CHUNK,)),
            "key_counts": (i32, (chunks, _KEYS)),
            "pairs": (np.int64, (chunks,)),
            "tile_pairs": (i32, (n_ctiles,)),
        }

    @functools.cached_property
    def offsets(self) -> Tables:
        """Where each table begins, in bytes, at multiples of 256."""
        return self._offsets_and_end[0]

    @property
    def nbytes(self) -> int:
        """Of all tables."""
        return self._offsets_and_end[1]

    @functools.cached_property
    def _offsets_and_end(self) -> tuple[Tables, int]:
        offsets, end = [], 0
        for name in Tables._fields:
            dtype, shape = self.tables[name]
            offsets.append(end)
            end += ceil_div(math.prod(shape) * np.dtype(dtype).itemsize, _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return Tables(*offsets), end

    def at(self, base: int) -> Tables:
        """Addresses, in an allocation of `nbytes` that begins at base."""
        return Tables(*(base + offset for offset in self.offsets))


# ---- sums over a warp, and over a CTA of 1024 threads


@cuda.jit(device=True, forceinline=True)
def _sum_up_to(x: Any) -> Any:
    """The sum over the warp's lanes up to this one."""
    lane = cuda.threadIdx.x & 31
    for step in (1, 2, 4, 8, 16):
        before = cuda.shfl_up_sync(_FULL, x, step)
        if lane >= step:
            x += before
    return x


@cuda.jit(device=True, forceinline=True)
def _sum_before(x: Any, sums: Any) -> Any:
    """`(sum over the CTA's threads before this one, sum over all)`; sums: 32 int64 numbers in shared memory, for this alone."""
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    up_to = _sum_up_to(x)
    cuda.syncthreads()  # all have read what an earlier call left here
    if lane == 31:
        sums[warp] = up_to
    cuda.syncthreads()
    warps_up_to = _sum_up_to(sums[lane])
    before, total = up_to - x, cuda.shfl_sync(_FULL, warps_up_to, 31)
    warps_before = cuda.shfl_sync(_FULL, warps_up_to, max(warp - 1, 0))
    if warp > 0:
        before += warps_before
    return before, total


# ---- kernels


@kernel_factory
def make_weigh_kernel() -> Kernel:
    """One CTA, which takes 32 blocks at a time, a warp for each."""
    block_n, or_of_warp, max_of_warp = SURVIVOR_BLOCK, control.or_of_warp, control.max_of_warp
    exponent, largest_exponent = 127 + WEIGHT_EXPONENT, _LARGEST_EXPONENT
    infinity = 0x7F800000  # its bits; without the sign, bits of floats are ordered as the numbers are, and NaNs come last

    def weigh_kernel(
        tokens: Any,  # (N,)
        n_valid: Any,  # (1,)
        softmax_weight: Any,  # (N,) bits of float32
        target_weight: Any,  # (N,) bits of float32
        block_words: Any,
        alive: Any,  # (block_words,)
        n_alive: Any,  # (1,)
        scale: Any,  # (2,) bits of float32
    ) -> None:
        """scale[0] * the largest finite weight is in [2^13, 2^14), if a power of two from 2^-100 to 2^100 can do it."""
        of_warp = cuda.shared.array(32, np.uint32)
        t = cuda.threadIdx.x
        lane, warp, n_listed = t & 31, t >> 5, n_valid[0]
        largest, count = np.uint32(0), np.int32(0)
        for word in range(block_words):
            first, bits = (32 * word + warp) * block_n, np.uint32(0)
            for i in range(block_n // 32):
                position = first + 32 * i + lane
                if position < n_listed:
                    n = tokens[position]
                    x, y = np.uint32(softmax_weight[n] & 0x7FFFFFFF), np.uint32(target_weight[n] & 0x7FFFFFFF)
                    bits |= x | y
                    largest = max(largest, x if x < infinity else np.uint32(0), y if y < infinity else np.uint32(0))
            bits = or_of_warp(bits)
            if lane == 0:
                of_warp[warp] = bits
            cuda.syncthreads()
            alive_of_word = np.uint32(cuda.ballot_sync(_FULL, of_warp[lane] != 0))
            if t == 0:
                alive[word] = alive_of_word
            count += np.int32(cuda.popc(alive_of_word))
            cuda.syncthreads()
        largest = max_of_warp(largest)
        if lane == 0:
            of_warp[warp] = largest
        cuda.syncthreads()
        largest = max_of_warp(of_warp[lane])
        if t == 0:
            power = 0
            if largest > 0:
                power = min(max(exponent - int(largest >> np.uint32(23)), -largest_exponent), largest_exponent)
            scale[0] = (127 + power) << 23
            scale[1] = (127 - power) << 23
            n_alive[0] = count

    p_u32, p_i64, p_i32 = pointer_to(np.uint32), pointer_to(np.int64), pointer_to(np.int32)
    signature = types.void(p_i32, p_i64, p_u32, p_u32, types.int32, p_u32, p_i32, p_u32)
    return Kernel(weigh_kernel, signature, threads=_THREADS)


@kernel_factory
def make_list_kernel() -> Kernel:
    """Two tasks that need nothing of each other: CTAs of the first take 8 blocks of tokens each, the others 4096 columns."""
    list_tokens, list_columns = _make_list_tokens(), _make_list_columns()

    def list_kernel(
        token_ctas: Any,
        blocks: Any,
        tokens: Any,  # (N,)
        n_valid: Any,  # (1,)
        softmax_weight: Any,  # (N,)
        target_weight: Any,  # (N,)
        lse: Any,  # (N,)
        target_logit: Any,  # (N,)
        targets: Any,  # (N,)
        scale: Any,  # (2,)
        rows: Any,  # (blocks * 128, 4)
        row_targets: Any,  # the same, as integers
        row_of: Any,  # (blocks * 128,)
        whole: Any,  # (token_ctas,) bytes
        alive: Any,  # (block_words,)
        survivors: Any,  # (blocks, pitch_words)
        pitch_words: Any,
        V: Any,
        keys: Any,  # (chunks, 1024) words of 4 keys
        key_counts: Any,  # (chunks, 256)
        pairs: Any,  # (chunks,)
    ) -> None:
        """Fills rows, row_of and whole; then keys of columns, how many columns of a chunk have which, surviving pairs."""
        cta = cuda.blockIdx.x
        if cta < token_ctas:
            list_tokens(
                cta, blocks, tokens, n_valid, softmax_weight, target_weight, lse, target_logit, targets, scale, rows,
                row_targets, row_of, whole,
            )  # fmt: skip
        else:
            list_columns(cta - token_ctas, n_valid, alive, survivors, pitch_words, V, keys, key_counts, pairs)

    p_i64, p_i32, p_f32 = pointer_to(np.int64), pointer_to(np.int32), pointer_to(np.float32)
    p_u32, p_u8, i32 = pointer_to(np.uint32), pointer_to(np.uint8), types.int32
    signature = types.void(
        *(i32, i32, p_i32, p_i64, p_f32, p_f32, p_f32, p_f32, p_i64, p_f32, p_f32, p_i32, p_i32, p_u8),
        *(p_u32, p_u32, types.int64, i32, p_u32, p_i32, p_i64),
    )
    return Kernel(list_kernel, signature, threads=_THREADS)


def _make_list_tokens() -> Any:
    threads, block_n, log2e, infinity, nan = _THREADS, SURVIVOR_BLOCK, LOG2E, np.float32(math.inf), np.float32(math.nan)

    @cuda.jit(device=True, forceinline=True)
    def list_tokens(
        part: Any, blocks: Any, tokens: Any, n_valid: Any, softmax_weight: Any, target_weight: Any, lse: Any,
        target_logit: Any, targets: Any, scale: Any, rows: Any, row_targets: Any, row_of: Any, whole: Any,
    ) -> None:  # fmt: skip
        """A thread for each of 1024 listed tokens."""
        all_of_warp = cuda.shared.array(32, np.int32)
        t = cuda.threadIdx.x
        position = part * threads + t
        row, target, is_next = np.int32(-1), np.int32(-1), False
        of_softmax, of_target, log_sum = np.float32(0), np.float32(0), infinity
        if position < n_valid[0]:
            n = tokens[position]
            x, y = softmax_weight[n], target_weight[n]
            if x != 0 or y != 0:
                row, given = np.int32(n), targets[n]
                if given == np.int32(given):
                    target = np.int32(given)
                of_softmax, of_target, log_sum = x * scale[0], y * scale[0], lse[n] * log2e
                if target_logit[n] != target_logit[n]:
                    of_softmax = nan  # out of range: this token's gradient is lost
                is_next = position % block_n == 0 or tokens[position - 1] + 1 == n
        if position < blocks * block_n:
            rows[4 * position] = of_softmax
            rows[4 * position + 1] = of_target
            rows[4 * position + 2] = log_sum
            row_targets[4 * position + 3] = target
            row_of[position] = row
        all_next = cuda.all_sync(_FULL, is_next)
        if t & 31 == 0:
            all_of_warp[t >> 5] = 1 if all_next else 0
        cuda.syncthreads()
        if t == 0:
            bits = 0
            for block in range(threads // block_n):
                warps = 0
                for i in range(block_n // 32):
                    warps += all_of_warp[block * (block_n // 32) + i]
                if warps == block_n // 32:
                    bits |= 1 << block
            whole[part] = bits

    return list_tokens


def _make_list_columns() -> Any:
    block_n, words, chunk_keys, groups, n_keys = SURVIVOR_BLOCK, _WORDS, _CHUNK // 4, GROUPS, _KEYS

    @cuda.jit(device=True, forceinline=True)
    def list_columns(
        chunk: Any, n_valid: Any, alive: Any, survivors: Any, pitch_words: Any, V: Any, keys: Any, key_counts: Any, pairs: Any
    ) -> None:
        """A thread for each group of blocks and word of 32 columns; then for each 4 columns."""
        found = cuda.shared.array((groups, words), np.uint32)  # columns that survive somewhere in the group
        counts, sums = cuda.shared.array(n_keys, np.int32), cuda.shared.array(32, np.int64)
        t = cuda.threadIdx.x
        group, word = t // words, chunk * words + t % words
        n_blocks = (n_valid[0] + block_n - 1) // block_n
        if t < n_keys:
            counts[t] = 0
        bits, n_pairs = np.uint32(0), np.int64(0)
        if 32 * word < V:
            # Those blocks b with b * groups // n_blocks == group.
            for b in range((group * n_blocks + groups - 1) // groups, ((group + 1) * n_blocks + groups - 1) // groups):
                kept = np.uint32(survivors[b * pitch_words + word])
                if np.uint32(alive[b >> 5]) >> np.uint32(b & 31) & np.uint32(1):
                    bits |= kept
                    n_pairs += np.int64(cuda.popc(kept))
        found[group, t % words] = bits
        _, n_pairs = _sum_before(n_pairs, sums)
        if t == 0:
            pairs[chunk] = n_pairs
        # Four columns' keys, a byte each, whose highest bit is the first group's.
        four_keys = np.uint32(0)
        for i in range(groups):
            four = found[i, t >> 3] >> np.uint32(4 * (t & 7)) & np.uint32(15)
            # The factor is 1 + 2^7 + 2^14 + 2^21: bit k times 2^(7 k) is the lowest of byte k.
            lowest = np.uint32(four * np.uint32(0x00204081)) & np.uint32(0x01010101)
            four_keys |= np.uint32(lowest << np.uint32(groups - 1 - i))
        keys[chunk * chunk_keys + t] = four_keys
        for i in range(4):
            if 4 * (chunk * chunk_keys + t) + i < V:
                cuda.atomic.add(counts, four_keys >> np.uint32(8 * i) & np.uint32(255), 1)
        cuda.syncthreads()
        if t < n_keys:
            key_counts[chunk * n_keys + t] = counts[t]

    return list_columns


@kernel_factory
def make_order_kernel() -> Kernel:
    """A CTA for each chunk of 4096 columns, a warp for 128 neighbours. Each CTA adds up all chunks' counts for itself."""
    threads, chunk_columns, n_keys, tile = _THREADS, _CHUNK, _KEYS, COLUMN_TILE
    slices, warps, turns = _THREADS // _KEYS, _THREADS // 32, _CHUNK // _THREADS

    @cuda.jit(device=True, forceinline=True)
    def key_and_peers(keys: Any, v: Any, V: Any) -> Any:
        """`(key, lanes of the warp with the same)`; past the last column it is none of the keys."""
        key = np.int32(keys[v]) if v < V else np.int32(n_keys)
        return key, np.uint32(cuda.match_any_sync(_FULL, key))

    def order_kernel(
        keep_all: Any,
        dense_share: Any,  # of all pairs: if more survive, all are taken
        keys: Any,  # (chunks * 4096,)
        key_counts: Any,  # (chunks, 256)
        pairs: Any,  # (chunks,)
        n_alive: Any,  # (1,)
        V: Any,
        n_ctiles: Any,
        order: Any,  # (n_ctiles * 128,)
        dense: Any,  # (1,)
        n_live_tiles: Any,  # (1,)
    ) -> None:
        """order = columns by key, the highest first, those of one key as they come; if all survive, all as they come."""
        placed = cuda.shared.array((warps, n_keys), np.int32)  # counts, then the next column's place
        before_of, total_of = cuda.shared.array((slices, n_keys), np.int32), cuda.shared.array((slices, n_keys), np.int32)
        first_of, sums = cuda.shared.array(n_keys, np.int32), cuda.shared.array(32, np.int64)
        t, chunk, chunks = cuda.threadIdx.x, cuda.blockIdx.x, cuda.gridDim.x
        lane, warp, first_v = t & 31, t >> 5, chunk * chunk_columns
        lanes_before = np.uint32((1 << lane) - 1)
        all_survive = keep_all != 0
        if not all_survive:
            n_pairs = np.int64(0)
            for other in range(t, chunks, threads):
                n_pairs += pairs[other]
            _, n_pairs = _sum_before(n_pairs, sums)
            all_survive = np.float64(n_pairs) > np.float64(dense_share) * np.float64(n_alive[0] * V)
        for v in range(first_v + t, min(first_v + chunk_columns, n_ctiles * tile), threads):
            if v >= V:
                order[v] = -1
            elif all_survive:
                order[v] = v
        if chunk == 0 and t == 0:
            dense[0] = 1 if all_survive else 0
            if all_survive:
                n_live_tiles[0] = n_ctiles if n_alive[0] > 0 else 0
        if all_survive:
            return

        # Columns of each key, in chunks before this one and in all.
        key, part, before, total = t % n_keys, t // n_keys, np.int32(0), np.int32(0)
        for other in range(part, chunks, slices):
            count = key_counts[other * n_keys + key]
            total += count
            if other < chunk:
                before += count
        before_of[part, key], total_of[part, key] = before, total
        for i in range(part, warps, slices):
            placed[i, key] = 0
        cuda.syncthreads()

        # Where this chunk's columns of each key begin. Thread 0 has the highest key.
        key, before, n_columns = n_keys - 1 - t, np.int32(0), np.int64(0)
        if t < n_keys:
            for i in range(slices):
                before += before_of[i, key]
                n_columns += total_of[i, key]
        n_higher, _ = _sum_before(n_columns, sums)
        if t < n_keys:
            first_of[key] = n_higher + before
        if chunk == 0 and t == n_keys - 1:
            n_live_tiles[0] = (n_higher + tile - 1) // tile  # columns of key 0 survive nowhere

        # Where each warp's columns of each key begin.
        for i in range(turns):
            same, peers = key_and_peers(keys, first_v + (warp * turns + i) * 32 + lane, V)
            if same < n_keys and peers & lanes_before == 0:
                placed[warp, same] += np.int32(cuda.popc(peers))
            cuda.syncwarp()
        cuda.syncthreads()
        if t < n_keys:
            first = first_of[t]
            for i in range(warps):
                count = placed[i, t]
                placed[i, t] = first
                first += count
        cuda.syncthreads()

        for i in range(turns):
            v = first_v + (warp * turns + i) * 32 + lane
            same, peers = key_and_peers(keys, v, V)
            first = placed[warp, same] if same < n_keys else np.int32(0)
            cuda.syncwarp()
            if same < n_keys:
                order[first + np.int32(cuda.popc(np.uint32(peers & lanes_before)))] = v
                if peers & lanes_before == 0:
                    placed[warp, same] = first + np.int32(cuda.popc(peers))
            cuda.syncwarp()

    p_u8, p_i32, p_i64, i32 = pointer_to(np.uint8), pointer_to(np.int32), pointer_to(np.int64), types.int32
    signature = types.void(i32, types.float32, p_u8, p_i32, p_i64, p_i32, i32, i32, p_i32, p_i32, p_i32)
    return Kernel(order_kernel, signature, threads=_THREADS)


@kernel_factory
def make_sort_kernel() -> Kernel:
    """A CTA for each tile of sorted columns, a thread for each column."""
    tile_columns = COLUMN_TILE

    def sort_kernel(
        order: Any,  # (n_ctiles * 128,)
        survivors: Any,  # (blocks, pitch_words)
        pitch_words: Any,
        alive: Any,  # (block_words,)
        dense: Any,  # (1,)
        n_live_tiles: Any,  # (1,)
        blocks: Any,
        block_words: Any,
        n_ctiles: Any,
        bits: Any,  # (blocks, n_ctiles * 4)
        live: Any,  # (n_ctiles, block_words)
        counts: Any,  # (blocks, n_ctiles + 1), of which all but the last column
        tile_pairs: Any,  # (n_ctiles,)
    ) -> None:
        """Fills bits, and how many are set for each tile and block, and for each tile."""
        words = cuda.shared.array((32, 4), np.uint32)  # of 32 blocks
        t, tile = cuda.threadIdx.x, cuda.blockIdx.x
        lane, warp, v = t & 31, t >> 5, order[tile * tile_columns + t]
        may_survive, all_survive = v >= 0 and tile < n_live_tiles[0], dense[0] != 0
        n_pairs = np.int32(0)
        for part in range(block_words):
            # Bit i: this thread's column survives in block 32 * part + i.
            of_column = np.uint32(alive[part]) if may_survive else np.uint32(0)
            if may_survive and not all_survive:
                kept = np.uint32(0)
                for i in range(32):
                    b = min(32 * part + i, blocks - 1)
                    word = np.uint32(survivors[b * pitch_words + (v >> 5)])
                    kept |= np.uint32((word >> np.uint32(v & 31) & np.uint32(1)) << np.uint32(i))
                of_column &= kept
            # Transposed: lane i gets block i's bits of this warp's 32 columns.
            of_block = np.uint32(0)
            for i in range(32):
                columns = np.uint32(cuda.ballot_sync(_FULL, (of_column >> np.uint32(i) & np.uint32(1)) != 0))
                if lane == i:
                    of_block = columns
            words[lane, warp] = of_block
            cuda.syncthreads()
            b = 32 * part + (t >> 2)
            if b < blocks:
                bits[(b * n_ctiles + tile) * 4 + (t & 3)] = words[t >> 2, t & 3]
            if warp == 0:
                b, count = 32 * part + lane, np.int32(0)
                for i in range(4):
                    count += np.int32(cuda.popc(words[lane, i]))
                if b < blocks:
                    counts[b * (n_ctiles + 1) + tile] = count
                n_pairs += count
                live_of_part = np.uint32(cuda.ballot_sync(_FULL, count > 0))
                if lane == 0:
                    live[tile * block_words + part] = live_of_part
            cuda.syncthreads()
        if warp == 0:
            n_pairs = _sum_up_to(n_pairs)
            if lane == 31:
                tile_pairs[tile] = n_pairs

    p_u32, p_i32, i32 = pointer_to(np.uint32), pointer_to(np.int32), types.int32
    signature = types.void(p_i32, p_u32, types.int64, p_u32, p_i32, p_i32, i32, i32, i32, p_u32, p_u32, p_i32, p_i32)
    return Kernel(sort_kernel, signature, threads=COLUMN_TILE)


@kernel_factory
def make_rounds_kernel() -> Kernel:
    """A CTA for each block's columns, and one for the rounds."""
    threads = _THREADS

    @cuda.jit(device=True, forceinline=True)
    def sum_counts(before: Any, row: Any, n_ctiles: Any, sums: Any) -> None:
        """In place of a count for each tile of a row, the sum of the counts before it; after the last, the sum of all."""
        t, so_far = cuda.threadIdx.x, np.int64(0)
        for first in range(0, n_ctiles, threads):
            tile = first + t
            earlier, total = _sum_before(np.int64(before[row + tile]) if tile < n_ctiles else np.int64(0), sums)
            if tile < n_ctiles:
                before[row + tile] = so_far + earlier
            so_far += total
        if t == 0:
            before[row + n_ctiles] = so_far

    @cuda.jit(device=True, forceinline=True)
    def cut_rounds(tile_pairs: Any, n_live: Any, cap: Any, rounds_max: Any, n_rounds: Any, first_tile: Any, sums: Any) -> None:
        """A tile is in round T // cap, T the pairs of tiles before it. No tile has more than cap, so no round is empty."""
        t, so_far = cuda.threadIdx.x, np.int64(0)
        for first in range(0, n_live, threads):
            tile = first + t
            earlier, total = _sum_before(np.int64(tile_pairs[tile]) if tile < n_live else np.int64(0), sums)
            if tile < n_live:
                earlier += so_far
                round_ = earlier // cap
                if tile == 0 or (earlier - tile_pairs[tile - 1]) // cap != round_:
                    first_tile[round_] = tile
            so_far += total
        rounds = np.int64(0)
        if n_live > 0:
            rounds = (so_far - tile_pairs[n_live - 1]) // cap + 1
        for round_ in range(rounds + t, rounds_max + 1, threads):
            first_tile[round_] = n_live
        if t == 0:
            n_rounds[0] = max(rounds, 1)

    def rounds_kernel(
        blocks: Any,
        n_ctiles: Any,
        before: Any,  # (blocks, n_ctiles + 1), counts as `sort` leaves them
        tile_pairs: Any,  # (n_ctiles,)
        n_live_tiles: Any,  # (1,)
        cap: Any,
        rounds_max: Any,
        n_rounds: Any,  # (1,)
        first_tile: Any,  # (rounds_max + 1,)
    ) -> None:
        """Fills before, n_rounds and first_tile."""
        sums = cuda.shared.array(32, np.int64)
        b = cuda.blockIdx.x
        if b < blocks:
            sum_counts(before, b * (n_ctiles + 1), n_ctiles, sums)
        else:
            cut_rounds(tile_pairs, n_live_tiles[0], cap, rounds_max, n_rounds, first_tile, sums)

    p_i32, i32 = pointer_to(np.int32), types.int32
    signature = types.void(i32, i32, p_i32, p_i32, p_i32, types.int64, i32, p_i32, p_i32)
    return Kernel(rounds_kernel, signature, threads=_THREADS)


@kernel_factory
def make_slots_kernel() -> Kernel:
    """A CTA for each round."""
    threads, step, list_tile = _THREADS, K_STEP, LIST_TILE

    def slots_kernel(
        blocks: Any,
        n_ctiles: Any,
        before: Any,  # (blocks, n_ctiles + 1)
        n_rounds: Any,  # (1,)
        first_tile: Any,  # (rounds_max + 1,)
        slot0: Any,  # (rounds_max, blocks + 1)
        first_g: Any,  # (rounds_max, blocks + 1)
    ) -> None:
        """Fills the rows of slot0 and first_g that are rounds."""
        sums = cuda.shared.array(32, np.int64)
        t, round_ = cuda.threadIdx.x, cuda.blockIdx.x
        if round_ >= n_rounds[0]:
            return
        first, last, row = first_tile[round_], first_tile[round_ + 1], round_ * (blocks + 1)
        slots, jobs = np.int64(0), np.int64(0)
        for first_block in range(0, blocks, threads):
            b, count = first_block + t, np.int64(0)
            if b < blocks:
                count = np.int64(before[b * (n_ctiles + 1) + last] - before[b * (n_ctiles + 1) + first])
            slots_before, slots_here = _sum_before((count + step - 1) // step * step, sums)
            jobs_before, jobs_here = _sum_before((count + list_tile - 1) // list_tile, sums)
            if b < blocks:
                slot0[row + b], first_g[row + b] = slots + slots_before, jobs + jobs_before
            slots += slots_here
            jobs += jobs_here
        if t == 0:
            slot0[row + blocks], first_g[row + blocks] = slots, jobs

    p_i32, i32 = pointer_to(np.int32), types.int32
    return Kernel(slots_kernel, types.void(i32, i32, p_i32, p_i32, p_i32, p_i32, p_i32), threads=_THREADS)


@kernel_factory
def make_phases_kernel() -> Kernel:
    """One CTA."""
    threads, block_n = _THREADS, SURVIVOR_BLOCK

    def phases_kernel(
        blocks: Any,
        n_valid: Any,  # (1,)
        n_ctiles: Any,
        n_live_tiles: Any,  # (1,)
        n_rounds: Any,  # (1,)
        first_tile: Any,  # (rounds_max + 1,)
        first_g: Any,  # (rounds_max, blocks + 1)
        d_tiles_c: Any,
        d_tiles_e: Any,
        zero_fill: Any,
        phase_end: Any,  # (2 * rounds_max,)
    ) -> None:
        """phase_end = sums of the jobs of G(0), G(1), P(0), G(2), P(1), ..., P(last): logits of a round, its products."""
        sums = cuda.shared.array(32, np.int64)
        t, rounds = cuda.threadIdx.x, np.int64(n_rounds[0])
        e_jobs = (n_valid[0] + block_n - 1) // block_n * d_tiles_e
        n_dead = np.int64(n_ctiles - n_live_tiles[0]) if zero_fill else np.int64(0)
        so_far = np.int64(0)
        for first in range(0, 2 * rounds, threads):
            phase, jobs = first + t, np.int64(0)
            if phase == 0 or (phase % 2 == 1 and phase < 2 * rounds - 1):
                jobs = np.int64(first_g[(phase + 1) // 2 * (blocks + 1) + blocks])
            elif phase < 2 * rounds:
                r = rounds - 1 if phase == 2 * rounds - 1 else phase // 2 - 1
                # The zeros of tiles without survivors are shared out evenly.
                tiles = first_tile[r + 1] - first_tile[r] + (r + 1) * n_dead // rounds - r * n_dead // rounds
                jobs = tiles * d_tiles_c + e_jobs
            before, total = _sum_before(jobs, sums)
            if phase < 2 * rounds:
                phase_end[phase] = so_far + before + jobs
            so_far += total

    p_i32, p_i64, i32 = pointer_to(np.int32), pointer_to(np.int64), types.int32
    signature = types.void(i32, p_i64, i32, p_i32, p_i32, p_i32, p_i32, i32, i32, i32, p_i32)
    return Kernel(phases_kernel, signature, threads=_THREADS)


def survey(
    layout: SurveyLayout,
    base: int,
    *,
    survivors_pointer: int,
    pitch_words: int,
    keep_all: bool,
    dense_share: float,
    tokens: int,
    n_valid: int,
    softmax_weight: int,
    target_weight: int,
    lse: int,
    target_logit: int,
    targets: int,
    d_tiles_c: int,
    d_tiles_e: int,
    zero_fill: bool,
) -> None:
    """Fills the tables of `layout.at(base)`.

    Args:
        layout: of the problem.
        base: address of layout.nbytes bytes, a multiple of 256.
        survivors_pointer: address of (blocks, pitch_words) words of bits; bits of columns past the last are 0. If keep_all, 0.
        pitch_words: at least ceil(V / 32).
        keep_all: all columns survive.
        dense_share: if more than this share of all pairs survives, all are taken.
        tokens, n_valid, lse, target_logit: addresses of what the forward found, see `plan.Statistics`.
        softmax_weight, target_weight: addresses of (N,) float32, see `plan.Backend.backward`.
        targets: address of (N,) int64.
        d_tiles_c, d_tiles_e: jobs for each tile of dC's rows and each block of dE's rows, 0 if it is not wanted.
        zero_fill: whether tiles without survivors are jobs, too.
    """
    table, blocks, block_words, n_ctiles, V = layout.at(base), layout.blocks, layout.block_words, layout.n_ctiles, layout.V
    token_ctas, rounds_max = 4 * block_words, layout.rounds_max
    make_weigh_kernel().launch(
        1, tokens, n_valid, softmax_weight, target_weight, block_words, table.alive, table.n_alive, table.scale
    )
    make_list_kernel().launch(
        token_ctas + (0 if keep_all else layout.chunks),
        token_ctas,
        blocks,
        tokens,
        n_valid,
        softmax_weight,
        target_weight,
        lse,
        target_logit,
        targets,
        table.scale,
        table.rows,
        table.rows,
        table.row_of,
        table.whole,
        table.alive,
        survivors_pointer,
        pitch_words,
        V,
        table.keys,
        table.key_counts,
        table.pairs,
    )
    make_order_kernel().launch(
        layout.chunks,
        keep_all,
        dense_share,
        table.keys,
        table.key_counts,
        table.pairs,
        table.n_alive,
        V,
        n_ctiles,
        table.order,
        table.dense,
        table.n_live_tiles,
    )
    make_sort_kernel().launch(
        n_ctiles,
        table.order,
        survivors_pointer,
        pitch_words,
        table.alive,
        table.dense,
        table.n_live_tiles,
        blocks,
        block_words,
        n_ctiles,
        table.bits,
        table.live,
        table.before,
        table.tile_pairs,
    )
    live_tiles, rounds = table.n_live_tiles, (table.n_rounds, table.first_tile)
    make_rounds_kernel().launch(
        blocks + 1, blocks, n_ctiles, table.before, table.tile_pairs, live_tiles, layout.cap, rounds_max, *rounds
    )
    make_slots_kernel().launch(rounds_max, blocks, n_ctiles, table.before, *rounds, table.slot0, table.first_g)
    make_phases_kernel().launch(
        1, blocks, n_valid, n_ctiles, live_tiles, *rounds, table.first_g, d_tiles_c, d_tiles_e, zero_fill, table.phase_end
    )
