"""PEFT's adapters on the output head, and models in PEFT's wrappers."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
from cce_numba.transformers import patch, unpatch  # noqa: E402
from tests.transformers.models import Shapes, V, assert_same, has_no_logits, make, step  # noqa: E402

# By what is on the head: the model, and what is given to LoraConfig.
ON_THE_HEAD = {
    "nothing": ("Llama", {"target_modules": ["q_proj"]}),
    "modules_to_save": ("Llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "modules_to_save, both": ("Llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "modules_to_save, tied": (
        "Llama tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "lora": ("Llama", {"target_modules": ["q_proj", "lm_head"]}),
    "lora on a head with a bias": ("Phi", {"target_modules": ["lm_head"], "lora_bias": False}),
    "lora before a softcap": ("Gemma2 untied", {"target_modules": ["lm_head"]}),
    "lora before a scale": ("Granite", {"target_modules": ["lm_head"]}),
    "lora with a bias": ("Llama", {"target_modules": ["lm_head"], "lora_bias": True}),
    "lora, all linear": ("Llama", {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    "lora, tied": ("Llama tied", {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "dora": ("Llama", {"target_modules": ["lm_head"], "use_dora": True}),
    "rslora": ("Llama", {"target_modules": ["lm_head"], "use_rslora": True}),
    "tokens": ("Llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7]}}),
    "tokens, both": ("Llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3], "embed_tokens": [7]}}),
    "tokens, tied": ("Llama tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
}


def config_of(kind, **more):
    return peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **ON_THE_HEAD[kind][1], **more)


def adapted(kind, model=None, **more):
    """A model with adapters whose parameters are not those that do nothing, which they are made with."""
    model = peft.get_peft_model(make(ON_THE_HEAD[kind][0]) if model is None else model, config_of(kind, **more)).train()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("kind", ON_THE_HEAD)
def test_same_loss_and_gradients(kind, batch):
    model = adapted(kind)
    expected = step(model, **batch)
    assert patch(model, filter_eps=None) is model
    with Shapes() as shapes:
        actual = step(model, **batch)
    assert_same(actual, expected)
    assert has_no_logits(actual[0])
    assert not shapes.has_logits()
    if kind != "nothing":
        assert any("lm_head" in name or "embed" in name for name in expected[1])
    assert unpatch(model) is model
    assert model(**batch).loss == expected[0].loss


def test_adapters_before_and_after_the_patch(batch):
    expected = step(adapted("lora"), **batch)
    model = adapted("lora", patch(make(), filter_eps=None))
    assert_same(step(model, **batch), expected)
    assert unpatch(model)(**batch).loss == expected[0].loss


def test_the_dropout_of_an_adapter(batch):
    model = adapted("lora", lora_dropout=0.5)
    torch.manual_seed(4)
    expected = step(model, **batch)
    patch(model, filter_eps=None)
    torch.manual_seed(4)
    assert_same(step(model, **batch), expected)


def test_two_adapters_and_none(batch):
    model = adapted("lora")
    model.add_adapter("other", config_of("lora"))
    for active in (["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        expected = step(model, **batch)
        assert_same(step(patch(model, filter_eps=None), **batch), expected)
        unpatch(model)
    with model.disable_adapter(), torch.no_grad():
        expected = model(**batch).loss
        torch.testing.assert_close(patch(model)(**batch).loss, expected)
    unpatch(model)


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "tokens, tied"])
def test_merged_and_unloaded(kind, batch):
    """What is left is the model within, still patched."""
    model = patch(adapted(kind), filter_eps=None)
    expected = model(**batch).loss
    merged = model.merge_and_unload()
    assert type(merged.get_output_embeddings()) is torch.nn.Linear
    output = merged(**batch)
    assert has_no_logits(output)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    unpatch(merged)
    assert type(merged) is getattr(transformers, type(merged).__name__)
    assert merged(**batch).logits.shape[-1] == V


@pytest.mark.parametrize("kind", ["lora", "modules_to_save"])
def test_copies_and_saved_adapters(kind, batch, tmp_path):
    model = patch(adapted(kind), filter_eps=None)
    expected = step(model, **batch)
    assert_same(step(copy.deepcopy(model), **batch), expected)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path).train()
    torch.testing.assert_close(loaded(**batch).loss, expected[0].loss)


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "tokens"])
@pytest.mark.parametrize("how", ["16 bits", "autocast"])
def test_16_bits(kind, how, batch):
    """Adapters may have more bits than the model. Gradients are no further from those of 32 bits than they were."""
    model = adapted(kind)
    exact = step(model, **batch)
    if how == "16 bits":
        model.bfloat16()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        expected = step(model, **batch)
        actual = step(patch(model, filter_eps=None), **batch)
    assert actual[1].keys() == exact[1].keys()
    assert abs(actual[0].loss.item() - exact[0].loss.item()) <= 2.0**-6 * exact[0].loss.item()
    for name, grad in exact[1].items():
        before, now = ((grads[name].float() - grad).norm().item() for _, grads in (expected, actual))
        assert now <= 1.5 * before + 2.0**-8 * grad.norm().item(), f"{name}: {before} -> {now} off"
