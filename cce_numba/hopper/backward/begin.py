"""The kernel that comes before all others of a backward."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.hopper import tensor_map
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.tensor_core.records import I32, U64

_THREADS = 1024


@kernel_factory
def make_begin_kernel(has_teacher: bool = False) -> Kernel:
    """One CTA, which writes tensor maps to memory and zeros to counters."""
    threads, words, more_words = _THREADS, tensor_map.WORDS, 2 * tensor_map.WORDS

    def begin_kernel(
        e_map: Any, c_map: Any, g_map: Any, borrowed_map: Any, teacher_maps: Any, maps: Any, counters: Any, n_counters: Any
    ) -> None:  # fmt: skip
        """maps (64,) = e_map, c_map, g_map, borrowed_map of 16 words each, then the 32 of teacher_maps, if there are any.

        counters[:n_counters] = 0.
        """
        t = cuda.threadIdx.x
        if t < words:
            maps[t] = e_map[t]
            maps[words + t] = c_map[t]
            maps[2 * words + t] = g_map[t]
            maps[3 * words + t] = borrowed_map[t]
        if has_teacher and t < more_words:
            maps[4 * words + t] = teacher_maps[t]
        for i in range(t, n_counters, threads):
            counters[i] = np.int32(0)

    a_map = types.UniTuple(U64, tensor_map.WORDS)
    of_teacher = types.UniTuple(U64, 2 * tensor_map.WORDS if has_teacher else 0)
    parameters = a_map, a_map, a_map, a_map, of_teacher, pointer_to(np.uint64), pointer_to(np.int32), I32
    return Kernel(begin_kernel, parameters, threads=_THREADS)
