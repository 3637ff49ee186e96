# %% [markdown]
# # 9 · Property-based testing: break a kernel in five ways
#
# Examples test what their author thought of. In this lesson you will
#
# * say what must hold for *all* inputs, and let a program look for one for which it does not,
# * break a kernel on purpose, five times, and watch the counterexample shrink until it explains itself,
# * find out where a tolerance comes from, if nobody chooses it.

# %%
import lessons

machine = lessons.begin()

# %%
import math
from random import Random

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, find, given, settings
from hypothesis.errors import NoSuchExample
from hypothesis.extra.numpy import arrays
from numba import cuda

import cce_numba as cce
import reference
from lessons import figures, measured
from lessons.edited import edited

xp = machine.array_module()  # CuPy on a GPU, else NumPy

# %% [markdown]
# ## The kernel under test
#
# A block takes a row of logits. Each of its `T` threads folds every `T`-th logit into a state of its own, as in lesson 2. Then
# thread 0 merges the states of all.


# %%
def make_row_kernel(T):
    @cuda.jit
    def row_kernel(z, lse):
        """lse (N,) = log-sum-exp of the rows of z (N, V). Grid N, T threads."""
        largest = cuda.shared.array(T, np.float32)
        total = cuda.shared.array(T, np.float32)
        n, x = cuda.blockIdx.x, cuda.threadIdx.x
        m, s = np.float32(-math.inf), np.float32(0)
        for v in range(x, z.shape[1], T):
            logit = z[n, v]
            if logit > m:
                s = s * math.exp(m - logit) + np.float32(1)
                m = logit
            elif logit != -math.inf:
                s += math.exp(logit - m)
        largest[x], total[x] = m, s
        cuda.syncthreads()
        if x == 0:
            for other in range(1, T):
                top = max(m, largest[other])
                if top > -math.inf:
                    s = s * math.exp(m - top) + total[other] * math.exp(largest[other] - top)
                    m = top
                else:
                    s += total[other]  # 0, or NaN
            lse[n] = m + math.log(s) if s > 0 else s + m

    return row_kernel


T = 4
row_kernel = make_row_kernel(T)


def run(kernel, z):
    lse = xp.zeros(len(z), np.float32)
    kernel[len(z), T](xp.asarray(z), lse)
    return machine.to_host(lse)


z = np.array([[1.0, 2.0, 3.0], [-math.inf] * 3, [0.0, math.nan, 1.0]], np.float32)
print("kernel    ", run(row_kernel, z))
print("reference ", reference.logsumexp(z.astype(np.float64)))

# %% [markdown]
# ## A property
#
# *For every array of logits, of any shape and with any numbers in it, the kernel gives what the reference gives.* "Gives what"
# needs a word on rounding, which comes below. For now: absolute errors of at most $10^{-5}(1 + \max|z|)$, and NaN and
# infinities in the same places.
#
# `hypothesis` needs to know what an input looks like. The widest domain first: shapes around the number of threads, all numbers
# that float32 has, and special ones. Two exceptions: numbers up to $10^{4}$, since sums of larger ones overflow in float32 for
# a good reason; and no $+\infty$, since a log-sum-exp with it in is no number anyway.

# %%
numbers = st.floats(-1e4, 1e4, width=32) | st.sampled_from([-math.inf, math.nan])
logits = st.tuples(st.integers(1, 3), st.integers(1, 2 * T + 1)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=numbers)
)


def agrees(kernel, z):
    found, right = run(kernel, z).astype(np.float64), reference.logsumexp(z.astype(np.float64))
    finite = np.abs(z[np.isfinite(z)])
    tolerance = 1e-5 * (1 + finite.max(initial=0))
    same = (found == right) | (np.isnan(found) & np.isnan(right))
    with np.errstate(invalid="ignore"):
        return bool(np.all(same | (np.abs(found - right) <= tolerance)))  # not "no error > tolerance": NaN passes that


calm = settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@calm
@given(logits)
def test_the_kernel_gives_what_the_reference_gives(z):
    assert agrees(row_kernel, z)


test_the_kernel_gives_what_the_reference_gives()
print("60 arrays of logits, and it agrees with the reference for each")

# %% [markdown]
# ## Five faults
#
# Each is a slip that somebody has made. `edited` makes the same kernel with one piece of its source exchanged.

# %%
faults = {
    "the last entry is forgotten": ("range(x, z.shape[1], T)", "range(x, z.shape[1] - 1, T)"),
    "the old sum is not rescaled": ("s = s * math.exp(m - logit) + np.float32(1)", "s = s + np.float32(1)"),
    "no maximum is subtracted": ("if logit > m:", "if m == -math.inf and logit > m:"),
    "threads without logits are merged": ("if top > -math.inf:", "if True:"),
    "NaN is skipped": ("elif logit != -math.inf:", "elif logit == logit and logit != -math.inf:"),
}
broken = {name: edited(row_kernel, *change) for name, change in faults.items()}

# %% [markdown]
# Would an ordinary test have found them? Here is one such as people write: some random logits, compared with the reference.

# %%
ordinary = np.random.default_rng(0).standard_normal((3, 2 * T)).astype(np.float32)
for name, kernel in broken.items():
    print(f"{name:36s} {'not found' if agrees(kernel, ordinary) else 'found'}")

# %% [markdown]
# Three of five escape: the numbers were too tame, and no thread was without work. Now let `hypothesis` look. `find` draws
# inputs until one fails, and then **shrinks** it: fewer rows, fewer columns, simpler numbers, as long as it still fails.


# %%
def look_for(kernel, seen=None):
    """The simplest logits for which the kernel is wrong; `seen` takes each array that was tried, and whether it failed."""

    def fails(z):
        failed = not agrees(kernel, z)
        if seen is not None:
            seen.append((z, failed))
        return failed

    search = settings(calm, max_examples=400)
    with np.errstate(all="ignore"):
        return find(logits, fails, settings=search, random=Random(0))


seen = {name: [] for name in broken}
smallest = {name: look_for(kernel, seen[name]) for name, kernel in broken.items()}
measured.Table(
    ("fault", "simplest logits for which it shows", "kernel", "reference"),
    [
        (
            name,
            str(z.tolist()).replace("nan", "NaN"),
            str(run(broken[name], z).round(3).tolist()),
            str(reference.logsumexp(z.astype(np.float64)).round(3).tolist()),
        )
        for name, z in smallest.items()
    ],
)

# %%
for name, z in smallest.items():
    assert not agrees(broken[name], z), name
    assert agrees(row_kernel, z), name
    assert z.shape[0] == 1, name

# %% [markdown]
# Read them: each tells what is wrong. A single logit, and the result is $-\infty$: the last entry is forgotten. A single logit,
# and three threads had none. Two logits in the same thread, four apart, of which the second is the larger.
#
# This is how the search for the second fault went. Each dot is an array that was tried.

# %% jupyter={"source_hidden": true}
tried = seen["the old sum is not rescaled"]
sizes = np.array([z.size for z, _ in tried])
failed = np.array([failed for _, failed in tried])
figure, axes = figures.new(6.8, 2.6)
index = np.arange(len(tried))
axes.plot(index[~failed], sizes[~failed], "o", ms=3, color=figures.light("line"), label="agrees")
axes.plot(index[failed], sizes[failed], "o", ms=4, color=figures.light("trouble"), label="fails")
best = np.minimum.accumulate(np.where(failed, sizes, 99))
axes.step(index[best < 99], best[best < 99], where="post", lw=1.2, color=figures.light("trouble"))
axes.set(xlabel="attempt", ylabel="numbers in the array", title="Found, then shrunk")
axes.legend()
figures.show(figure, "Sizes of the arrays that were tried, and those for which the kernel failed")

# %%
failures = [z for z, failed in tried if failed]
print("first failure:", failures[0].tolist())
print("last failure: ", failures[-1].tolist())

# %% [markdown]
# ## Measure it: where tolerances come from
#
# "$10^{-5}(1 + \max|z|)$" was promised above, not explained. float32 rounds each result to within $u = 2^{-24} = 6 \cdot
# 10^{-8}$ of itself. Follow the roundings through the kernel:
#
# * $z - m$ is rounded: an error of $u\,|z - m|$ in the exponent, which is a relative error of $e^{z-m}$. That matters only
#   where $e^{z - m}$ does: for $|z - m|$ up to about 20.
# * Sums of $V$ positive terms, one by one: at most $V u$, relative. The logarithm makes an absolute error of a relative one.
# * $m + \log s$ is rounded: $u\,|\text{lse}|$.
#
# All together: about $u\,(20 + V + |\text{lse}|)$. Here are 24 random rows, their true errors, and that bound:

# %%
u, V = 2.0**-24, 64
rng = np.random.default_rng(0)
rows = (rng.standard_normal((24, V)) * np.geomspace(0.1, 300, 24)[:, None]).astype(np.float32)
rows += np.linspace(-500, 500, 24)[:, None].astype(np.float32)
lse = reference.logsumexp(rows.astype(np.float64))
error = np.abs(run(row_kernel, rows) - lse)
bound = u * (20 + V + np.abs(lse))
assert (error <= bound).all()

# %% jupyter={"source_hidden": true}
figure, axes = figures.new(6.8, 2.6)
order = np.argsort(np.abs(lse))
axes.semilogy(
    np.abs(lse)[order], np.maximum(error[order], 1e-9), "o", ms=4, color=figures.light("z"), label="error of the kernel"
)
axes.semilogy(np.abs(lse)[order], bound[order], color=figures.light("survivor"), label="bound from the roundings")
axes.axhline(1e-2, color=figures.light("trouble"), lw=1, label="a tolerance as people choose it: 1e-2")
axes.set(xlabel="|log-sum-exp|", ylabel="absolute error", title="A bound that follows from the arithmetic")
axes.legend(loc="center right")
figures.show(figure, "Errors of the kernel, and the bound that follows from its roundings")

# %% [markdown]
# A tolerance that is a hundred thousand times larger than the errors lets faults through. Say somebody forgets one in a
# thousand entries of a large vocabulary. The log-sum-exp is then off by about $10^{-3}$: `1e-2` is content, the bound is not.
#
# Three rules that the tests of this project follow (`tests/helpers/checks.py`), each learnt from tests that passed and should
# not have:
#
# * Write `assert error <= tolerance`, never `if error > tolerance: fail`. NaN passes the second.
# * Relative errors are relative to something. A gradient of zeros must fail the test.
# * Break the kernel before you trust the test. A test that was never red is a guess.

# %%
nothing = np.zeros(4)
right = np.array([1e-6, -2e-6, 3e-6, 0.5e-6])  # a gradient, as small as gradients are
print("np.allclose(zeros, gradient) says:", np.allclose(nothing, right, atol=1e-5))
scale = np.abs(right).max()
print("relative to the gradient's own scale:", bool(np.all(np.abs(nothing - right) <= 1e-5 * scale)))

# %% [markdown]
# ## The package
#
# The shipped kernels are tested so: one suite for all of them, with shapes around each tile's edges, all dtypes, strides,
# options, ignored tokens and wrong numbers. Here is a small piece of it, on this machine.

# %%
problems = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))


@settings(calm, max_examples=8)
@given(problems)
def test_the_shipped_kernels(problem):
    N, V, D, seed = problem
    rng = np.random.default_rng(seed)
    e, c = rng.standard_normal((N, D), dtype=np.float32), rng.standard_normal((V, D), dtype=np.float32)
    targets = rng.integers(0, V, N)
    result = cce.forward(*map(xp.asarray, (e, c, targets)), backend="simt")
    right = reference.forward(e, c, targets)
    scale = 1 + np.abs(right.logits).max()
    assert np.all(np.abs(machine.to_host(result.lse) - right.lse) <= 1e-5 * scale)


test_the_shipped_kernels()
print("8 problems, and the shipped kernels agree with the reference for each")

# %% [markdown]
# ## Exercises
#
# 1. Write a property that needs no reference: adding a constant to all logits of a row adds it to the log-sum-exp. How many of
#    the five faults does it find?
# 2. Here is a sixth fault: entries beyond the sixteenth are ignored. Why does the search above not find it, and what do you
#    change?


# %% jupyter={"source_hidden": true}
def shifts(kernel, z):
    z = z.clip(-100, 100)
    with np.errstate(invalid="ignore"):
        gap = run(kernel, z + np.float32(8)) - (run(kernel, z) + 8)
    return bool(np.all(np.isnan(gap) | (np.abs(gap) <= 1e-4)))


tame = arrays(np.float32, st.tuples(st.integers(1, 2), st.integers(1, 9)), elements=st.floats(-90, 90, width=32))
unseen = []
for name, kernel in broken.items():
    try:
        find(tame, lambda z, kernel=kernel: not shifts(kernel, z), settings=settings(calm, max_examples=30), random=Random(0))
    except NoSuchExample:
        unseen.append(name)
print(f"exercise 1: the property finds {len(broken) - len(unseen)} of {len(broken)} faults")
# What forgets, does not rescale or subtracts the first logit instead of the largest shifts just as well: the property holds for
# many wrong functions. It is a good companion of a reference, not a substitute.

sixth = edited(row_kernel, "range(x, z.shape[1], T)", "range(x, min(z.shape[1], 16), T)")
test = settings(calm, max_examples=60)(given(logits)(lambda z: None if agrees(sixth, z) else 1 / 0))
test()  # not found: no array has more than 2 * T + 1 = 9 columns
wider = st.integers(1, 40).flatmap(lambda V: arrays(np.float32, (1, V), elements=st.floats(-10, 10, width=32)))
simplest = find(wider, lambda z: not agrees(sixth, z), settings=calm, random=Random(0))
print("exercise 2: found with", simplest.shape[1], "columns, once arrays may have 40")
assert simplest.shape[1] == 17

# %% [markdown]
# ## What to take away
#
# * State what holds for all inputs, draw them from the widest domain that makes sense, and let the program look.
# * A shrunk counterexample is an explanation.
# * A tolerance follows from number formats and lengths of sums. If you have to choose one, you do not know your errors yet.
#
# Next: [lesson 10](10_tensor_cores_from_python.ipynb), the fast lane.
