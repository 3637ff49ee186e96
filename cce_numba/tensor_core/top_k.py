"""The best entries of each token, out of the two largest logits of each group of entries (`folds.group_maxima`).

Let t be the k-th largest of the groups' largest logits. It is no larger than the k-th best logit of all, so an entry can only
be one of the k best if its logit reaches t. If the second largest logit of a group does not reach t, its largest is all that
the group may give. If it does, which is rare, the logits of the group are computed once more, one dot product each.

So nearly all logits that are found here are those of the tiles, to the bit. A dot product is a float32 sum of the same exact
products, added up in another order. It is taken to be no larger than the group's largest logit, so that equal logits stay in
the order of their entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx import arithmetic, memory
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.exponentials import NEGATIVE_INFINITY
from cce_numba.tensor_core.folds.group_maxima import GROUP_BYTES, entry_of
from cce_numba.tensor_core.indexed_dot import make_dot
from cce_numba.tensor_core.problem import matrix_of
from cce_numba.tensor_core.records import I32, I64, GroupMaxima, LogitTerms, Matrix, Tokens
from cce_numba.tensor_core.tokens import token_at

MOST = 64  # entries, for which shared memory has room
_THREADS, _CTAS = 256, 3  # of a CTA; CTAs that a multiprocessor has room for, whose loads hide each other
_BINS = 256  # of eight bits of a key

bits_of_float, float_of_bits = arithmetic.bits_of_float, arithmetic.float_of_bits


@cuda.jit(device=True, forceinline=True)
def key_of(x: Any) -> Any:
    """A uint32 by which float32 numbers are ordered as they are themselves."""
    bits = np.uint32(bits_of_float(x))
    return np.uint32(bits ^ (np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else np.uint32(0x80000000)))


@cuda.jit(device=True, forceinline=True)
def number_of(key: Any) -> Any:
    """The float32 that has the key."""
    return float_of_bits(np.uint32(key ^ (np.uint32(0x80000000) if key >> np.uint32(31) else np.uint32(0xFFFFFFFF))))


@cuda.jit(device=True, forceinline=True)
def insert(z: Any, v: Any, logits: Any, ids: Any, have: Any, k: Any) -> Any:
    """By one thread: puts the logit z of the entry v where it belongs in a list of so many; returns how many it has then."""
    if have == k and not (z > logits[k - 1] or (z == logits[k - 1] and v < ids[k - 1])):
        return have
    place = min(have, k - 1)
    while place > 0 and (z > logits[place - 1] or (z == logits[place - 1] and v < ids[place - 1])):
        logits[place], ids[place] = logits[place - 1], ids[place - 1]
        place -= 1
    logits[place], ids[place] = z, v
    return min(have + 1, k)


@cuda.jit(device=True, forceinline=True)
def kth_largest(first: Any, groups: Any, k: Any, counts: Any, chosen: Any) -> Any:
    """By a CTA: the k-th largest of the largest logits of groups, k at most as many, found eight bits of its key at a time.

    first: address of the first group. counts: (256,) int32 in shared memory. chosen: (2,) int32 in shared memory.
    """
    t, threads = cuda.threadIdx.x, cuda.blockDim.x
    prefix, mask, shift = np.uint32(0), np.uint32(0), np.uint32(32)
    while shift > 0:
        shift = np.uint32(shift - np.uint32(8))
        for i in range(t, _BINS, threads):
            counts[i] = 0
        cuda.syncthreads()
        for i in range(t, groups, threads):
            key = key_of(memory.load_global_f32(first + np.uint64(GROUP_BYTES * i)))
            if key & mask == prefix:
                cuda.atomic.add(counts, np.int32((key >> shift) & np.uint32(_BINS - 1)), 1)
        cuda.syncthreads()
        if t == 0:
            digit = np.int32(_BINS - 1)
            while counts[digit] < k:
                k = np.int32(k - counts[digit])
                digit = np.int32(digit - 1)
            chosen[0], chosen[1] = digit, k
        cuda.syncthreads()
        prefix = np.uint32(prefix | (np.uint32(chosen[0]) << shift))
        mask = np.uint32(mask | (np.uint32(_BINS - 1) << shift))
        k = np.int32(chosen[1])
        cuda.syncthreads()
    return number_of(prefix)


@kernel_factory
def make_best_kernel(n: int, dtype: np.dtype, bias_dtype: np.dtype | None, aligned: bool, scaled: bool) -> Kernel:
    """The kernel for 16-bit `dtype`: a CTA for each token. n: columns of the tiles whose groups have maxima.

    bias_dtype, aligned, scaled: as in `make_indexed_dot_kernel`.
    """
    columns = n // 4
    product_of, logit_of = make_dot(dtype, bias_dtype, aligned, scaled)
    load_i32, load_f32 = memory.load_global_i32, memory.load_global_f32

    def best_kernel(
        e: Matrix,
        c: Matrix,
        c_step_bytes: Any,  # from one number of a row of c to the next
        terms: LogitTerms,
        tokens: Tokens,  # a batch
        maxima: GroupMaxima,  # of the batch
        log_sum: Any,  # (N,): NaN where a token is lost, by row of e
        V: Any,
        D: Any,
        k: Any,
        top_logits: Any,  # (N, k), to be written for the batch's tokens, by row of e
        top_ids: Any,  # (N, k)
    ) -> None:
        """Finds the k largest logits, and which entries' they are; of equal ones those of lower entries."""
        counts, chosen = cuda.shared.array(_BINS, np.int32), cuda.shared.array(2, np.int32)
        near = cuda.shared.array(_THREADS, np.uint8)
        logits, ids = cuda.shared.array(MOST, np.float32), cuda.shared.array(MOST, np.int32)
        found = cuda.shared.array(columns, np.float32)
        t, threads, position = cuda.threadIdx.x, cuda.blockDim.x, np.int32(cuda.blockIdx.x)
        lane, warp, warps = np.int32(t & 31), np.int32(t >> 5), np.int32(max(1, threads >> 5))
        if position >= min(max(tokens.n_valid[0] - tokens.first, 0), tokens.most):
            return
        token, groups = np.int64(token_at(tokens.listed, position)), np.int32(maxima.pitch)
        if log_sum[token] != log_sum[token]:  # any entries, and whatever their logits are, probabilities are NaN
            for i in range(t, k, threads):
                top_logits[token * k + i], top_ids[token * k + i] = np.float32(0), np.int64(i)
            return
        first = np.uint64(maxima.address + np.uint64(GROUP_BYTES * (np.int64(position) * maxima.pitch)))
        threshold = NEGATIVE_INFINITY  # which all groups reach: there are fewer of them than entries are wanted
        if k <= groups:
            threshold = kth_largest(first, groups, np.int32(k), counts, chosen)
        have = np.int32(0)
        for begin in range(0, groups, threads):
            is_near = np.int32(0)
            if begin + t < groups and load_f32(first + np.uint64(GROUP_BYTES * (begin + t))) >= threshold:
                is_near = np.int32(1)
            near[t] = is_near
            if cuda.syncthreads_or(is_near):
                for other in range(min(threads, groups - begin)):
                    if near[other]:
                        group = np.int32(begin + other)
                        address = np.uint64(first + np.uint64(GROUP_BYTES * group))
                        best, place = load_f32(address), load_i32(address + np.uint64(8))
                        gives_one = load_f32(address + np.uint64(4)) < threshold
                        if not gives_one:
                            for i in range(warp, columns, warps):
                                v: Any = np.int64(entry_of(group, i, n))
                                if v < V:
                                    product = product_of(e, c, c_step_bytes, token, v, D, lane)
                                    if lane == 0:
                                        found[i] = logit_of(product, terms, token, v)
                            cuda.syncthreads()
                        if t == 0:
                            for i in range(columns):
                                v = np.int32(entry_of(group, i, n))
                                if i == place and v < V:
                                    have = np.int32(insert(best, v, logits, ids, have, k))
                                elif not gives_one and v < V:
                                    z = found[i] if found[i] < best else best
                                    have = np.int32(insert(z, v, logits, ids, have, k))
                        cuda.syncthreads()
            cuda.syncthreads()
        for i in range(t, k, threads):
            top_logits[token * k + i] = logits[i]
            top_ids[token * k + i] = np.int64(ids[i])

    numbers = pointer_to(np.float32)
    matrices_and_tokens = Matrix, Matrix, I64, LogitTerms, Tokens, GroupMaxima
    parameters = *matrices_and_tokens, numbers, I32, I32, I32, numbers, pointer_to(np.int64)
    return Kernel(best_kernel, parameters, threads=_THREADS, ctas=_CTAS)


def find_best(p: Problem, layout: Any, e: Any, terms: LogitTerms, batch: Tokens, arrays: Any) -> None:
    """Launches what finds the best entries of a batch's tokens, once all of the vocabulary has been seen (`found.Arrays`).

    e: that of p, or a copy in aligned rows.
    """
    bias_dtype, (c_pitch_bytes, c_step_bytes) = None if p.bias is None else np.dtype(p.bias.dtype), p.c.strides
    aligned = matrices.why_not(p.c) is None and p.dtype.itemsize == 2
    kernel = make_best_kernel(layout.tiles.fold_v, p.dtype, bias_dtype, aligned, p.logit_scale is not None)
    kernel.launch(
        batch.most,
        matrix_of(e),
        Matrix(p.c.data.ptr, c_pitch_bytes),
        c_step_bytes,
        terms,
        batch,
        arrays.found.maxima,
        arrays.numbers[arrays.names.index("log_sum")].data.ptr,
        p.V,
        p.D,
        p.options.top_k,
        arrays.top_logits.data.ptr,
        arrays.top_ids.data.ptr,
    )
