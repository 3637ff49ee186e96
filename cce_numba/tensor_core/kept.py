"""Logits that are kept from the forward to the backward, 16 bits each, in the order in which threads have them in registers.

Of a tile of 128 tokens x 192 entries there are the codes of its logits, then a base for each of its tokens: the log-sum-exp of
all that the forward had seen of the token when it kept the tile. A code says how far a logit is below the base, in steps of
2^-10 of a factor of two:

    code = 65535 + round(1024 * log2(e) * (z - base)),   at least 0, which stands for a probability of 0

So a probability is off by a factor of at most 1 + 2^-11.5, unless it is below 2^-64 and becomes 0. Rounding G to bfloat16 costs
a factor of 1 + 2^-9.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx import arithmetic, memory
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.exponentials import LN2, NEGATIVE_INFINITY, fma
from cce_numba.tensor_core.fragment import change_chunks, visit_chunks
from cce_numba.tensor_core.records import F32, U64

TILE_V = 192  # entries of a tile that is kept
STEPS = 1024  # of a factor of two
LARGEST = np.float32(65535)
_CHUNK = 16  # columns of which a thread stores its eight logits at a time, in 16 bytes
CHUNK_BYTES = 16 * 128  # of all threads of a consumer
HALF_BYTES = CHUNK_BYTES * (TILE_V // _CHUNK)  # of 64 tokens
BASES_BYTES = 2 * HALF_BYTES  # from a tile's beginning to its bases
TILE_BYTES = BASES_BYTES + 4 * SURVIVOR_BLOCK

_PER_NAT, _NATS = np.float32(STEPS * math.log2(math.e)), np.float32(math.log(2) / STEPS)
_BIAS = np.float32(2**23)  # a float32 of 2^23 + i, i below 2^23, has i in its lowest bits
_LOW, _HIGH_BITS = np.uint32(0xFFFF), np.uint32(0x4B000000)  # the bits of 2^23

maximum, minimum = arithmetic.maximum, arithmetic.minimum
store, load, bits_of, float_of = (
    memory.store_once_if_4_u32,
    memory.load_once_4_u32,
    arithmetic.bits_of_float,
    arithmetic.float_of_bits,
)


def encode_two(z_0: Any, z_1: Any, base: Any) -> Any:
    """The codes of two logits in a word, the first in its lower half. A NaN becomes 0."""
    code_0 = maximum(fma(z_0 - base, _PER_NAT, LARGEST), np.float32(0))
    code_1 = maximum(fma(z_1 - base, _PER_NAT, LARGEST), np.float32(0))
    low, high = bits_of(minimum(code_0, LARGEST) + _BIAS), bits_of(minimum(code_1, LARGEST) + _BIAS)
    return np.uint32((low & _LOW) | np.uint32(high << np.uint32(16)))


def decode(code: Any, bottom: Any) -> Any:
    """The logit of a code, a uint32. bottom: the logit for which the code would be 0, the base - 65535 / 1024 * log(2)."""
    z = fma(float_of(code | _HIGH_BITS) - _BIAS, _NATS, bottom)
    return z if code != 0 else NEGATIVE_INFINITY


encode_two_on_device, decode_on_device = (cuda.jit(device=True, forceinline=True)(f) for f in (encode_two, decode))


def bytes_of(blocks: int, tiles: int) -> int:
    """Bytes of so many tiles of each block."""
    return blocks * tiles * TILE_BYTES


@functools.cache
def make_store() -> Any:
    """The function `store(z, address, base_0, base_1)` of a fragment of 64 tokens x 192 logits.

    address: of the half's codes, plus 16 * thread. base_0, base_1: of the thread's two rows, float32.
    """
    encode = encode_two_on_device

    def store_chunk(z: Any, first: Any, address: Any, base_0: Any, base_1: Any) -> Any:
        """The 16 columns from `first` on, a tile of whose logits a thread has eight."""
        word_0, word_1 = encode(z[0], z[1], base_0), encode(z[2], z[3], base_1)
        word_2, word_3 = encode(z[4], z[5], base_0), encode(z[6], z[7], base_1)
        at = np.uint64(address + np.uint64(CHUNK_BYTES // _CHUNK * first))
        store(at, word_0, word_1, word_2, word_3, np.uint32(1))
        return np.int32(0)

    return visit_chunks(TILE_V, _CHUNK, store_chunk, U64, F32, F32)


@functools.cache
def make_load() -> Any:
    """The function `z = load(z, address, base_0, base_1)`, by which what `store` stored takes the place of a fragment."""
    decode_one = decode_on_device
    to_bottom = np.float32(float(LARGEST) * float(LN2) / STEPS)

    def load_chunk(z: Any, first: Any, address: Any, base_0: Any, base_1: Any) -> Any:
        """The 16 columns from `first` on."""
        w = load(np.uint64(address + np.uint64(CHUNK_BYTES // _CHUNK * first)))
        bottom_0, bottom_1, half = base_0 - to_bottom, base_1 - to_bottom, np.uint32(16)
        return (
            decode_one(w[0] & _LOW, bottom_0), decode_one(w[0] >> half, bottom_0),
            decode_one(w[1] & _LOW, bottom_1), decode_one(w[1] >> half, bottom_1),
            decode_one(w[2] & _LOW, bottom_0), decode_one(w[2] >> half, bottom_0),
            decode_one(w[3] & _LOW, bottom_1), decode_one(w[3] >> half, bottom_1),
        )  # fmt: skip

    return change_chunks(TILE_V, _CHUNK, load_chunk, U64, F32, F32)
