"""The best entries of each token, out of the two largest logits of each group of entries (`folds.group_maxima`).

A CTA has a token. It deals the groups to 256 stripes, as cards are dealt. Let t be the k-th largest of the stripes' largest
logits. So k entries at least reach t, and an entry can only be one of the k best if its logit does. If the second largest logit
of a group does not reach t, its largest is all that the group may give. If it does, which is rare, the logits of the group are
computed once more, one dot product each.

So nearly all logits that are found here are those of the tiles, to the bit. A dot product is a float32 sum of the same exact
products, added up in another order. It is taken to be no larger than the group's largest logit, so that equal logits stay in
the order of their entries.

Candidates are what may be one of the best. The place of a candidate is the number of those that are better: each thread counts
for candidates of its own.
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
from cce_numba.tensor_core.folds.group_maxima import GROUPS, entry_of
from cce_numba.tensor_core.indexed_dot import make_dot
from cce_numba.tensor_core.problem import matrix_of
from cce_numba.tensor_core.records import I32, I64, GroupMaxima, LogitTerms, Matrix, Tokens
from cce_numba.tensor_core.tokens import token_at

MOST = 64  # entries, for which shared memory has room
_THREADS, _CTAS = 256, 3  # of a CTA; CTAs that a multiprocessor has room for, whose loads hide each other
_STRIPES = 256  # of groups
_CHUNK = 256  # groups that are looked at before candidates are ordered
_ROOM = 512  # for candidates

maximum = arithmetic.maximum


@cuda.jit(device=True, forceinline=True)
def is_better(z: Any, v: Any, other: Any, other_v: Any) -> Any:
    """Whether the logit z of the entry v comes before another entry's."""
    return z > other or (z == other and v < other_v)


@cuda.jit(device=True, forceinline=True)
def lower_bound(first: Any, groups: Any, k: Any, stripes: Any, chosen: Any) -> Any:
    """By a CTA: a number that the largest logits of k groups reach, of at least k groups; see above.

    first: address of the groups' largest logits. stripes: (256,) float32 in shared memory. chosen: (1,) float32 there.
    """
    t, threads = cuda.threadIdx.x, cuda.blockDim.x
    for stripe in range(t, _STRIPES, threads):
        largest = NEGATIVE_INFINITY
        for group in range(stripe, groups, _STRIPES):
            largest = maximum(largest, memory.load_global_f32(first + np.uint64(4 * group)))
        stripes[stripe] = largest
    cuda.syncthreads()
    for stripe in range(t, _STRIPES, threads):
        better, own = np.int32(0), stripes[stripe]
        for other in range(_STRIPES):
            if is_better(stripes[other], other, own, stripe):
                better += np.int32(1)
        if better == k - 1:
            chosen[0] = own
    cuda.syncthreads()
    return chosen[0]


@cuda.jit(device=True, forceinline=True)
def push(z: Any, v: Any, logits: Any, ids: Any, counts: Any) -> None:
    """By a thread: one candidate more."""
    at = cuda.atomic.add(counts, 0, 1)
    logits[at], ids[at] = z, v


@cuda.jit(device=True, forceinline=True)
def put_in_order(k: Any, logits: Any, ids: Any, counts: Any, ordered_logits: Any, ordered_ids: Any) -> None:
    """By a CTA, with a barrier before and one after: of all candidates the k best remain, in order."""
    t, threads, have = cuda.threadIdx.x, cuda.blockDim.x, counts[0]
    for i in range(t, have, threads):
        better, z, v = np.int32(0), logits[i], ids[i]
        for other in range(have):
            if is_better(logits[other], ids[other], z, v):
                better += np.int32(1)
        if better < k:
            ordered_logits[better], ordered_ids[better] = z, v
    cuda.syncthreads()
    for i in range(t, min(have, k), threads):
        logits[i], ids[i] = ordered_logits[i], ordered_ids[i]
    if t == 0:
        counts[0] = min(have, k)
    cuda.syncthreads()


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
        stripes, chosen = cuda.shared.array(_STRIPES, np.float32), cuda.shared.array(1, np.float32)
        logits, ids = cuda.shared.array(_ROOM, np.float32), cuda.shared.array(_ROOM, np.int32)
        ordered_logits, ordered_ids = cuda.shared.array(MOST, np.float32), cuda.shared.array(MOST, np.int32)
        open_groups = cuda.shared.array(_CHUNK, np.int32)  # of a chunk, whose logits are to be computed once more
        counts = cuda.shared.array(2, np.int32)  # candidates; open groups
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
        first = np.int64(position) * maxima.pitch
        best_of, others_of = np.uint64(maxima.best + np.uint64(4 * first)), np.uint64(maxima.others + np.uint64(8 * first))
        if t < 2:
            counts[t] = 0
        cuda.syncthreads()
        threshold = NEGATIVE_INFINITY  # which all groups reach: there are fewer of them than entries are wanted
        if k <= groups:
            threshold = lower_bound(best_of, groups, np.int32(k), stripes, chosen)
        for begin in range(0, groups, _CHUNK):
            some = np.int32(0)
            end: Any = min(begin + _CHUNK, groups)
            for group in range(begin + t, end, threads):
                best = load_f32(best_of + np.uint64(4 * group))
                if best >= threshold:
                    some = np.int32(1)
                    others = np.uint64(others_of + np.uint64(8 * group))
                    v: Any = np.int32(entry_of(group, load_i32(others + np.uint64(4)), n))
                    if load_f32(others) >= threshold:
                        open_groups[cuda.atomic.add(counts, 1, 1)] = group
                    elif v < V:
                        push(best, v, logits, ids, counts)
            if not cuda.syncthreads_or(some):
                continue
            in_order = False
            for i in range(counts[1]):
                if not in_order and counts[0] >= k:
                    put_in_order(k, logits, ids, counts, ordered_logits, ordered_ids)
                    in_order = True
                group, first_v = open_groups[i], np.int32(open_groups[i] // GROUPS * n)
                best = load_f32(best_of + np.uint64(4 * group))
                # Where all logits are alike, nearly all groups are open; those of later entries give nothing then.
                if in_order and is_better(logits[k - 1], ids[k - 1], best, first_v):
                    continue
                in_order = False
                for column in range(warp, columns, warps):
                    v = np.int64(entry_of(group, column, n))
                    if v < V:
                        product = product_of(e, c, c_step_bytes, token, v, D, lane)
                        if lane == 0:
                            found[column] = logit_of(product, terms, token, v)
                cuda.syncthreads()
                place = load_i32(others_of + np.uint64(8 * group + 4))
                for column in range(t, columns, threads):
                    v = np.int32(entry_of(group, column, n))
                    z = best if column == place or not found[column] < best else found[column]
                    if v < V and z >= threshold:
                        push(z, v, logits, ids, counts)
                cuda.syncthreads()
            if counts[0] > _ROOM - _CHUNK:
                put_in_order(k, logits, ids, counts, ordered_logits, ordered_ids)
            cuda.syncthreads()
            if t == 0:
                counts[1] = 0
            cuda.syncthreads()
        put_in_order(k, logits, ids, counts, ordered_logits, ordered_ids)
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
