"""The divergence of a student's head from a teacher's on the CPU: a block of both heads' logits at a time.

The log-sum-exps of both heads are known (`forward`). So a block has the logarithms of both probabilities, P of the teacher and
Q of the student, and each kind of divergence is a sum over the vocabulary. `reference/distillation.py` has the formulas. The
same pass finds the survivors, by the larger of P and Q (`cce_numba/survivors.py`), and the backward looks at no others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cce_numba import survivors as rule
from cce_numba.arguments import Outline, Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.cpu import backward as backward_loops
from cce_numba.cpu import threads
from cce_numba.cpu.blocks import finish_logits, ranges, rows
from cce_numba.cpu.folds.survivors import unless_dense
from cce_numba.cpu.threads import for_each, multiply
from cce_numba.cpu.tiles import CpuTiles, choose_tiles
from cce_numba.integers import ceil_div

_TOKENS = 256  # whose logits are there together, of the teacher and, in the forward, of the student
_ROWS = 64  # of these, whose elements are looked at together


@dataclass(frozen=True, eq=False)
class Head:
    """A head, and what its forward has found."""

    problem: Problem
    statistics: Statistics

    def rows_of_c(self, columns: Any) -> Any:
        """(v, D) of the classifier, in the compute dtype. columns: a slice or integers."""
        return self.problem.c[columns].astype(self.problem.compute_dtype, copy=False)

    def log_probabilities(self, tokens: Any, c: Any, columns: Any) -> Any:
        """(n, v) natural logarithms of the probabilities of these tokens and entries, whose rows are c."""
        p = self.problem
        z = multiply(rows(p.e, tokens, p.compute_dtype), c.T)
        finish_logits(z, p, tokens, columns)
        self.subtract_lse(z, tokens)
        return z

    def subtract_lse(self, z: Any, tokens: Any) -> None:
        """Turns the logits (n, v) of these tokens into logarithms of probabilities, in place."""
        z -= self.statistics.max_logit[tokens][:, None]
        z -= self.statistics.log_sum[tokens][:, None]


@dataclass(frozen=True)
class Divergence:
    """Which one: "forward_kl", "reverse_kl" or "jsd", and the weight of the teacher in the mixture of the last."""

    kind: str
    beta: float

    def terms(self, log_p: Any, log_q: Any) -> tuple[Any, Any]:
        """(n, v) what is summed up to the divergence; and what is, times Q, in the gradient, whose mean is taken off."""
        if self.kind == "forward_kl":
            return _times(np.exp(log_p), log_p - log_q), None
        if self.kind == "reverse_kl":
            own = _times(np.exp(log_q), log_q - log_p)
            return own, own
        real = log_p.dtype.type
        log_m = np.logaddexp(real(np.log(self.beta)) + log_p, real(np.log1p(-self.beta)) + log_q)
        own = _times(np.exp(log_q), log_q - log_m)
        return real(self.beta) * _times(np.exp(log_p), log_p - log_m) + real(1 - self.beta) * own, own

    def gradient(self, log_p: Any, log_q: Any, of_student: Any) -> Any:
        """(n, v) the derivative with respect to the student's logits. of_student (n,): see `divergence`."""
        q = np.exp(log_q)
        if self.kind == "forward_kl":
            return q - np.exp(log_p)
        own = self.terms(log_p, log_q)[1]
        g = own - _times(q, of_student[:, None])
        return g if self.kind == "reverse_kl" else g.dtype.type(1 - self.beta) * g


def _times(probability: Any, x: Any) -> Any:
    """Their product, 0 where the probability is 0."""
    return np.where(probability == 0, probability, probability * x)


def tiles_of(student: Problem, teacher: Problem) -> CpuTiles:
    """Blocks that leave room for those of both heads."""
    wider = max(1, teacher.compute_dtype.itemsize // student.compute_dtype.itemsize)
    D = student.D + wider * teacher.D
    return choose_tiles(Outline(student.N, student.V, D, student.dtype, False, "cpu", student.options))


def divergence(student: Head, teacher: Head, which: Divergence, tiles: CpuTiles, record: bool = False) -> tuple[Any, Any, Head]:
    """(N,) each token's divergence, and the sum of what is the student's in its gradient; 0 where ignored; and the student.

    record: it comes back with survivors of the union, by its options and the draws' seed in its statistics.
    """
    with threads.of(student.problem):
        total, of_student, bits = _divergence(student, teacher, which, tiles, record)
    if record:
        found = replace(student.statistics, survivors=bits, survivor_block=tiles.survivor_block)
        student = replace(student, statistics=found)
    return total, of_student, student


def _divergence(student: Head, teacher: Head, which: Divergence, tiles: CpuTiles, record: bool) -> tuple[Any, Any, Any]:
    p, tokens = student.problem, student.statistics.tokens
    total, of_student = np.zeros(p.N), np.zeros(p.N)
    block = tiles.survivor_block
    bits = np.zeros((ceil_div(len(tokens), block), ceil_div(p.V, 8)), np.uint8) if record else None
    step = min(_ROWS, block)  # of one block

    def add(span: tuple[int, int], flags: Any, log_p: Any, log_q: Any, columns: slice) -> None:
        """Of these positions in the list of tokens; flags (v,) are written if survivors are recorded."""
        some, log_p = tokens[slice(*span)], log_p.astype(log_q.dtype, copy=False)
        terms, own = which.terms(log_p, log_q)
        total[some] += terms.sum(axis=1, dtype=np.float64)
        if own is not None:
            of_student[some] += own.sum(axis=1, dtype=np.float64)
        if record:
            largest = np.maximum(log_p, log_q).max(axis=0)
            flags[:] = ~(largest < _log_threshold(student, span[0] // block, columns))  # NaN is not below anything

    for v0, v1 in ranges(p.V, tiles.block_v):
        columns = slice(v0, v1)
        both = [(head, head.rows_of_c(columns)) for head in (student, teacher)]
        for n0, n1 in ranges(len(tokens), _TOKENS):
            log_q, log_p = (head.log_probabilities(tokens[n0:n1], c, columns) for head, c in both)
            flags = np.zeros((ceil_div(n1 - n0, step), v1 - v0), bool)
            spans = list(ranges(n1 - n0, step))
            for_each(
                lambda args: add(*args, columns),  # noqa: B023 - it is called before the next one is made
                [((n0 + a, n0 + b), flags[i], log_p[a:b], log_q[a:b]) for i, (a, b) in enumerate(spans)],
            )
            if bits is not None:
                for (first, _), packed in zip(spans, np.packbits(flags, axis=1, bitorder="little"), strict=True):
                    bits[(n0 + first) // block, v0 // 8 : v0 // 8 + len(packed)] |= packed
    if bits is not None and student.statistics.draw_seed is None:
        bits = unless_dense(bits, p.V)
    return total.astype(p.compute_dtype), of_student.astype(p.compute_dtype), bits


def _log_threshold(student: Head, n_block: int, columns: slice) -> Any:
    """What the logarithm of a probability must reach to survive, in a block of tokens: one number, or (v,) by chance."""
    log_eps, seed = rule.log_threshold(student.problem.options.filter_eps), student.statistics.draw_seed
    if seed is None:
        return log_eps
    return log_eps + np.log(rule.draws(n_block, np.arange(columns.start, columns.stop), seed).astype(np.float64))


def backward(
    student: Head, teacher: Head, which: Divergence, of_student: Any, d_token: Any, tiles: CpuTiles, into: Gradients, adds: bool
) -> None:
    """Writes the student's gradients, or adds them, as `backend.Backend.backward` does.

    student, of_student: of `divergence`. d_token (N,): what flows into each token's divergence, times its logit scale.
    """
    p, by_chance = student.problem, student.statistics.draw_seed is not None

    def fill(z: Any, tokens: Any, entries: Any) -> Any:
        """Turns the student's logits into G, some tokens at a time, so that the teacher's take little room."""
        c = teacher.rows_of_c(entries)
        largest = np.full(z.shape[1], -np.inf, z.dtype)
        for n0, n1 in ranges(len(tokens), _TOKENS):
            block, own = tokens[n0:n1], z[n0:n1]
            log_p = teacher.log_probabilities(block, c, entries).astype(z.dtype, copy=False)
            some = [slice(*span) for span in ranges(len(block), _ROWS)]
            maxima = np.full((len(some), z.shape[1]), -np.inf, z.dtype)
            for_each(lambda args: to_gradient(*args), [(block[x], log_p[x], own[x], maxima[i]) for i, x in enumerate(some)])
            largest = np.maximum(largest, maxima.max(axis=0))
        return largest

    def to_gradient(tokens: Any, log_p: Any, z: Any, largest: Any) -> None:
        slope = None if p.options.softcap is None else 1 - (z / z.dtype.type(p.options.softcap)) ** 2
        student.subtract_lse(z, tokens)
        if by_chance:
            lost = 0 * of_student[tokens]  # NaN where that is not finite
            np.max(np.maximum(log_p, z) + lost[:, None], axis=0, out=largest)
        g = which.gradient(log_p, z, of_student[tokens])
        np.multiply(g, d_token[tokens][:, None], out=z)
        if slope is not None:
            z *= slope

    weights = Weights(d_token, np.zeros_like(d_token))
    with threads.of(p):
        backward_loops.backward(p, tiles, student.statistics, weights, into, adds, fill)
