# %% [markdown]
# # 1 · The problem: a huge matrix that nobody wants
#
# A language model ends in one linear layer and one loss. With a large vocabulary, that last step can take more memory than the
# rest of the model. In this lesson you will
#
# * look at the logits of a real model, and at the loss that is made of them,
# * see how much memory they take, and why,
# * split the loss into two pieces, neither of which needs all logits at the same time.
#
# You need Python and NumPy. No GPU is needed for any lesson: Numba, which compiles Python functions for NVIDIA's GPUs, has a
# simulator that runs the same functions on any computer.

# %%
import lessons

machine = lessons.begin()

# %%
import numpy as np

import cce_numba as cce
import reference
from lessons import drawings, figures, measured, texts

# %% [markdown]
# ## What a model says
#
# A language model has a fixed **vocabulary**: a list of words and pieces of words, its *entries*. It reads a text as a row of
# these pieces, the **tokens**. At each token it guesses which entry comes next, and gives one number to every entry, its
# **logit**. The larger the logit, the likelier the model holds that entry to come next.
#
# Here are 128 tokens of *Moby Dick*, and what SmolLM2 (a model of 135 million parameters, with a vocabulary of 49152 entries)
# thought at each of them: a matrix of logits with a row for each token and a column for each entry.

# %%
real = texts.smollm2()
real.logits.shape

# %%
n = 91  # one of the tokens
top = np.argsort(-real.logits[n])[:6]
probabilities = reference.softmax(real.logits[n : n + 1])[0]
context = "".join(real.text(real.targets[n - 12 : n]))
print("…" + context)
drawings.bars(
    [(real.words[v].strip() or "␣", 100 * probabilities[v]) for v in top], "z", "The six likeliest entries to come next", "%",
    marked=real.words[real.targets[n]].strip(),
)  # fmt: skip

# %% [markdown]
# The full bar is the entry that really came next, the token's *target*. The percentages are made of logits by the **softmax**:
# if $z_v$ is the token's logit of entry $v$, the probability of that entry is
#
# $$ p_v = \frac{e^{z_v}}{\sum_w e^{z_w}} $$
#
# where the sum goes over all entries $w$ of the vocabulary. The **loss** of a token is $-\log p$ of its target. The logarithm
# is the natural one, and its unit is called *nat*. A loss of 0 means "I was certain"; one of 3 nats means "I gave it 5 %".

# %%
probabilities = reference.softmax(real.logits)
nll = -np.log(probabilities[np.arange(128), real.targets])
drawings.told_words(real.text(real.targets[:64]), nll[:64], "The taller the bar under a word, the more it surprised the model")

# %% [markdown]
# ## Where logits come from
#
# For each of $N$ tokens the model has computed a vector of $D$ numbers, its embedding: a row of the matrix $e$. For each of the
# $V$ entries of the vocabulary, the model's last layer (the *classifier*) has one, too: a row of the matrix $c$. A logit is
# their dot product, so all of them together are one matrix product:
#
# $$ z = e\, c^\top, \qquad z_{nv} = \sum_d e_{nd}\, c_{vd} $$
#
# In this project the letters are always these: `e (N, D)`, `c (V, D)`, `targets (N,)`, and `z (N, V)` for the logits. The loss
# in NumPy takes four lines.

# %%
rng = np.random.default_rng(0)
N, V, D = 6, 20, 10
e = rng.standard_normal((N, D)).astype(np.float32)
c = rng.standard_normal((V, D)).astype(np.float32)
targets = rng.integers(0, V, N)


def plain_loss(e, c, targets):
    z = e @ c.T  # (N, V): all logits, stored
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)  # stored once more
    return -np.log(p[np.arange(len(e)), targets]).mean()


loss = plain_loss(e, c, targets)
assert np.isclose(loss, reference.forward(e, c, targets).loss)
loss

# %% [markdown]
# `reference` is a small package in this repository: plain NumPy in float64, which stores the logits. It is the definition of
# right, and every kernel in these lessons is tested against it.
#
# ## How much memory that is
#
# $e$ and $c$ are tall and narrow. Their product is not: this is the last layer of Gemma 2 (2 billion parameters) with 8192
# tokens, drawn to scale.

# %%
drawings.last_layer()

# %% jupyter={"source_hidden": true}
models = {"GPT-2": 50257, "Llama 3": 128256, "Qwen 2.5": 151936, "Gemma 2": 256000}
tokens = 8192
figure, axes = figures.new(6.6, 3.0)
axes.plot([0, 262144], [0, tokens * 262144 * 4 / 1e9], color=figures.light("z"), label="logits, stored once in float32")
for name, vocabulary in models.items():
    gigabytes = tokens * vocabulary * 4 / 1e9
    axes.plot(vocabulary, gigabytes, "o", color=figures.light("z"))
    axes.annotate(
        f"{name}\n{gigabytes:.1f} GB",
        (vocabulary, gigabytes),
        xytext=(-6, 7),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
axes.axhline(0.35 * 2**20 / 1e9, color=figures.light("survivor"), label="this package's loss, memory of its own: 0.35 MiB")
axes.set(
    xlabel="vocabulary entries V", ylabel="GB for N = 8192 tokens", ylim=(-0.3, 10), title="Memory grows with the vocabulary"
)
axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.98))
figures.show(figure, "Memory of stored logits against the vocabulary")

# %% [markdown]
# And once is not enough. A training step stores the logits, their probabilities, the gradient of the loss with respect to them,
# and often a copy in another number format. Here is a whole training step of a small transformer, as it was measured on an
# H100, a GPU for data centres with 80 GB of memory.

# %% jupyter={"source_hidden": true}
step = measured.benchmark("training_step_h100")
measured.Table(
    ("loss", "how PyTorch runs", "memory, GB", "ms a step"),
    [
        (row["loss"], row["way"], row["peak_bytes"] / 1e9, row["median_ms"])
        for row in step["step"]["rows"]
        if "peak_bytes" in row
    ],
    "8 × 1024 tokens, V = 131072, 4 layers of 768. " + measured.source(step),
)

# %% [markdown]
# And this is one loss with its gradients for the shape of Gemma 2, by several ways of computing it: the memory that each needs
# beyond its inputs. 1161 MiB of that are the gradients themselves, which everybody has to store.

# %% jupyter={"source_hidden": true}
peers = measured.benchmark("peers_h100")
memory = {}
for method in peers["methods"]:
    if method["setting"] in ("logits stored", "matmul + cross_entropy", "default") and method["extra_mib"]:
        memory.setdefault("this package" if method["name"] == "cce_numba" else method["name"], method["extra_mib"])
order = sorted(memory, key=memory.get, reverse=True)
title = "Memory of a loss with gradients, N = 8192, V = 256000, D = 2304"
drawings.bars([(name, memory[name]) for name in order], "z", title, "MiB", width=620)

# %% [markdown]
# ## Split the loss
#
# Take the logarithm of the softmax apart:
#
# $$
# -\log p_\text{target} \;=\; \underbrace{\log \sum_v e^{z_v}}_{\text{log-sum-exp}} \;-\;
# \underbrace{z_\text{target}}_{\text{indexed dot}}
# $$
#
# * The **indexed dot** needs one logit per token, that is one dot product of a row of $e$ with one row of $c$.
# * The **log-sum-exp** needs every logit, but only for a moment: each adds its $e^z$ to a sum, and is not needed again.
#
# So go through the vocabulary a few entries at a time, and keep one number per token in between. The logits of all tokens for
# these few entries are called a **tile**.


# %%
def frugal_loss(e, c, targets, block_v=8):
    target_logit = np.sum(e * c[targets], axis=1)  # (N,): one dot product per token
    total = np.zeros(len(e))  # (N,): all that is kept of the logits
    for v0 in range(0, len(c), block_v):
        z = e @ c[v0 : v0 + block_v].T  # a tile (N, block_v): used here, then overwritten
        total += np.exp(z).sum(axis=1)
    return (np.log(total) - target_logit).mean()


assert np.isclose(frugal_loss(e, c, targets), loss)
frugal_loss(e, c, targets), loss

# %% [markdown]
# That is the idea of *Cut Cross-Entropy* ([Wijmans et al., ICLR 2025](https://arxiv.org/abs/2411.09009)), and of this package.
# Two things are missing. `np.exp(z)` overflows when logits are large, which lesson 2 mends. And a GPU has to be kept busy
# meanwhile, which lessons 3 to 6 are about.
#
# ## Measure it
#
# The package does the same on a CPU, too. `tracemalloc` counts what NumPy allocates.

# %%
import tracemalloc


def peak_mib(function):
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


rng = np.random.default_rng(1)
N, V, D = 256, 32768, 64
big_e = rng.standard_normal((N, D), dtype=np.float32)
big_c = rng.standard_normal((V, D), dtype=np.float32) / 8
big_targets = rng.integers(0, V, N)
loss_of = {
    "NumPy, logits stored": lambda: plain_loss(big_e, big_c, big_targets),
    "NumPy, tile by tile": lambda: frugal_loss(big_e, big_c, big_targets, 1024),
    "cce_numba on the CPU": lambda: cce.linear_cross_entropy(big_e, big_c, big_targets, backend="cpu"),
}
assert np.ptp([float(function()) for function in loss_of.values()]) < 1e-4
measured.Table(
    ("loss", "memory, MiB", "ms"),
    [(name, peak_mib(function), machine.cpu_ms(function, 3)) for name, function in loss_of.items()],
    f"N = {N}, V = {V}, D = {D}; the stored logits alone are {N * V * 4 / 2**20:.0f} MiB. Measured on this CPU.",
)

# %% [markdown]
# ## Exercises
#
# 1. Add the same number to all logits of a token. What happens to its loss? Predict it from the split above, then try it.
# 2. A GPU has 80 GB. With Llama 3's vocabulary and logits stored three times in float32 (logits, probabilities, their
#    gradient), how many tokens fit, if nothing else needs memory?
#
# The solutions are folded away below.

# %% jupyter={"source_hidden": true}
# Exercise 1: both the log-sum-exp and the target's logit grow by that number, so the loss stays.
shifted = real.logits + 5.0
again = reference.logsumexp(shifted) - shifted[np.arange(128), real.targets]
assert np.allclose(again, nll, atol=1e-5)

# Exercise 2: each token takes 3 * 4 * V bytes.
most = 80e9 / (3 * 4 * models["Llama 3"])
print(f"exercise 1: the largest change is {np.abs(again - nll).max():.1e} nats; exercise 2: {most:,.0f} tokens")
assert 51_000 < most < 53_000

# %% [markdown]
# ## What to take away
#
# * Logits are `N × V` numbers, made of `N × D` and `V × D`. With a large vocabulary they are the largest thing in training,
#   several times over.
# * The loss of a token is its log-sum-exp less its target's logit. The first folds tile by tile; the second is one dot product.
# * So logits need never be stored. What remains is to compute them as fast as if they were.
#
# Next: [lesson 2](02_online_log_sum_exp.ipynb), where the sum of exponentials learns not to overflow.
