"""A student's head and a teacher's, chunk by chunk of the vocabulary: what `cce_numba.distillation` asks of a backend.

For each chunk the teacher's logits are computed first, and left in the workspace as logarithms of probabilities. Forward, the
student's follow, and both are summed up to each token's divergence. Backward, the student's logits turn them into G, the
gradient of the loss with respect to these, where they are; all else is as in `backward`. Gradients are exact: nothing is
filtered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from cce_numba import backend
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics
from cce_numba.gpu import SIMULATED
from cce_numba.integers import ceil_div
from cce_numba.launch.array_kernel import ArrayKernel, argument
from cce_numba.launch.divergence import Divergence, functions
from cce_numba.launch.inlined import slope_of_cap
from cce_numba.launch.kernel import kernel_factory
from cce_numba.simt import backward as backward_kernels
from cce_numba.simt.logits import make_products_tile, make_terms
from cce_numba.simt.numbers import conversions, real_of
from cce_numba.simt.product import make_product
from cce_numba.simt.records import LogitTerms, Tokens, bias_dtype_of
from cce_numba.simt.staging import ALIGNMENT, Operand
from cce_numba.simt.tiles import SimtTiles, choose_tiles

_PARTS = 2 if SIMULATED else 32  # of a chunk, whose sums threads of their own make, and which are then added up
_THREADS = 4 if SIMULATED else 128


@dataclass(frozen=True, eq=False)
class Head:
    """A head and what its forward found."""

    problem: Problem
    statistics: Statistics

    def found(self) -> Of:
        """As kernels take it."""
        statistics, p = self.statistics, self.problem
        return Of(p.e, p.c, LogitTerms.of(p), statistics.max_logit, statistics.log_sum)

    def tokens(self) -> Tokens:
        """As kernels take them."""
        return Tokens(self.statistics.tokens, self.statistics.n_valid.reshape(1))


class Of(NamedTuple):
    """A head."""

    e: Any  # (N, D)
    c: Any  # (V, D)
    terms: Any  # LogitTerms
    max_logit: Any  # (N,) real
    log_sum: Any  # (N,) real


class Flow(NamedTuple):
    """What flows back into each token."""

    d_token: Any  # (N,) real: into its divergence, times its logit scale
    of_student: Any  # (N,) real: see `divergence`


@kernel_factory
def make_log_probabilities_kernel(
    tiles: SimtTiles, dtype: np.dtype, bias_dtype: np.dtype, stored: np.dtype, which: Divergence | None = None
) -> ArrayKernel:
    """The kernel for a head whose `e` and `c` are of `dtype`; logarithms of probabilities are stored in dtype `stored`.

    which: those of the student become G of this divergence, for which the teacher's must be there; None: they are stored.
    """
    real = real_of(dtype)
    load, _ = conversions(dtype)
    product, products_tile = make_product(tiles, real), make_products_tile(tiles, load, real)
    bias_of, scale_of, logit_of = make_terms(bias_dtype, real)
    column_of = product.column_of
    e_shape, c_shape, acc_shape = product.a_shape, product.b_shape, product.acc_shape
    block_n, block_v, threads, threads_v = tiles.block_n, tiles.block_v, tiles.threads, tiles.threads_v
    thread_n, thread_v, alignment, is_gradient = tiles.thread_n, tiles.thread_v, ALIGNMENT, which is not None
    gradient = functions(which or Divergence("forward_kl", 0.5), real).gradient
    convert = stored.type

    def log_probabilities_kernel(
        head: Any,  # Of
        tokens: Any,  # Tokens
        v0: Any,  # the first entry of the chunk
        v1: Any,  # the entry after its last
        flow: Any,  # Flow
        g: Any,  # (entries of a chunk, N): row v - v0, at the token's position in the list
    ) -> None:
        """Grid (n_blocks, tiles of the chunk)."""
        e_smem = cuda.shared.array(e_shape, real, alignment)
        c_smem = cuda.shared.array(c_shape, real, alignment)
        e_rows = cuda.shared.array(block_n, np.uint32)
        c_rows = cuda.shared.array(block_v, np.uint32)
        acc = cuda.local.array(acc_shape, real)
        y = cuda.threadIdx.y
        t = y * threads_v + cuda.threadIdx.x
        n0, first, n_valid = cuda.blockIdx.x * block_n, v0 + cuda.blockIdx.y * block_v, tokens.n_valid[0]
        if n0 >= n_valid or first >= v1:
            return
        for r in range(t, block_n, threads):
            e_rows[r] = tokens.listed[min(n0 + r, n_valid - 1)]
        for r in range(t, block_v, threads):
            c_rows[r] = min(first + r, v1 - 1)
        products_tile(acc, Operand(head.e, e_rows, e_smem), Operand(head.c, c_rows, c_smem))
        for i in range(thread_n):
            position = n0 + y * thread_n + i
            if position < n_valid:
                token = tokens.listed[position]
                scale, largest, log_sum = scale_of(head.terms, token), head.max_logit[token], head.log_sum[token]
                for j in range(thread_v):
                    v = first + column_of(j)
                    if v < v1:
                        z = logit_of(acc[i, j], bias_of(head.terms, v), scale, head.terms)
                        value = (z - largest) - log_sum
                        if is_gradient:
                            value = gradient(real(g[v - v0, position]), value, flow.of_student[token]) * flow.d_token[token]
                            if head.terms.softcap > 0:
                                value *= slope_of_cap(z / head.terms.softcap)
                            if flow.d_token[token] == 0:  # not even with a NaN in its row
                                value = real(0)
                        g[v - v0, position] = convert(value)

    return ArrayKernel(log_probabilities_kernel, block=(tiles.threads_v, tiles.threads_n), ctas=tiles.ctas)


@kernel_factory
def make_divergence_kernel(real: np.dtype, which: Divergence) -> ArrayKernel:
    """The kernel that sums up a chunk, for logarithms of probabilities of dtype `real`."""
    terms, parts = functions(which, real.type).terms, _PARTS

    def divergence_kernel(
        log_p: Any,  # (entries of a chunk, N) the teacher's: row v - v0, at the token's position in the list
        log_q: Any,  # the student's
        entries: Any,  # of the chunk
        tokens: Any,  # Tokens
        totals: Any,  # (2, parts, N) float64, by token: to which the sums of both `Functions.terms` are added
    ) -> None:
        """Grid (enough CTAs for all tokens, parts)."""
        position, part = cuda.grid(1), cuda.blockIdx.y
        if position >= tokens.n_valid[0]:
            return
        total, own = np.float64(0), np.float64(0)
        step = (entries + parts - 1) // parts
        for i in range(part * step, min(part * step + step, entries)):
            x, y = terms(log_p[i, position], log_q[i, position])
            total += x
            own += y
        token = tokens.listed[position]
        totals[0, part, token] += total
        totals[1, part, token] += own

    return ArrayKernel(divergence_kernel, block=_THREADS)


def tiles_of(student: Problem, teacher: Problem) -> SimtTiles:
    """The student's; the teacher's follow from its own dtype."""
    return choose_tiles(student.compute_dtype, SIMULATED)


def divergence(
    student: Head, teacher: Head, which: Divergence, tiles: SimtTiles, record: bool = False
) -> tuple[Any, Any, Head]:
    """(N,) each token's divergence, and the sum of what is the student's in its gradient; 0 where ignored; and the student."""
    p, xp = student.problem, student.problem.xp
    totals = xp.zeros((2, _PARTS, p.N), np.float64)
    if p.N:
        chunk = _chunk_of_both(p, tiles)
        log_p, log_q = (argument(xp.empty((chunk, p.N), p.compute_dtype)) for _ in range(2))
        tokens, nothing = argument(student.tokens()), _no_flow(p)
        heads = [(argument(head.found()), _kernel_for(head, p), array) for head, array in ((teacher, log_p), (student, log_q))]
        kernel = make_divergence_kernel(p.compute_dtype, which)
        for v0 in range(0, p.V, chunk):
            v1 = min(v0 + chunk, p.V)
            for head, (of_head, of_tiles), array in heads:
                of_head.launch(_grid(p, of_tiles, v0, v1), head, tokens, v0, v1, nothing, array)
            kernel.launch((ceil_div(p.N, _THREADS), _PARTS), log_p, log_q, v1 - v0, tokens, totals)
    total, of_student = totals.sum(axis=1).astype(p.compute_dtype)
    return total, of_student, student


def backward(
    student: Head,
    teacher: Head,
    which: Divergence,
    of_student: Any,
    d_token: Any,
    tiles: SimtTiles,
    into: Gradients,
    adds: bool,
) -> None:
    """Writes the student's gradients, or adds them, as `backend.Backend.backward` does.

    of_student: of `divergence`. d_token (N,): what flows into each token's divergence, times its logit scale.
    """
    p = student.problem
    (of_teacher, teacher_tiles), (of_own, own_tiles) = _kernel_for(teacher, p), _kernel_for(student, p, which)
    flow, tokens = argument(Flow(d_token, of_student)), argument(student.tokens())
    theirs, ours = argument(teacher.found()), argument(student.found())

    def fill(v0: int, v1: int, g: Any) -> None:
        """Writes G of a chunk."""
        of_teacher.launch(_grid(p, teacher_tiles, v0, v1), theirs, tokens, v0, v1, _no_flow(p), g)
        of_own.launch(_grid(p, own_tiles, v0, v1), ours, tokens, v0, v1, flow, g)

    weights = backend.Weights(d_token, p.xp.zeros_like(d_token))
    backward_kernels.backward(p, tiles, student.statistics, weights, into, adds, fill)


def _kernel_for(head: Head, student: Problem, which: Divergence | None = None) -> tuple[ArrayKernel, SimtTiles]:
    p, tiles = head.problem, choose_tiles(head.problem.compute_dtype, SIMULATED)
    return make_log_probabilities_kernel(tiles, p.dtype, bias_dtype_of(p), student.compute_dtype, which), tiles


def _grid(p: Problem, tiles: SimtTiles, v0: int, v1: int) -> tuple[int, int]:
    return ceil_div(p.N, tiles.block_n), ceil_div(v1 - v0, tiles.block_v)


def _no_flow(p: Problem) -> Any:
    absent = p.xp.empty(1, p.compute_dtype)
    return argument(Flow(absent, absent))


def _chunk_of_both(p: Problem, tiles: SimtTiles) -> int:
    """Entries of a chunk of which the logarithms of both heads fit in the workspace; at least one tile."""
    tile = max(tiles.block_n, tiles.block_v)
    return max(tile, backward_kernels.chunk_of(p, tiles) // 2 // tile * tile)
