"""A student's head and a teacher's, chunk by chunk of the vocabulary: what `cce_numba.distillation` asks of a backend.

For each chunk the teacher's logits are computed first, and left in the workspace as logarithms of probabilities. Forward, the
student's follow, and both are summed up to each token's divergence, and tell which entries survive, by the larger of both.
Backward, the student's logits turn them into G, the gradient of the loss with respect to these, where they are; all else is as
in `backward`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
from cce_numba.simt.chance import make_decide
from cce_numba.simt.draws import draw
from cce_numba.simt.logits import make_products_tile, make_terms
from cce_numba.simt.numbers import conversions, real_of
from cce_numba.simt.product import make_product
from cce_numba.simt.records import Chance, Columns, LogitTerms, Tokens, bias_dtype_of
from cce_numba.simt.staging import ALIGNMENT, Operand
from cce_numba.simt.tiles import SimtTiles, choose_tiles
from cce_numba.survivors import log_threshold

_PARTS = 2 if SIMULATED else 32  # of a chunk, whose sums threads of their own make, and which are then added up
_THREADS = 4 if SIMULATED else 128
_COLUMNS = 8 if SIMULATED else 64  # whose survival a CTA finds; a multiple of 8, the bits of a byte


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
    tiles: SimtTiles,
    dtype: np.dtype,
    bias_dtype: np.dtype,
    stored: np.dtype,
    which: Divergence | None = None,
    listed: bool = False,
    unbiased: bool = False,
) -> ArrayKernel:
    """The kernel for a head whose `e` and `c` are of `dtype`; logarithms of probabilities are stored in dtype `stored`.

    which: those of the student become G of this divergence, for which the teacher's must be there; None: they are stored.
    listed: of the entries that are listed, else of all of the chunk. unbiased: G is that of this filter.
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
    convert, decide = stored.type, make_decide(tiles, real)
    largest_shape, infinity = (tiles.threads_n, block_v), real(math.inf)

    @cuda.jit(device=True)
    def entry_of(columns: Any, n_block: Any, column: Any) -> Any:
        """The entry of a column, which counts from the first of the block."""
        return columns.listed[n_block, column] if listed else columns.v0 + column

    @cuda.jit(device=True)
    def probability_of(log_p: Any, log_q: Any, of_student: Any) -> Any:
        """A token's say in the fate of a column: the larger probability; inf if the token is lost."""
        probability = real(math.exp(max(log_p, log_q)))
        if log_p != log_p or log_q != log_q or of_student - of_student != 0:
            probability = infinity
        return probability

    def log_probabilities_kernel(
        head: Any,  # Of
        tokens: Any,  # Tokens
        columns: Any,  # Columns
        flow: Any,  # Flow
        chance: Any,  # Chance
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
        n_block, first, n_valid, v0 = cuda.blockIdx.x, cuda.blockIdx.y * block_v, tokens.n_valid[0], columns.v0
        n0, count = n_block * block_n, columns.count[n_block] if listed else columns.v1 - columns.v0
        if n0 >= n_valid or first >= count:
            return
        for r in range(t, block_n, threads):
            e_rows[r] = tokens.listed[min(n0 + r, n_valid - 1)]
        for r in range(t, block_v, threads):
            c_rows[r] = entry_of(columns, n_block, min(first + r, count - 1))
        products_tile(acc, Operand(head.e, e_rows, e_smem), Operand(head.c, c_rows, c_smem))

        if unbiased:
            most = cuda.shared.array(largest_shape, real)
            scales = cuda.shared.array(block_v, real)
            for j in range(thread_v):
                most[y, column_of(j)] = real(0)
            for i in range(thread_n):
                position = n0 + y * thread_n + i
                if position < n_valid and flow.d_token[tokens.listed[position]] != 0:
                    token = tokens.listed[position]
                    scale, largest, log_sum = scale_of(head.terms, token), head.max_logit[token], head.log_sum[token]
                    for j in range(thread_v):
                        v = entry_of(columns, n_block, min(first + column_of(j), count - 1))
                        z = logit_of(acc[i, j], bias_of(head.terms, v), scale, head.terms)
                        own = probability_of(real(g[v - v0, position]), (z - largest) - log_sum, flow.of_student[token])
                        most[y, column_of(j)] = max(most[y, column_of(j)], own)
            decide(most, scales, n_block, first, columns, chance)

        for i in range(thread_n):
            position = n0 + y * thread_n + i
            if position < n_valid:
                token = tokens.listed[position]
                scale, largest, log_sum = scale_of(head.terms, token), head.max_logit[token], head.log_sum[token]
                for j in range(thread_v):
                    if first + column_of(j) < count:
                        v = entry_of(columns, n_block, first + column_of(j))
                        z = logit_of(acc[i, j], bias_of(head.terms, v), scale, head.terms)
                        value = (z - largest) - log_sum
                        if is_gradient:
                            value = gradient(real(g[v - v0, position]), value, flow.of_student[token]) * flow.d_token[token]
                            if head.terms.softcap > 0:
                                value *= slope_of_cap(z / head.terms.softcap)
                            if unbiased:
                                value *= scales[column_of(j)]
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


@kernel_factory
def make_flag_kernel(tiles: SimtTiles, real: np.dtype, unbiased: bool) -> ArrayKernel:
    """The kernel that finds the survivors of a chunk, of logarithms of dtype `real`. A thread has a column of a block."""
    block_n, columns_of_cta, own_threshold = tiles.block_n, _COLUMNS, unbiased

    def flag_kernel(
        log_p: Any,  # (entries of a chunk, N) the teacher's: row v - v0, at the token's position in the list
        log_q: Any,  # the student's
        columns: Any,  # Columns
        tokens: Any,  # Tokens
        log_eps: Any,  # real: natural log of the threshold, with some slack
        draw_seed: Any,  # (1,) int64: of the unbiased filter
        bits: Any,  # (n_blocks, ceil(V / 8)) uint8, little-endian over the vocabulary, of which the chunk's are to be written
    ) -> None:
        """Grid (n_blocks, enough CTAs for the chunk)."""
        hits = cuda.shared.array(columns_of_cta, np.uint8)
        t, n_block, n_valid = cuda.threadIdx.x, cuda.blockIdx.x, tokens.n_valid[0]
        first = cuda.blockIdx.y * columns_of_cta
        column, entries = first + t, columns.v1 - columns.v0
        hits[t] = 0
        if column < entries:
            threshold = log_eps
            if own_threshold:
                threshold += log_p.dtype.type(math.log(draw(n_block, columns.v0 + column, draw_seed[0])))
            for position in range(n_block * block_n, min(n_block * block_n + block_n, n_valid)):
                # "not below" rather than "at least": NaN survives.
                if not (log_p[column, position] < threshold and log_q[column, position] < threshold):
                    hits[t] = 1
        cuda.syncthreads()
        if t < columns_of_cta // 8 and first + 8 * t < entries:
            byte = 0
            for bit in range(8):
                byte |= hits[8 * t + bit] << bit
            bits[n_block, (columns.v0 + first) // 8 + t] = byte

    return ArrayKernel(flag_kernel, block=_COLUMNS)


def tiles_of(student: Problem, teacher: Problem) -> SimtTiles:
    """The student's; the teacher's follow from its own dtype."""
    return choose_tiles(student.compute_dtype, SIMULATED)


def divergence(
    student: Head, teacher: Head, which: Divergence, tiles: SimtTiles, record: bool = False
) -> tuple[Any, Any, Head]:
    """(N,) each token's divergence, and the sum of what is the student's in its gradient; 0 where ignored; and the student.

    record: it comes back with survivors of the union, by its options and the draws' seed in its statistics.
    """
    p, xp, found = student.problem, student.problem.xp, student.statistics
    totals = xp.zeros((2, _PARTS, p.N), np.float64)
    n_blocks = ceil_div(p.N, tiles.survivor_block)
    bits = xp.zeros((n_blocks, ceil_div(p.V, 8)) if record else (1, 1), np.uint8)
    if p.N:
        chunk = _chunk_of_both(p, tiles)
        log_p, log_q = (argument(xp.empty((chunk, p.N), p.compute_dtype)) for _ in range(2))
        tokens, nothing, chance = argument(student.tokens()), _no_flow(p), argument(Chance.of(p, found))
        heads = [(argument(head.found()), _kernel_for(head, p), array) for head, array in ((teacher, log_p), (student, log_q))]
        kernel = make_divergence_kernel(p.compute_dtype, which)
        flag_kernel = make_flag_kernel(tiles, p.compute_dtype, found.draw_seed is not None)
        log_eps = p.compute_dtype.type(log_threshold(p.options.filter_eps))
        no_list = argument((xp.empty((1, 1), np.int64), xp.empty(1, np.int64)))
        for v0 in range(0, p.V, chunk):
            columns = Columns(v0, min(v0 + chunk, p.V), *no_list)
            for head, (of_head, of_tiles), array in heads:
                of_head.launch(_grid(p, of_tiles, columns), head, tokens, columns, nothing, chance, array)
            entries = columns.v1 - columns.v0
            kernel.launch((ceil_div(p.N, _THREADS), _PARTS), log_p, log_q, entries, tokens, totals)
            if record:
                grid = n_blocks, ceil_div(entries, _COLUMNS)
                flag_kernel.launch(grid, log_p, log_q, columns, tokens, log_eps, chance.draw_seed, bits)
    total, of_student = totals.sum(axis=1).astype(p.compute_dtype)
    if record:
        student = replace(student, statistics=replace(found, survivors=bits, survivor_block=tiles.survivor_block))
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

    student, of_student: of `divergence`. d_token (N,): what flows into each token's divergence, times its logit scale.
    """
    p, found = student.problem, student.statistics
    filters = found.survivors is not None
    of_teacher, teacher_tiles = _kernel_for(teacher, p, listed=filters)
    of_own, own_tiles = _kernel_for(student, p, which, listed=filters, unbiased=found.draw_seed is not None)
    flow, tokens, chance = argument(Flow(d_token, of_student)), argument(student.tokens()), argument(Chance.of(p, found))
    theirs, ours = argument(teacher.found()), argument(student.found())

    def fill(columns: Columns, g: Any) -> None:
        """Writes G of a chunk."""
        of_teacher.launch(_grid(p, teacher_tiles, columns), theirs, tokens, columns, _no_flow(p), chance, g)
        of_own.launch(_grid(p, own_tiles, columns), ours, tokens, columns, flow, chance, g)

    weights = backend.Weights(d_token, p.xp.zeros_like(d_token))
    backward_kernels.backward(p, tiles, found, weights, into, adds, fill)


def _kernel_for(
    head: Head, student: Problem, which: Divergence | None = None, *, listed: bool = False, unbiased: bool = False
) -> tuple[ArrayKernel, SimtTiles]:
    p = head.problem
    # Lists are those of the student's blocks of tokens.
    tiles, what = choose_tiles((student if listed else p).compute_dtype, SIMULATED), (which, listed, unbiased)
    return make_log_probabilities_kernel(tiles, p.dtype, bias_dtype_of(p), student.compute_dtype, *what), tiles


def _grid(p: Problem, tiles: SimtTiles, columns: Columns) -> tuple[int, int]:
    return ceil_div(p.N, tiles.block_n), ceil_div(columns.v1 - columns.v0, tiles.block_v)


def _no_flow(p: Problem) -> Any:
    absent = p.xp.empty(1, p.compute_dtype)
    return argument(Flow(absent, absent))


def _chunk_of_both(p: Problem, tiles: SimtTiles) -> int:
    """Entries of a chunk of which the logarithms of both heads fit in the workspace; at least one tile."""
    tile = max(tiles.block_n, tiles.block_v)
    return max(tile, backward_kernels.chunk_of(p, tiles) // 2 // tile * tile)
