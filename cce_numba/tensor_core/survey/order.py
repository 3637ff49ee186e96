"""The order of columns: by key, the highest first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.kernel import Kernel, kernel_factory
from cce_numba.tensor_core.records import F32, I32
from cce_numba.tensor_core.sums import FULL, THREADS, sum_before
from cce_numba.tensor_core.survey.tables import CHUNK, COLUMN_TILE, KEYS, Sizes, Tables


@kernel_factory
def make_order_kernel() -> Kernel:
    """A CTA for each chunk of 4096 columns, a warp for 128 neighbours. Each CTA adds up the counts of all chunks for itself."""
    threads, chunk_columns, n_keys, tile = THREADS, CHUNK, KEYS, COLUMN_TILE
    slices, warps, turns = THREADS // KEYS, THREADS // 32, CHUNK // THREADS

    @cuda.jit(device=True, forceinline=True)
    def key_and_peers(keys: Any, v: Any, V: Any) -> Any:
        """`(key, lanes of the warp whose columns have the same key)` of column v; the key is n_keys past the last column."""
        key = np.int32(keys[v]) if v < V else np.int32(n_keys)
        return key, np.uint32(cuda.match_any_sync(FULL, key))

    def order_kernel(
        keep_all: Any,  # whether all columns survive
        dense_share: Any,  # if more than this share of all pairs survives, all columns are taken to survive
        sizes: Any,
        tables: Any,
    ) -> None:
        """Fills order, dense and n_live_tiles.

        order holds the columns by key, the highest key first, and columns of one key in the order of the vocabulary. If the
        survey is dense, all columns are in the order of the vocabulary.
        """
        keys, order, V, column_tiles = tables.keys, tables.order, sizes.V, sizes.column_tiles
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
                n_pairs += tables.pairs[other]
            _, n_pairs = sum_before(n_pairs, sums)
            all_survive = np.float64(n_pairs) > np.float64(dense_share) * np.float64(tables.n_active[0] * V)
        for v in range(first_v + t, min(first_v + chunk_columns, column_tiles * tile), threads):
            if v >= V:
                order[v] = -1
            elif all_survive:
                order[v] = v
        if chunk == 0 and t == 0:
            tables.dense[0] = 1 if all_survive else 0
            if all_survive:
                tables.n_live_tiles[0] = column_tiles if tables.n_active[0] > 0 else 0
        if all_survive:
            return

        # Columns of each key are counted, in the chunks before this one and in all chunks.
        key, slice_, before, total = t % n_keys, t // n_keys, np.int32(0), np.int32(0)
        for other in range(slice_, chunks, slices):
            count = tables.key_counts[other * n_keys + key]
            total += count
            if other < chunk:
                before += count
        before_of[slice_, key], total_of[slice_, key] = before, total
        for i in range(slice_, warps, slices):
            placed[i, key] = 0
        cuda.syncthreads()

        # These counts say where this chunk's columns of each key begin. Thread 0 has the highest key.
        key, before, n_columns = n_keys - 1 - t, np.int32(0), np.int64(0)
        if t < n_keys:
            for i in range(slices):
                before += before_of[i, key]
                n_columns += total_of[i, key]
        n_higher, _ = sum_before(n_columns, sums)
        if t < n_keys:
            first_of[key] = n_higher + before
        if chunk == 0 and t == n_keys - 1:
            tables.n_live_tiles[0] = (n_higher + tile - 1) // tile  # columns of key 0 survive nowhere

        # The same is found for each warp's columns of each key.
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

        # Each column goes to its place.
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

    return Kernel(order_kernel, (I32, F32, Sizes, Tables), threads=THREADS)
