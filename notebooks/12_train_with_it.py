# %% [markdown]
# # 12 · Train with it
#
# All of this was for training. In this lesson you will
#
# * train a small language model, with stored logits and without, and lay the curves over each other,
# * see what filters do to a model that knows nothing yet,
# * use the same loss from PyTorch, and in models of Hugging Face's `transformers`.
#
# It runs on a CPU in some seconds. On a GPU the same cells run there.

# %%
import lessons

machine = lessons.begin(simulator=False)

# %%
import time
import tracemalloc

import numpy as np

import cce_numba as cce
import reference
from lessons import figures, measured, texts

xp = machine.array_module()  # CuPy on a GPU, else NumPy

# %% [markdown]
# ## The text
#
# 60000 tokens of addresses of US presidents to Congress, by SmolLM2's tokenizer, numbered anew: 5401 different ones.

# %%
tokens, words = texts.addresses()
V = len(words)
print(f"{len(tokens)} tokens, {V} entries")
print("".join(words[token] for token in tokens[:40]) + " …")

# %% [markdown]
# ## The model
#
# Small enough to write its gradient by hand. From the four tokens before, it guesses the next one: four rows of an embedding
# table side by side, a layer with tanh, and then this package's subject, the classifier. (It is the neural language model of
# Bengio and others, 2003.)
#
# The only line that knows how the loss is made is `loss_and_gradients`. It is handed a function that takes `e (N, D)`, `c (V,
# D)` and the targets, and gives the loss, its gradient with respect to `e`, and with respect to `c`.

# %%
CONTEXT, EMBEDDED, D = 4, 32, 64


def new_model(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"table": (V, EMBEDDED), "layer": (CONTEXT * EMBEDDED, D), "c": (V, D)}
    return {name: xp.asarray(0.1 * rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}


def add_at(array, index, values):
    """array[index] += values, where an index may occur more than once."""
    if machine.has_gpu():
        import cupyx

        cupyx.scatter_add(array, index, values)
    else:
        np.add.at(array, index, values)


def loss_and_gradients(model, context, targets, cross_entropy):
    x = model["table"][context].reshape(len(context), -1)  # (N, CONTEXT * EMBEDDED)
    e = xp.tanh(x @ model["layer"])  # (N, D)
    loss, d_e, d_c = cross_entropy(e, model["c"], targets)
    d_inner = d_e * (1 - e * e)  # the derivative of tanh
    d_table = xp.zeros_like(model["table"])
    add_at(d_table, context.ravel(), (d_inner @ model["layer"].T).reshape(-1, EMBEDDED))
    return loss, {"table": d_table, "layer": x.T @ d_inner, "c": d_c}


def stored(e, c, targets):
    """The loss in plain NumPy or CuPy: logits stored, probabilities stored."""
    z = e @ c.T
    z -= z.max(axis=1, keepdims=True)
    p = xp.exp(z)
    p /= p.sum(axis=1, keepdims=True)
    rows = xp.arange(len(e))
    loss = -xp.log(p[rows, targets]).mean()
    p[rows, targets] -= 1
    p /= len(e)
    return loss, p @ c, p.T @ e


def cut(e, c, targets, **options):
    """The loss of this package: no logits."""
    loss, grads = cce.linear_cross_entropy_with_grad(e, c, targets, **options)
    return loss, grads.e, grads.c


# %% [markdown]
# First, a test. Nudge one number of each parameter; the loss must change by what the gradient says. The reference, in float64,
# tells the loss.


# %%
def batch(start, size):
    """Contexts (size, CONTEXT) and what comes next, from a place in the text on."""
    window = np.lib.stride_tricks.sliding_window_view(tokens[start : start + size + CONTEXT], CONTEXT + 1)
    return xp.asarray(window[:, :CONTEXT]), xp.asarray(window[:, CONTEXT])


model = new_model()
context, targets = batch(1000, 64)
_, gradients = loss_and_gradients(model, context, targets, cut)


def loss_in_float64(nudged):
    m = {name: machine.to_host(value).astype(np.float64) for name, value in nudged.items()}
    e = np.tanh(m["table"][machine.to_host(context)].reshape(64, -1) @ m["layer"])
    return reference.forward(e, m["c"], machine.to_host(targets)).loss


for name, place in (("table", (int(context[5, 2]), 7)), ("layer", (3, 4)), ("c", (int(targets[9]), 11))):
    ends = []
    for step in (1e-3, -1e-3):
        nudged = {key: machine.to_host(value).astype(np.float64) for key, value in model.items()}
        nudged[name][place] += step
        ends.append(loss_in_float64(nudged))
    slope, by_gradient = (ends[0] - ends[1]) / 2e-3, float(gradients[name][place])
    print(f"{name}{place}: nudged {slope:+.6f}, gradient {by_gradient:+.6f}")
    assert abs(slope - by_gradient) < 1e-5

# %% [markdown]
# ## Training
#
# Adam, batches of 128 tokens, 120 steps. Four runs, from the same beginning, with the same batches:
#
# * logits stored,
# * this package, exact,
# * this package with filters at a threshold of $2^{-7}$, which is very coarse for a beginner: a model that knows nothing gives
#   each entry a probability near $1/5401 = 2^{-12.4}$. One run with the filter that drops, and so keeps nothing but the targets
#   at first. One with the package's default, roulette, by which one entry in 40 survives, and counts 40 times (lesson 7).


# %%
def train(cross_entropy, steps=120, size=128, rate=5e-3, seed=0):
    """Losses of each step, the model, and seconds."""
    model, rng = new_model(), np.random.default_rng(seed)
    moments = {name: [xp.zeros_like(value), xp.zeros_like(value)] for name, value in model.items()}
    losses, begin = [], time.perf_counter()
    for step in range(1, steps + 1):
        context, targets = batch(int(rng.integers(len(tokens) - size - CONTEXT)), size)
        loss, gradients = loss_and_gradients(model, context, targets, cross_entropy)
        losses.append(float(loss))
        for name, gradient in gradients.items():
            first, second = moments[name]
            first += 0.1 * (gradient - first)
            second += 0.01 * (gradient * gradient - second)
            model[name] -= rate * (first / (1 - 0.9**step)) / (xp.sqrt(second / (1 - 0.99**step)) + 1e-8)
    return np.array(losses), model, time.perf_counter() - begin


runs = {
    "logits stored": train(stored),
    "cce_numba, exact": train(lambda e, c, t: cut(e, c, t, filter_eps=None)),
    "2^-7, unbiased": train(lambda e, c, t: cut(e, c, t, filter_eps=2.0**-7)),
    "2^-7, drop": train(lambda e, c, t: cut(e, c, t, filter="drop", filter_eps=2.0**-7)),
}
for name, (losses, _, seconds) in runs.items():
    print(f"{name:30s} loss {losses[0]:.3f} -> {losses[-20:].mean():.3f}, {seconds:.1f} s")


# %% jupyter={"source_hidden": true}
def smooth(losses, width=9):
    return np.convolve(losses, np.ones(width) / width, mode="valid")


figure, axes = figures.new(6.8, 3.0)
looks = ("z", "-", 4), ("ink", "--", 1.8), ("survivor", "-", 1.8), ("trouble", "-", 1.8)
for (name, (losses, _, _)), (colour, style, width) in zip(runs.items(), looks, strict=True):
    axes.plot(smooth(losses), style, color=figures.light(colour), lw=width, alpha=0.55 if width == 4 else 1, label=name)
axes.set(xlabel="step", ylabel="loss, nats", title="The same curve without the logits, and what two filters do")
axes.legend()
figures.show(figure, "Training loss with stored logits, without, and with two filters at the same coarse threshold")

# %%
plain, exact, unbiased, drop = (losses for losses, _, _ in runs.values())
assert np.abs(exact[:20] - plain[:20]).max() < 1e-3  # the same to rounding, which grows from step to step
assert abs(exact[-20:].mean() - plain[-20:].mean()) < 0.05
assert drop[-20:].mean() > exact[-20:].mean() + 0.3
assert unbiased[-20:].mean() < exact[-20:].mean() + 0.1
print(f"largest difference of the first 20 losses: {np.abs(exact[:20] - plain[:20]).max():.1e}")

# %% [markdown]
# With and without logits it is one curve. With the filter that drops the model does learn at first, from the targets alone: it
# pushes up what occurs. But it hardly ever pushes anything down, and so it gets worse again. With roulette at the same
# threshold the model is slower at first, since so much noise keeps Adam's steps small. But the noise averages out: from step 50
# on the curve is that of exact gradients, and stays with it.
#
# The default threshold is $2^{-28}$ for float32, by which everything survives here, and $2^{-12}$ for bfloat16. (Each step has
# other targets here, so draws differ from step to step. If you train on the same batches again, hand over another
# `filter_seed`.)
#
# What has it learnt? Let it write.


# %%
def write(model, count=40, seed=2):
    rng, text = np.random.default_rng(seed), list(tokens[:CONTEXT])
    host = {name: machine.to_host(value) for name, value in model.items()}
    for _ in range(count):
        e = np.tanh(host["table"][np.array(text[-CONTEXT:])].reshape(1, -1) @ host["layer"])
        p = reference.softmax(1.3 * (e @ host["c"].T).astype(np.float64))[0]
        text.append(int(rng.choice(V, p=p)))
    return "".join(words[token] for token in text)


print(write(runs["cce_numba, exact"][1]))

# %% [markdown]
# Congress would not pass it, after 120 steps, but it has found spaces, commas and "of the".
#
# ## Memory
#
# Of one loss with gradients, for more tokens at once:


# %%
def peak_mib(cross_entropy, N=2048):
    rng = np.random.default_rng(0)
    e, c = rng.standard_normal((N, D), dtype=np.float32), rng.standard_normal((V, D), dtype=np.float32) / 8
    targets = rng.integers(0, V, N)
    tracemalloc.start()
    cross_entropy(e, c, targets)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


if not machine.has_gpu():
    ours, theirs = peak_mib(cut), peak_mib(stored)
    gradients_mib = 4 * (2048 + V) * D / 2**20
    print(f"N = 2048: logits stored {theirs:.0f} MiB; cce_numba {ours:.0f} MiB, of which gradients {gradients_mib:.1f}")
    assert ours < theirs / 2
step = measured.benchmark("training_step_h100")
measured.Table(
    ("loss", "how PyTorch runs", "GB", "ms a step", "tokens a second"),
    [(r["loss"], r["way"], r["peak_bytes"] / 1e9, r["median_ms"], r["tokens_per_s"]) for r in step["step"]["rows"]],
    "A transformer of 4 layers of 768, 8 × 1024 tokens, V = 131072. " + measured.source(step),
)

# %% [markdown]
# ## From PyTorch
#
# `cce_numba.torch` has the same loss with autograd, under the names that users of `cut_cross_entropy` know. And a whole model
# of `transformers` is patched in one line: `cce_numba.transformers.patch(model)`.

# %%
try:
    import torch
except ImportError:
    torch = None
    print("PyTorch is not installed: pip install 'cce_numba[torch]'")

if torch is not None:
    from cce_numba.torch import linear_cross_entropy

    layer = torch.nn.Linear(D, V, bias=False)
    hidden = torch.randn(32, D, requires_grad=True)
    wanted = torch.randint(0, V, (32,))

    linear_cross_entropy(hidden, layer.weight, wanted).backward()
    ours = hidden.grad.clone(), layer.weight.grad.clone()

    hidden.grad = layer.weight.grad = None
    torch.nn.functional.cross_entropy(layer(hidden), wanted).backward()
    for mine, theirs in zip(ours, (hidden.grad, layer.weight.grad), strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    print("gradients agree with torch.nn.functional.cross_entropy on stored logits")

# %% [markdown]
# ## Exercises
#
# 1. **Micro-batches.** Split a batch of 64 into two of 32, and add up the gradients without a second array: `out=` and
#    `accumulate=True`. Show that the result is that of the whole batch. (With `reduction="sum"`, or mind the mean.)
# 2. **Instruction tuning.** Often only answers count, not questions. Give the first 48 of 64 tokens the target -100, and show
#    that the gradient of their embeddings is 0, and that the loss is the mean over the other 16.

# %% jupyter={"source_hidden": true}
rng = np.random.default_rng(3)
e = xp.asarray(rng.standard_normal((64, D), dtype=np.float32))
c = xp.asarray(rng.standard_normal((V, D), dtype=np.float32) / 8)
targets = xp.asarray(rng.integers(0, V, 64))

_, whole = cce.linear_cross_entropy_with_grad(e, c, targets, reduction="sum")
total = cce.Gradients(c=xp.zeros_like(c))
for half in (slice(0, 32), slice(32, 64)):
    cce.linear_cross_entropy_with_grad(e[half], c, targets[half], reduction="sum", wrt="c", out=total, accumulate=True)
np.testing.assert_allclose(machine.to_host(total.c), machine.to_host(whole.c), atol=1e-5)

masked = targets.copy()
masked[:48] = -100
loss, grads = cce.linear_cross_entropy_with_grad(e, c, masked)
alone = cce.linear_cross_entropy(e[48:], c, targets[48:])
assert (machine.to_host(grads.e)[:48] == 0).all()
assert abs(float(loss) - float(alone)) < 1e-5
print("exercise 1: two halves make the whole; exercise 2:", float(loss), "=", float(alone))

# %% [markdown]
# ## What to take away
#
# * Cutting the logits changes memory and time, and no number that a training run would see.
# * A filter that is right on average may be coarse from the first step on: it costs noise. One that drops misleads a beginner.
#
# That was the last lesson. Where to go from here: `cce_numba/simt/` is the code you know by now; `cce_numba/hopper/` is the
# fast one, and `benchmarks/NOTES.md` its diary. If you find a step up the ladder, we would like to hear of it.
