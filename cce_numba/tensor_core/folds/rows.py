"""Numbers of a row on their way between workers: through memory, or from lane to lane. Tuples, written out at compile time."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx import control, memory

shuffle_xor = control.shuffle_xor_f32


@functools.cache
def make_load_numbers(count: int) -> Any:
    """`numbers = load(address, pitch_bytes)`: `count` float32, pitch_bytes apart, that other kernels wrote."""
    if count == 0:
        return _nothing_of_two

    rest, load_f32 = make_load_numbers(count - 1), memory.load_global_f32

    @cuda.jit(device=True, forceinline=True)
    def load(address: Any, pitch_bytes: Any) -> Any:
        """The numbers, `count` float32."""
        return (load_f32(address), *rest(address + np.uint64(pitch_bytes), pitch_bytes))

    return load


@functools.cache
def make_store_numbers(count: int) -> Any:
    """`store(numbers, address, pitch_bytes)`: to global memory, pitch_bytes apart."""
    if count == 0:
        return _nothing_of_three

    rest, store_f32 = make_store_numbers(count - 1), memory.store_global_f32

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, address: Any, pitch_bytes: Any) -> None:
        """Stores the numbers, `count` float32."""
        store_f32(address, numbers[0])
        rest(numbers[1:], address + np.uint64(pitch_bytes), pitch_bytes)

    return store


@functools.cache
def make_load_shared_numbers(count: int, pitch_bytes: int) -> Any:
    """`numbers = load(address)`: `count` float32 of shared memory, pitch_bytes apart."""
    if count == 0:
        return _nothing_of_one

    rest, load_f32, step = make_load_shared_numbers(count - 1, pitch_bytes), memory.load_shared_f32, np.uint32(pitch_bytes)

    @cuda.jit(device=True, forceinline=True)
    def load(address: Any) -> Any:
        """The numbers, `count` float32."""
        return (load_f32(address), *rest(np.uint32(address + step)))

    return load


@functools.cache
def make_store_shared_numbers(count: int, pitch_bytes: int) -> Any:
    """`store(numbers, address)`: to shared memory, pitch_bytes apart."""
    if count == 0:
        return _nothing_of_two

    rest, store_f32, step = make_store_shared_numbers(count - 1, pitch_bytes), memory.store_shared_f32, np.uint32(pitch_bytes)

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, address: Any) -> None:
        """Stores the numbers, `count` float32."""
        store_f32(address, numbers[0])
        rest(numbers[1:], np.uint32(address + step))

    return store


@functools.cache
def make_shuffle_numbers(count: int) -> Any:
    """`numbers = shuffle(numbers, mask)`: those of the lane whose number differs in the bits of the mask."""
    if count == 0:
        return _nothing_of_two

    rest = make_shuffle_numbers(count - 1)

    @cuda.jit(device=True, forceinline=True)
    def shuffle(numbers: Any, mask: Any) -> Any:
        """The other lane's numbers, `count` float32."""
        return (shuffle_xor(numbers[0], mask), *rest(numbers[1:], mask))

    return shuffle


@cuda.jit(device=True, forceinline=True)
def _nothing_of_one(x: Any) -> Any:
    """The end of the recursion: no number is left."""
    return ()


@cuda.jit(device=True, forceinline=True)
def _nothing_of_two(x: Any, y: Any) -> Any:
    """The end of the recursion: no number is left."""
    return ()


@cuda.jit(device=True, forceinline=True)
def _nothing_of_three(x: Any, y: Any, z: Any) -> Any:
    """The end of the recursion: no number is left."""
    return ()
