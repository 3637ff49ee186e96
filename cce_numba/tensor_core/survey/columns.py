"""The survey's first half: which tokens have work, and columns in the order of the blocks that dC needs them for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx import control
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.exponentials import LOG2E
from cce_numba.tensor_core.sums import FULL, THREADS, sum_before, sum_up_to
from cce_numba.tensor_core.survey.tables import CHUNK, COLUMN_TILE, GROUPS, KEYS

WEIGHT_EXPONENT = 13  # the largest weight, scaled, is in [2^13, 2^14)
_LARGEST_EXPONENT = 100  # of the scale, either way, so that it and its inverse are normal numbers
_WORDS = CHUNK // 32


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
            alive_of_word = np.uint32(cuda.ballot_sync(FULL, of_warp[lane] != 0))
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
    return Kernel(weigh_kernel, signature, threads=THREADS)


@kernel_factory
def make_list_kernel(marked: bool = False) -> Kernel:
    """Two tasks that need nothing of each other: CTAs of the first take 8 blocks of tokens each, the others 4096 columns.

    marked: a token may take part though both of its weights are 0.
    """
    list_tokens, list_columns = _make_list_tokens(marked), _make_list_columns()

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
        coarse_words: Any,  # from a word of survivors to that of dC's, 0 if they are the same
        V: Any,
        keys: Any,  # (chunks, 1024) words of 4 keys
        key_counts: Any,  # (chunks, 256)
        pairs: Any,  # (chunks,)
        marks: Any,  # ((N,), not 0 for those that take part) if marked, or ()
    ) -> None:
        """Fills rows, row_of and whole; then keys of columns, how many columns of a chunk have which, surviving pairs."""
        cta = cuda.blockIdx.x
        if cta < token_ctas:
            list_tokens(
                cta, blocks, tokens, n_valid, softmax_weight, target_weight, lse, target_logit, targets, scale, rows,
                row_targets, row_of, whole, marks,
            )  # fmt: skip
        else:
            list_columns(cta - token_ctas, n_valid, alive, survivors, pitch_words, coarse_words, V, keys, key_counts, pairs)

    p_i64, p_i32, p_f32 = pointer_to(np.int64), pointer_to(np.int32), pointer_to(np.float32)
    p_u32, p_u8, i32 = pointer_to(np.uint32), pointer_to(np.uint8), types.int32
    signature = types.void(
        *(i32, i32, p_i32, p_i64, p_f32, p_f32, p_f32, p_f32, p_i64, p_f32, p_f32, p_i32, p_i32, p_u8),
        *(p_u32, p_u32, types.int64, types.int64, i32, p_u32, p_i32, p_i64, types.UniTuple(p_f32, int(marked))),
    )
    return Kernel(list_kernel, signature, threads=THREADS)


def _make_list_tokens(marked: bool) -> Any:
    threads, block_n, log2e, infinity, nan = THREADS, SURVIVOR_BLOCK, LOG2E, np.float32(math.inf), np.float32(math.nan)

    @cuda.jit(device=True, forceinline=True)
    def list_tokens(
        part: Any, blocks: Any, tokens: Any, n_valid: Any, softmax_weight: Any, target_weight: Any, lse: Any,
        target_logit: Any, targets: Any, scale: Any, rows: Any, row_targets: Any, row_of: Any, whole: Any,
        marks: Any,
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
            if x != 0 or y != 0 or (marked and marks[0][n] != 0):
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
        all_next = cuda.all_sync(FULL, is_next)
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


@cuda.jit(device=True, forceinline=True)
def key_of(pattern: Any, survives: Any) -> Any:
    """Of a column that dC needs in this pattern of groups: its place in Gray code, in which neighbours differ in one group.

    0 is left for columns that survive nowhere, 1 for those that dC needs nowhere; for that two neighbours share a key: all
    groups, and all but the last (170 and 171 in Gray code).
    """
    rank = np.uint32(pattern ^ (pattern >> np.uint32(1)))
    rank ^= rank >> np.uint32(2)
    rank ^= rank >> np.uint32(4)
    if rank > 0:
        return np.uint32(rank + np.uint32(1)) if rank < 171 else np.uint32(rank)
    return np.uint32(1) if survives else np.uint32(0)


def _make_list_columns() -> Any:
    block_n, words, chunk_keys, groups, n_keys = SURVIVOR_BLOCK, _WORDS, CHUNK // 4, GROUPS, KEYS

    @cuda.jit(device=True, forceinline=True)
    def list_columns(
        chunk: Any, n_valid: Any, alive: Any, survivors: Any, pitch_words: Any, coarse_words: Any, V: Any, keys: Any,
        key_counts: Any, pairs: Any,
    ) -> None:  # fmt: skip
        """A thread for each group of blocks and word of 32 columns; then for each 4 columns."""
        found = cuda.shared.array((groups, words), np.uint32)  # columns that dC needs somewhere in the group
        found_at_all = cuda.shared.array((groups, words), np.uint32)  # that survive there
        counts, sums = cuda.shared.array(n_keys, np.int32), cuda.shared.array(32, np.int64)
        t = cuda.threadIdx.x
        group, word = t // words, chunk * words + t % words
        n_blocks = (n_valid[0] + block_n - 1) // block_n
        if t < n_keys:
            counts[t] = 0
        bits, bits_at_all, n_pairs = np.uint32(0), np.uint32(0), np.int64(0)
        if 32 * word < V:
            # Those blocks b with b * groups // n_blocks == group.
            for b in range((group * n_blocks + groups - 1) // groups, ((group + 1) * n_blocks + groups - 1) // groups):
                kept = np.uint32(survivors[b * pitch_words + word])
                needed = np.uint32(survivors[b * pitch_words + word + coarse_words])
                if np.uint32(alive[b >> 5]) >> np.uint32(b & 31) & np.uint32(1):
                    bits |= needed
                    bits_at_all |= kept
                    n_pairs += np.int64(cuda.popc(kept))
        found[group, t % words], found_at_all[group, t % words] = bits, bits_at_all
        _, n_pairs = sum_before(n_pairs, sums)
        if t == 0:
            pairs[chunk] = n_pairs
        # Four columns' patterns of groups, a byte each, whose highest bit is the first group's.
        patterns, at_all = np.uint32(0), np.uint32(0)
        for i in range(groups):
            four = found[i, t >> 3] >> np.uint32(4 * (t & 7)) & np.uint32(15)
            # The factor is 1 + 2^7 + 2^14 + 2^21: bit k times 2^(7 k) is the lowest of byte k.
            lowest = np.uint32(four * np.uint32(0x00204081)) & np.uint32(0x01010101)
            patterns |= np.uint32(lowest << np.uint32(groups - 1 - i))
            at_all |= np.uint32(found_at_all[i, t >> 3] >> np.uint32(4 * (t & 7)))
        four_keys = np.uint32(0)
        for i in range(4):
            survives = at_all >> np.uint32(i) & np.uint32(1) != 0
            four_keys |= np.uint32(key_of(patterns >> np.uint32(8 * i) & np.uint32(255), survives) << np.uint32(8 * i))
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
    threads, chunk_columns, n_keys, tile = THREADS, CHUNK, KEYS, COLUMN_TILE
    slices, warps, turns = THREADS // KEYS, THREADS // 32, CHUNK // THREADS

    @cuda.jit(device=True, forceinline=True)
    def key_and_peers(keys: Any, v: Any, V: Any) -> Any:
        """`(key, lanes of the warp with the same)`; past the last column it is none of the keys."""
        key = np.int32(keys[v]) if v < V else np.int32(n_keys)
        return key, np.uint32(cuda.match_any_sync(FULL, key))

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
            _, n_pairs = sum_before(n_pairs, sums)
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
        n_higher, _ = sum_before(n_columns, sums)
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
    return Kernel(order_kernel, signature, threads=THREADS)


@kernel_factory
def make_sort_kernel() -> Kernel:
    """A CTA for each tile of sorted columns, a thread for each column."""
    tile_columns = COLUMN_TILE

    @cuda.jit(device=True, forceinline=True)
    def bit_at(word: Any, v: Any, i: Any) -> Any:
        """Column v's bit of its word, as bit i."""
        return np.uint32((word >> np.uint32(v & 31) & np.uint32(1)) << np.uint32(i))

    @cuda.jit(device=True, forceinline=True)
    def transposed(of_column: Any, lane: Any) -> Any:
        """Lane i gets bits i of the warp's lanes: block i's bits of 32 columns."""
        of_block = np.uint32(0)
        for i in range(32):
            columns = np.uint32(cuda.ballot_sync(FULL, (of_column >> np.uint32(i) & np.uint32(1)) != 0))
            if lane == i:
                of_block = columns
        return of_block

    def sort_kernel(
        order: Any,  # (n_ctiles * 128,)
        survivors: Any,  # (blocks, pitch_words)
        pitch_words: Any,
        coarse_words: Any,  # from a word of survivors to that of dC's, 0 if they are the same
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
        """Fills bits, and how many are set for each tile and block, and for each tile; and live, for dC."""
        words = cuda.shared.array((32, 4), np.uint32)  # of 32 blocks
        needed_words = cuda.shared.array((32, 4), np.uint32)  # the same of what dC needs
        t, tile = cuda.threadIdx.x, cuda.blockIdx.x
        lane, warp, v = t & 31, t >> 5, order[tile * tile_columns + t]
        may_survive, all_survive = v >= 0 and tile < n_live_tiles[0], dense[0] != 0
        n_pairs = np.int32(0)
        for part in range(block_words):
            # Bit i: this thread's column survives in block 32 * part + i.
            of_column = np.uint32(alive[part]) if may_survive else np.uint32(0)
            needed_of_column = of_column
            if may_survive and not all_survive:
                kept, needed = np.uint32(0), np.uint32(0)
                for i in range(32):
                    at = min(32 * part + i, blocks - 1) * pitch_words + (v >> 5)
                    kept |= bit_at(np.uint32(survivors[at]), v, i)
                    needed |= bit_at(np.uint32(survivors[at + coarse_words]), v, i)
                of_column &= kept
                needed_of_column &= needed
            words[lane, warp], needed_words[lane, warp] = transposed(of_column, lane), transposed(needed_of_column, lane)
            cuda.syncthreads()
            b = 32 * part + (t >> 2)
            if b < blocks:
                bits[(b * n_ctiles + tile) * 4 + (t & 3)] = words[t >> 2, t & 3]
            if warp == 0:
                b, count, needed = 32 * part + lane, np.int32(0), np.uint32(0)
                for i in range(4):
                    count += np.int32(cuda.popc(words[lane, i]))
                    needed |= needed_words[lane, i]
                if b < blocks:
                    counts[b * (n_ctiles + 1) + tile] = count
                n_pairs += count
                live_of_part = np.uint32(cuda.ballot_sync(FULL, needed != 0))
                if lane == 0:
                    live[tile * block_words + part] = live_of_part
            cuda.syncthreads()
        if warp == 0:
            n_pairs = sum_up_to(n_pairs)
            if lane == 31:
                tile_pairs[tile] = n_pairs

    p_u32, p_i32, i32 = pointer_to(np.uint32), pointer_to(np.int32), types.int32
    signature = types.void(
        *(p_i32, p_u32, types.int64, types.int64, p_u32, p_i32, p_i32, i32, i32, i32, p_u32, p_u32, p_i32, p_i32),
    )
    return Kernel(sort_kernel, signature, threads=COLUMN_TILE)
