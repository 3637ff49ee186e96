"""The filter's rule, the same for all backends: which logits survive, at which thresholds, and what the others amount to.

Gradients need the entries of the vocabulary whose probability is not negligible. A forward can tell them while it sees the
logits, before the log-sum-exp is known, and notes one bit for each block of tokens and entry. An entry v survives in a block if
for any of the block's tokens n

    it is the target of n, or
    not (z[n, v] < threshold(bound[n], log_threshold(eps)))

with z the logits and bound[n] any lower bound of the final log-sum-exp of token n, such as its target's logit, or the
log-sum-exp of the logits so far. The probability of v is exp(z - lse) <= exp(z - bound), so a lower bound keeps everything that
reaches eps, and a little more. It is "not below" rather than "at least" so that NaN survives: where a token is lost (its
log-sum-exp or target logit is NaN) all entries of its block survive, since its gradient is NaN everywhere. A forward that
compares with "at least" must see to that by other means.

That is the rule of `filter="drop"`, which drops for good: gradients are biased. With `filter="unbiased"`, the default, nothing
is lost on average. Let pmax be the largest probability of an entry v among the tokens of a block b that take part. If pmax is
below eps, and v is the target of none of these tokens, then v survives if

    pmax > eps * u        u = draw(b, mix(v ^ seed)), spread evenly over (0, 1)

and its column of G is multiplied by eps / pmax, in all rows. It survives with probability pmax / eps, so its share of every
gradient is right on average. All other columns are kept as they are, and so is the whole block if one of its tokens is lost.
The forward, which has lower bounds alone, flags what

    not (z[n, v] < threshold(bound[n], log_threshold(eps) + log(u)))

says, and that is a little more. The backward, which computes these logits again, decides by the exact probabilities of the
tokens that take part.

A draw is no state. Its seed follows from the targets that count, in any order, and from the caller's `filter_seed`:

    seed = mix(mix(filter_seed) + sum of mix(targets[n]) over the tokens that count)        modulo 2**32

So the same inputs give the same bits, a recomputed forward draws the same, and a CUDA graph draws anew when its inputs change.
Where several ranks share a vocabulary (`parallel/`), v is the entry's number in all of it. Kernels count from a rank's first
entry, so that number travels with the seed: `seed + (first entry << 32)` is what they are handed, and their draws add the high
word to v. Without ranks it is 0.
`reference/roulette.py` defines the same apart from this package.

Two heads of a distillation share a filter. It takes the larger of both probabilities, and there are no targets. Both
log-sum-exps are known before the logits are seen again, so what is flagged is what survives, but for rounding. The seed of the
draws follows from the log-sum-exps of the teacher (`seed_of_numbers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cce_numba import logit
from cce_numba.integers import ceil_div
from cce_numba.options import Options

if TYPE_CHECKING:
    from cce_numba.arguments import Problem
    from cce_numba.backend import Statistics

SURVIVOR_BLOCK = 128  # tokens that share survivor bits; in the portable kernels the tiles decide

# Picking a column costs time. Where more than this share of all pairs of a block and a column survives, a backward may take all
# of them, in order, which is faster, and gradients are exact then. On hopper the two ways take equally long where 0.60 (both
# gradients), 0.58 (dE alone) or 0.55 (dC alone) survive with 2304 hidden entries, and 0.64, 0.65 or 0.72 with 4096.
DENSE_SHARE = 0.6

# Logits are compared in the compute dtype, with rounding errors of up to 1e-5 (1 + |z|) in each; so a logit whose probability
# is exactly eps could fall below the threshold. This much slack, absolute and relative to the bound, keeps it. It has the
# effect of an eps that is some 0.1 % lower (more for logits of hundreds).
_SLACK, _RELATIVE_SLACK = 1e-3, 4e-5

# Where the caller of the filter that drops leaves the choice to us, the threshold of dC is so many times the filter's own. On
# real text, dC at the first (2^-14 for bfloat16) has the error that dE has at the second (2^-16).
_COARSER = 4

GOLDEN = 2654435769  # 2**32 times the golden ratio's fraction, 0.6180339887: draws of neighbouring blocks lie far apart
_LOW_BITS = 0xFFFFFFFF

_ROWS_BYTES = 32 * 2**20  # of e, and of c, at a time, in the compute dtype
_MOST_ROWS = 1024


def make_threshold(real: Any) -> Callable[[Any, Any], Any]:
    """Makes `threshold(bound, log_eps)`, what a logit must reach to survive, in arithmetic of `np.float32` or `np.float64`.

    It is a plain function of two numbers, for each backend to compile with its own `jit` and call where it folds logits:
    `bound`, a lower bound of the token's log-sum-exp, and `log_eps`, which is `log_threshold(eps)`, both of `real`. It grows
    with the bound, so a better bound never keeps more. Where the bound is inf or NaN it is NaN: nothing is below it.

    >>> float(make_threshold(np.float64)(2.0, log_threshold(2.0**-16)).round(3))
    -9.091
    """
    slack = real(_RELATIVE_SLACK)  # of `real`, or kernels of float32 would compute this in float64

    def threshold(bound: Any, log_eps: Any) -> Any:
        return bound - slack * abs(bound) + log_eps

    return threshold


def low_word(x: Any) -> Any:
    """The lower 32 bits of Python's integers, or of arrays of int64: what `numpy.uint32` is to compiled code.

    >>> low_word(-1)
    4294967295
    """
    return x & _LOW_BITS


def make_mix(word: Any) -> Callable[[Any], Any]:
    """Makes `mix(x)`, a hash of the lower 32 bits of an integer, one to one: each bit may change every bit of the result.

    It is a plain function for each backend to compile. `word` takes an integer to its lower 32 bits: `numpy.uint32` in code
    that Numba compiles, which then has 32-bit instructions alone; `low_word` in Python, in the simulator, and for arrays of
    int64. Multipliers have 31 bits, so that no product overflows int64. They are from
    https://github.com/skeeto/hash-prospector.

    >>> make_mix(low_word)(1)
    2261973619
    """

    def mix(x: Any) -> Any:
        x = word(x)
        x = word((x ^ (x >> 16)) * 0x21F0AAAD)
        x = word((x ^ (x >> 15)) * 0x735A2D97)
        return word(x ^ (x >> 15))

    return mix


def make_draw(word: Any, float32: Any = np.float32) -> Callable[[Any, Any], Any]:
    """Makes `draw(block, hashed)`, u of a block and an entry v whose hash is `mix(v ^ seed)`: float32 in (0, 1).

    u is the fraction of hashed / 2**32 + block * 0.618..., cut to 23 bits: an odd multiple of 2**-24, the same in any
    arithmetic. `block` counts the blocks of counting tokens from 0. `word`: see `make_mix`. `float32` converts to that type.

    >>> float(make_draw(low_word)(0, 2**31)) * 2**24 - 2**23
    1.0
    """
    unit = np.float32(2.0**-24)

    def draw(block: Any, hashed: Any) -> Any:
        return float32(word((word(hashed + block * GOLDEN) >> 8) | 1)) * unit

    return draw


def make_scale(real: Any) -> Callable[[Any, Any, Any], Any]:
    """Makes `scale(largest, eps, u)`, what a column of G is multiplied by, in arithmetic of `np.float32` or `np.float64`.

    It is 0 for a column that is dropped, eps / largest for one that survives by chance, and 1 for others. `largest`: of the
    column's probabilities; inf or NaN for one that is kept as it is: a target's, or all of a block with a lost token. `eps` and
    `u`: the threshold and the draw, of `real`. A largest probability of 0 never survives, even if eps * u is 0.

    >>> scale = make_scale(np.float64)
    >>> [float(scale(largest, 0.25, 0.4)) for largest in (0.5, 0.125, 0.0625)]
    [1.0, 2.0, 0.0]
    """
    zero, one = real(0), real(1)

    def scale(largest: Any, eps: Any, u: Any) -> Any:
        result = one
        if largest <= eps * u:
            result = zero
        elif largest < eps:
            result = eps / largest
        return result

    return scale


def _as_float32(x: Any) -> Any:
    """The array, of NumPy's or CuPy's, in that type."""
    return x.astype(np.float32)


_mix, _draw = make_mix(low_word), make_draw(low_word, _as_float32)


def draw_seed(targets: np.ndarray, filter_seed: int) -> np.ndarray:
    """0-d int64 in [0, 2**32), the seed of the draws, on the host. targets: int64, of the tokens that count.

    >>> int(draw_seed(np.array([3, 5]), 0))
    2224232729
    """
    return np.array(_mix(_mix(filter_seed) + int(_mix(targets).sum())))


def seed_of_numbers(numbers: Any, filter_seed: Any) -> Any:
    """0-d int64 in [0, 2**32), a seed that follows from the numbers, on their device; 0 and -0 of the numbers add nothing.

    numbers: an array of floats. filter_seed: the caller's, as `arguments.Problem` has it.

    >>> int(seed_of_numbers(np.array([0.0, 1.5, 0.0]), 0))
    2658690768
    """
    words = (numbers + 0).astype(np.float32).view(np.uint32).astype(np.int64)
    return _mix(_mix(filter_seed) + _mix(words).sum()).reshape(())


def draws(blocks: Any, entries: Any, seed: Any) -> Any:
    """The draws u of blocks and entries, int64 arrays that broadcast: float32. With array operations.

    seed: with the first entry in its high word, as kernels are handed it.

    >>> [f"{u:.4f}" for u in draws(0, np.array([0, 1]), 7)]
    ['0.9197', '0.8550']
    """
    return _draw(blocks, _mix((entries + (seed >> 32)) ^ seed))


def log_threshold(eps: float | None) -> float:
    """Natural log of the probability `eps`, less the absolute slack; -inf for None, which keeps all.

    >>> round(log_threshold(2.0**-16), 3)
    -11.091
    """
    return -math.inf if eps is None else math.log(eps) - _SLACK


def coarse_eps_of(options: Options) -> float | None:
    """A higher threshold, for dC and dbias alone, of the filter that drops, for a backend that has a second one; else None."""
    if options.is_unbiased or options.filter_eps is None or not (options.filter_is_auto and options.filter_c_grad):
        return None
    return _COARSER * options.filter_eps


def keep_blocks_with(lost: Any, p: Problem, statistics: Statistics) -> None:
    """Sets, in place, all survivor bits of the blocks with a token that is lost: lost (N,) bool.

    With array operations, which wait for no device.
    """
    bits = statistics.survivors
    if bits is None or not p.N:
        return
    xp: Any = p.xp
    block, tokens = statistics.survivor_block, statistics.tokens
    places = xp.arange(len(tokens))
    by_place = lost[xp.where(places < statistics.n_valid, tokens, 0)] & (places < statistics.n_valid)
    n_blocks = ceil_div(len(tokens), block)
    padded = xp.zeros(n_blocks * block, bool)
    padded[: len(tokens)] = by_place
    of_block = padded.reshape(n_blocks, block).any(axis=1)
    every = xp.full(ceil_div(p.V, 8), 0xFF, np.uint8)  # made on the device: nothing travels there, so a graph can capture it
    every[-1] = 0xFF >> (-p.V % 8)
    for first in range(0, len(bits), n_blocks) if n_blocks else ():  # planes, one after the other (`StatisticsForm`)
        plane = bits[first : first + n_blocks]
        plane |= xp.where(of_block[: len(plane), None], every, np.uint8(0))


def unpack_survivors(statistics: Statistics, V: int) -> np.ndarray:
    """(ceil(n_valid / block), V) bool on the host, from the packed bits. Waits for the device, if there is one.

    Of the unbiased filter these are the columns that the forward flags, of which the backward drops some.
    """
    bits = statistics.survivors[: ceil_div(int(statistics.n_valid), statistics.survivor_block)]
    host = bits if isinstance(bits, np.ndarray) else bits.get()
    return np.unpackbits(host, axis=1, bitorder="little")[:, :V].astype(bool)


def dropped_mass(p: Problem, statistics: Statistics) -> Any:
    """(N,) of the compute dtype: the sum of the softmax over dropped entries; 0 where ignored or nothing was recorded.

    Of the unbiased filter these are the entries that this seed's draws drop, if all tokens that count take part.

    It is that sum itself, not 1 less what is kept, which would cancel. With array operations, for all backends: it is computed
    afterwards for whoever asks, so it need not be fast, but its memory stays bounded. Waits for the device.
    """
    xp: Any = p.xp
    result = xp.zeros(p.N, p.compute_dtype)
    if statistics.survivors is None:
        return result
    tokens = statistics.tokens[: int(statistics.n_valid)]
    block = statistics.survivor_block
    rows = max(8, min(_MOST_ROWS, _ROWS_BYTES // (p.compute_dtype.itemsize * p.D)) // 8 * 8)
    group = max(1, rows // block) * block
    total = xp.zeros(len(tokens), np.float64)
    with np.errstate(all="ignore"):  # what is lost is NaN, and dropped by nobody
        for v0 in range(0, p.V, rows):
            v1 = min(v0 + rows, p.V)
            c = p.c[v0:v1].astype(p.compute_dtype, copy=False)
            for n0 in range(0, len(tokens), group):
                some = tokens[n0 : n0 + group]
                bits = statistics.survivors[n0 // block : ceil_div(n0 + len(some), block), v0 // 8 : ceil_div(v1, 8)]
                drops = (bits[:, :, None] >> xp.arange(8, dtype=np.uint8) & 1).reshape(len(bits), -1)[:, : v1 - v0] == 0
                probabilities = _softmax(p, some, c, v0, statistics.lse)
                if statistics.draw_seed is not None:
                    drops |= _dropped_by_chance(p, statistics, some, n0 // block, probabilities, v0)
                dropped = xp.where(drops.repeat(block, axis=0)[: len(some)], probabilities, 0)
                total[n0 : n0 + group] += dropped.sum(axis=1, dtype=np.float64)
    result[tokens] = total.astype(p.compute_dtype)
    return result


def _dropped_by_chance(p: Problem, statistics: Statistics, tokens: Any, first_block: int, probabilities: Any, v0: int) -> Any:
    """(n_blocks, v) bool: what the unbiased filter drops in these tokens' blocks, from the entry v0 on.

    probabilities: (n, v), of tokens that are whole blocks but for the last one.
    """
    xp, block, (n, V) = p.xp, statistics.survivor_block, probabilities.shape
    n_blocks = ceil_div(n, block)
    targets = p.targets[tokens].reshape(n, -1)
    lost = xp.isnan(statistics.target_logit[tokens]).reshape(n, -1).any(axis=1)  # others that are have probabilities of NaN
    padded = xp.zeros((n_blocks * block, V), probabilities.dtype)
    padded[:n] = xp.where(lost[:, None], np.nan, probabilities)
    largest = padded.reshape(n_blocks, block, V).max(axis=1)
    columns = targets - v0
    here = (columns >= 0) & (columns < V) & (targets != p.options.ignore_index)
    of_block = xp.broadcast_to((xp.arange(n) // block)[:, None], columns.shape)
    largest[of_block[here], columns[here]] = np.inf
    u = draws(xp.arange(first_block, first_block + n_blocks)[:, None], xp.arange(v0, v0 + V), statistics.draw_seed)
    return largest <= p.options.filter_eps * u


def _softmax(p: Problem, tokens: Any, c: Any, v0: int, lse: Any) -> Any:
    """(n, v) of the compute dtype: the softmax of these tokens at the entries from v0 on, whose rows are `c`."""
    e = p.e.view(f"u{p.dtype.itemsize}")[tokens].view(p.dtype)  # by bits: CuPy need not know how to pick bfloat16
    z = e.astype(p.compute_dtype, copy=False) @ c.T
    bias = None if p.bias is None else p.bias[v0 : v0 + len(c)].astype(p.compute_dtype, copy=False)
    scale = None if p.logit_scale is None else p.logit_scale[tokens][:, None]
    logit.finish_in_place(z, bias, scale, p.options.softcap)
    return p.xp.exp(z - lse[tokens][:, None])
