"""The recipes of docs/recipes.md: they run, are short, and compute what stored logits say."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import cce_numba.torch as cct  # noqa: E402
from cce_numba.torch import verl  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
B, T, V, D = 3, 6, 40, 5


@pytest.fixture
def recipes():
    names = {}
    for block in BLOCKS:
        exec(compile(block, "docs/recipes.md", "exec"), names)
    return SimpleNamespace(**{name: x for name, x in names.items() if not name.startswith("__")})


@pytest.fixture
def given():
    torch.manual_seed(0)
    e, c = torch.randn(B, T, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    ids = torch.randint(0, V, (B, T))
    log_p = (e.requires_grad_() @ c.requires_grad_().T).log_softmax(-1)
    return SimpleNamespace(e=e, c=c, ids=ids, log_p=log_p, logprobs=log_p.gather(-1, ids[..., None])[..., 0])


def check(given, loss, expected):
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        *(torch.autograd.grad(x.sum(), (given.e, given.c), retain_graph=True) for x in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_they_are_short():
    functions = re.findall(r"^(?:def|class) .*?(?=\n\n\n|\Z)", "\n\n\n".join(BLOCKS), re.DOTALL | re.MULTILINE)
    assert len(functions) == 9
    assert max(len(function.strip().splitlines()) for function in functions) <= 15


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_loss(recipes, given, temperature):
    old, advantages = given.logprobs.detach() + 0.3 * torch.randn(B, T), torch.randn(B, T, dtype=torch.float64)
    mask = (torch.rand(B, T) < 0.7).double()
    loss = recipes.policy_loss(given.e, given.c, given.ids, old, advantages, mask, temperature=temperature)
    log_p = (given.e @ given.c.T / temperature).log_softmax(-1)
    ratio = (log_p.gather(-1, given.ids[..., None])[..., 0] - old).exp()
    gain = torch.where(advantages > 0, torch.clamp(ratio, max=1.2) * advantages, torch.clamp(ratio, min=0.8) * advantages)
    entropy = -(log_p.exp() * log_p).sum(-1)
    check(given, loss, -((gain + 0.01 * entropy) * mask).sum() / mask.sum())


def test_dpo(recipes, given):
    ids = given.ids.clone()
    ids[1, 4:] = -100
    sums = recipes.answer_logprobs(given.e, given.c, ids)
    expected = torch.where(ids != -100, given.logprobs, 0).sum(-1)
    check(given, sums, expected)
    loss = recipes.dpo_loss(sums[:1], sums[1:2], sums.detach()[:1] - 1, sums.detach()[1:2] + 2)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(torch.tensor(-0.1 * (1 + 2), dtype=torch.float64)))


def test_kl_estimates(recipes):
    """On average over samples the first and the third are the KL, and the second is near it."""
    torch.manual_seed(1)
    p, q = torch.randn(2, 8, dtype=torch.float64).mul(0.3).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for kind, tolerance in (("k1", 1e-9), ("k2", 0.2), ("k3", 1e-9)):
        mean = (p.exp() * recipes.kl_estimate(p, q, kind)).sum()
        assert abs(mean - exact) <= tolerance * exact


def test_top_k_distillation(recipes, given):
    teacher_e, teacher_c = torch.randn(B, T, 7, dtype=torch.float64), torch.randn(V, 7, dtype=torch.float64)
    teacher = (teacher_e @ teacher_c.T).log_softmax(-1)
    top_ids, top_logprobs = recipes.teacher_entries(teacher_e, teacher_c, given.ids, k=8)
    best = teacher.topk(8)
    assert torch.equal(top_ids, best.indices)
    torch.testing.assert_close(top_logprobs, best.values)
    loss = recipes.top_k_distillation(given.e, given.c, top_ids, top_logprobs)
    rest = torch.ones(B, T, V, dtype=torch.bool).scatter(-1, best.indices, False)
    tail, own_tail = ((x.exp() * rest).sum(-1).log() for x in (teacher, given.log_p))
    expected = (best.values.exp() * (best.values - given.log_p.gather(-1, best.indices))).sum(-1)
    check(given, loss, (expected + tail.exp() * (tail - own_tail)).mean())


def test_candidates(recipes, given):
    candidates = torch.randint(0, V, (B, T, 4))
    scores = recipes.candidate_probabilities(given.e, given.c, candidates)
    torch.testing.assert_close(scores, (given.e @ given.c.T).gather(-1, candidates).softmax(-1))


def test_evaluation(recipes, given):
    ids = given.ids.clone()
    ids[0, :3] = -100
    ids[1] = given.log_p[1].argmax(-1)
    perplexity, accuracy = recipes.evaluate([(given.e[:2], ids[:2]), (given.e[2:], ids[2:])], given.c)
    counts = ids != -100
    logprobs = given.log_p.gather(-1, ids.where(counts, 0)[..., None])[..., 0]
    torch.testing.assert_close(perplexity, (-logprobs[counts].mean()).exp().detach())
    torch.testing.assert_close(accuracy, (given.log_p.argmax(-1) == ids)[counts].float().mean())


def test_verl(given):
    logprobs, entropy = verl.linear_cross_entropy(given.e, given.c, given.ids, 0.7, "none")
    log_p = (given.e @ given.c.T / 0.7).log_softmax(-1)
    check(given, logprobs, log_p.gather(-1, given.ids[..., None])[..., 0])
    check(given, entropy, -(log_p.exp() * log_p).sum(-1))
    with pytest.raises(ValueError, match="reduction: must be 'none'"):
        verl.linear_cross_entropy(given.e, given.c, given.ids, reduction="mean")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trl(recipes, temperature):
    """What TRL makes of stored logits: those of the last tokens, each of the token before, divided by the temperature."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model, ids = transformers.LlamaForCausalLM(config), torch.randint(0, V, (B, T))
    trainer = recipes.WithoutLogits()
    trainer.temperature, trainer.accelerator = temperature, SimpleNamespace(unwrap_model=lambda model: model)
    seen, kept = torch.ones(B, T, dtype=torch.long), 4
    seen[0, :2] = 0  # padding of a shorter prompt

    log_p = (model(input_ids=ids, attention_mask=seen).logits[:, -kept - 1 : -1] / temperature).log_softmax(-1)
    expected = log_p.gather(-1, ids[:, -kept:, None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    found = trainer._get_per_token_logps_and_entropies(model, ids, seen, kept, compute_entropy=True)
    weight = model.lm_head.weight
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        of_a, of_b = (torch.autograd.grad(x.sum(), weight, retain_graph=True)[0] for x in (a, b))
        torch.testing.assert_close(of_a, of_b, rtol=1e-4, atol=1e-5)
    assert trainer._get_per_token_logps_and_entropies(model, ids, seen, kept)[1] is None


def test_the_exact_kl_of_the_vocabulary(given):
    reference_c = torch.randn(V, D, dtype=torch.float64)
    other = (given.e.detach() @ reference_c.T).log_softmax(-1)
    loss = cct.linear_distillation(given.e, given.c, given.e.detach(), reference_c, kind="reverse_kl")
    check(given, loss, (given.log_p.exp() * (given.log_p - other)).sum(-1).mean())


def test_what_rounded_logits_cost():
    """The page's table, smaller: its errors are of these sizes."""
    torch.manual_seed(0)
    e, c = torch.randn(64, 256).bfloat16(), (torch.randn(4096, 256) * 8 / 16).bfloat16()
    z = e.double() @ c.double().T
    ids = torch.distributions.Categorical(logits=z).sample()
    exact, rounded = (x.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for x in (z, z.float().bfloat16()))
    ours = cct.linear_logprobs(e, c, ids).logprobs.double()
    assert (rounded - exact).abs().mean() > 5e-3
    assert (ours - exact).abs().mean() < 2e-6
    assert (ours - exact).abs().max() < 1e-5
