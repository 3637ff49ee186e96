"""Keys of columns: by them the survey sorts columns, so that those which dC needs for the same blocks lie together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.ptx.pointers import view_as
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.sums import sum_before
from cce_numba.tensor_core.survey.tables import CHUNK, KEY_BITS, KEYS

_WORDS = CHUNK // 32


@cuda.jit(device=True, forceinline=True)
def key_of(pattern: Any, survives: Any) -> Any:
    """The key, a uint32 below 256, of a column: its pattern's place in Gray code, in which neighbours differ in one bit.

    pattern: 8 bits, the highest for the first eighth of the blocks: whether dC needs the column for a block of that eighth.
    survives: whether the column survives in any block.

    Key 0 is that of columns which survive nowhere, key 1 that of columns which survive but which dC needs nowhere. To make room
    for key 1, two patterns share a key: that of all eighths, and that of all but the last (places 170 and 171 in Gray code).
    """
    rank = np.uint32(pattern ^ (pattern >> np.uint32(1)))
    rank ^= rank >> np.uint32(2)
    rank ^= rank >> np.uint32(4)
    if rank > 0:
        return np.uint32(rank + np.uint32(1)) if rank < 171 else np.uint32(rank)
    return np.uint32(1) if survives else np.uint32(0)


def make_give_keys() -> Any:
    """The device function by which a CTA gives keys to 4096 columns."""
    block_n, words, chunk_keys, key_bits, n_keys = SURVIVOR_BLOCK, _WORDS, CHUNK // 4, KEY_BITS, KEYS
    as_words = view_as(types.uint32)

    @cuda.jit(device=True, forceinline=True)
    def give_keys(chunk: Any, tokens: Any, survivors: Any, sizes: Any, tables: Any) -> None:
        """Fills keys, key_counts and pairs of the chunk-th 4096 columns.

        At first a thread has an eighth of the blocks and a word of 32 columns, then it has 4 columns.
        """
        words_of, pitch_words, coarse_words = survivors.words, survivors.pitch_words, survivors.coarse_words
        V, keys = sizes.V, as_words(tables.keys)  # of four keys each
        found = cuda.shared.array((key_bits, words), np.uint32)  # columns that dC needs somewhere in the eighth
        found_at_all = cuda.shared.array((key_bits, words), np.uint32)  # columns that survive there
        counts, sums = cuda.shared.array(n_keys, np.int32), cuda.shared.array(32, np.int64)
        t = cuda.threadIdx.x
        eighth, word = t // words, chunk * words + t % words
        n_blocks = (tokens.n_valid[0] + block_n - 1) // block_n
        if t < n_keys:
            counts[t] = 0
        bits, bits_at_all, n_pairs = np.uint32(0), np.uint32(0), np.int64(0)
        if 32 * word < V:
            # The eighth's blocks are those b with b * 8 // n_blocks == eighth.
            first, end = eighth * n_blocks + key_bits - 1, (eighth + 1) * n_blocks + key_bits - 1
            for b in range(first // key_bits, end // key_bits):
                kept = np.uint32(words_of[b * pitch_words + word])
                needed = np.uint32(words_of[b * pitch_words + word + coarse_words])
                if np.uint32(tables.active[b >> 5]) >> np.uint32(b & 31) & np.uint32(1):
                    bits |= needed
                    bits_at_all |= kept
                    n_pairs += np.int64(cuda.popc(kept))
        found[eighth, t % words], found_at_all[eighth, t % words] = bits, bits_at_all
        _, n_pairs = sum_before(n_pairs, sums)
        if t == 0:
            tables.pairs[chunk] = n_pairs
        # The patterns of four columns, a byte each, whose highest bit is the first eighth's.
        patterns, at_all = np.uint32(0), np.uint32(0)
        for i in range(key_bits):
            four = found[i, t >> 3] >> np.uint32(4 * (t & 7)) & np.uint32(15)
            # The factor is 1 + 2^7 + 2^14 + 2^21: bit k of `four` times 2^(7 k) becomes the lowest bit of byte k.
            lowest = np.uint32(four * np.uint32(0x00204081)) & np.uint32(0x01010101)
            patterns |= np.uint32(lowest << np.uint32(key_bits - 1 - i))
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
            tables.key_counts[chunk * n_keys + t] = counts[t]

    return give_keys
