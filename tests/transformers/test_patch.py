"""Patched models of transformers, tiny and randomly initialised, against the same models as they were."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from cce_numba.transformers import patch, unpatch  # noqa: E402
from cce_numba.transformers.logits import NoLogits  # noqa: E402
from tests.conftest import skip_or_fail_without_gpu  # noqa: E402
from tests.transformers.models import (  # noqa: E402
    MODELS,
    B,
    S,
    Shapes,
    V,
    assert_same,
    has_no_logits,
    make,
    step,
    unpatched_and_patched,
)

README = Path(__file__).parent.parent.parent / "README.md"


@pytest.mark.parametrize("name", MODELS)
def test_same_loss_and_gradients(name, batch):
    model = make(name)
    names = list(model.state_dict())
    actual, expected = unpatched_and_patched(model, batch)
    assert_same(actual, expected)
    assert list(model.state_dict()) == names
    assert has_no_logits(actual[0])
    assert list(actual[0]) == list(expected[0])


def test_the_options_do_something():
    """Softcaps and scales of the configurations above change the loss: it was not by chance that they were equal."""
    tokens = torch.arange(3, 3 + S)[None]
    for name, field, other in [
        ("Gemma2", "final_logit_softcapping", None),
        ("Cohere", "logit_scale", 1.0),
        ("Granite", "logits_scaling", 1.0),
    ]:
        model = patch(make(name))
        losses = [model(tokens, labels=tokens).loss.item()]
        setattr(model.config, field, other)
        if name == "Cohere":
            model.logit_scale = other
        losses.append(model(tokens, labels=tokens).loss.item())
        assert abs(losses[0] - losses[1]) > 1e-3, name


@pytest.mark.parametrize("name", ["Llama tied", "Gemma2", "Granite", "Phi"])
def test_logits_are_not_made(name, batch):
    model = make(name)
    for is_patched in (False, True):
        if is_patched:
            patch(model)
        with Shapes() as shapes:
            model(**batch).loss.backward()
        assert shapes.has_logits() != is_patched


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@pytest.mark.parametrize("n_items", [7, torch.tensor(29)])
def test_num_items_in_batch(name, n_items, batch):
    assert_same(*unpatched_and_patched(make(name), batch | {"num_items_in_batch": n_items}))


def test_shift_labels_and_ignore_index(batch):
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    assert_same(*unpatched_and_patched(make(), batch | {"shift_labels": shifted}))
    first = batch["labels"][0, 5].item()
    assert_same(*unpatched_and_patched(make(), batch | {"labels": batch["input_ids"], "ignore_index": first}))


@pytest.mark.parametrize("kept", [5, torch.arange(2, 7)], ids=str)
def test_logits_to_keep(kept, batch):
    model = make()
    labels = batch["labels"][:, -5:] if isinstance(kept, int) else batch["labels"][:, kept]
    inputs = batch | {"logits_to_keep": kept, "labels": labels}
    expected = step(model, **inputs)
    assert_same(step(patch(model, filter_eps=None), **inputs), expected)


def test_all_labels_ignored(batch):
    inputs = batch | {"labels": torch.full((B, S), -100)}
    (output, grads), (expected, _) = unpatched_and_patched(make(), inputs)
    assert output.loss.isnan() == expected.loss.isnan()
    assert all(not grad.any() for grad in grads.values())


def test_what_else_was_asked_for_is_returned(batch):
    model = make()
    inputs = batch | {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    expected, output = model(**inputs), patch(model)(**inputs)
    for a, b in zip(output.hidden_states + output.attentions, expected.hidden_states + expected.attentions, strict=True):
        assert torch.equal(a, b)
    assert output.past_key_values.get_seq_length() == S


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_tuples(name, batch):
    model = make(name)
    inputs = batch | {"return_dict": False, "output_hidden_states": True}
    expected = step(model, **inputs)
    actual = step(patch(model, filter_eps=None), **inputs)
    assert_same(actual, expected)
    assert isinstance(actual[0], tuple)
    assert len(actual[0]) == len(expected[0])
    assert isinstance(actual[0][1], NoLogits)
    assert torch.equal(actual[0][2][0], expected[0][2][0])


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere"])
def test_evaluation_and_no_labels_are_as_they_were(name, batch):
    model, patched = make(name), patch(make(name))
    tokens = batch["input_ids"]
    for training in (False, True):
        assert torch.equal(patched.train(training)(tokens).logits, model.train(training)(tokens).logits)
    actual, expected = (x.eval()(**batch) for x in (patched, model))
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)
    generated = [x.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0) for x in (patched, model)]
    assert torch.equal(*generated)


def test_in_training_mode_without_grad(batch):
    model = patch(make())
    with torch.no_grad():
        output = model(**batch)
    assert has_no_logits(output)
    assert not output.loss.requires_grad


def test_labels_by_position(batch):
    model = patch(make())
    place = list(inspect.signature(model.forward).parameters).index("labels")
    output = model(batch["input_ids"], *[None] * (place - 1), batch["labels"])
    assert has_no_logits(output)
    assert torch.equal(output.loss, model(**batch).loss)


def test_gradient_checkpointing(batch):
    model = make()
    expected = step(model, **batch)
    model.gradient_checkpointing_enable()
    assert_same(step(patch(model, filter_eps=None), **batch), expected)


def test_autocast(batch):
    model = patch(make())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    unpatch(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).loss
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=2.0**-7, atol=0)


def test_bfloat16(batch):
    model = make("Gemma2").bfloat16()
    expected = unpatch(model)(**batch).loss
    loss = patch(model)(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2.0**-7, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-5)], ids=str)
@pytest.mark.parametrize("name", ["Llama tied", "Qwen3", "Gemma2", "Mistral", "Phi3"])
def test_on_a_gpu(name, dtype, rtol, batch):
    """By norms: products there are rounded otherwise, and gradients with 16 bits differ by some rounding of each layer."""
    skip_or_fail_without_gpu()
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    model = make(name).to("cuda", dtype)
    on_device = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
    (output, grads), (expected, expected_grads) = unpatched_and_patched(model, on_device)
    assert has_no_logits(output)
    torch.testing.assert_close(output.loss.float(), expected.loss.float(), rtol=rtol / 4, atol=0)
    floor = rtol * 1e-2 * max(grad.float().norm().item() for grad in expected_grads.values())
    for key, grad in expected_grads.items():
        error = (grads[key].float() - grad.float()).norm().item()
        assert error <= rtol * grad.float().norm().item() + floor, f"{key}: off by {error}"


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Granite"])
def test_compiled(name, batch):
    torch._dynamo.reset()
    model = patch(make(name, num_hidden_layers=1), filter_eps=None)
    expected = step(model, **batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        output = compiled(**batch)
        model.zero_grad()
        output.loss.backward()
        assert has_no_logits(output)
        assert_same((output, {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}), expected)
    assert type(model.lm_head) is torch.nn.Linear
    assert "forward" not in vars(model.lm_head)
    torch._dynamo.reset()


def test_options_are_passed_on(batch):
    model = make()
    plain = patch(model)(**batch).loss
    assert patch(model, z_loss=0.1)(**batch).loss > plain + 0.1
    smooth = patch(model, label_smoothing=0.1)(**batch).loss
    logits = unpatch(model)(**batch).logits[:, :-1].reshape(-1, V)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].reshape(-1), label_smoothing=0.1)
    torch.testing.assert_close(smooth, expected)
    torch.testing.assert_close(patch(model, impl="torch_compile")(**batch).loss, plain)
    assert patch(model)(**batch).loss == plain


def test_the_readmes_lines_patch_a_model(monkeypatch):
    """With a tiny model in place of what they would fetch."""
    _, example, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: make("SmolLM3"))
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    tokens = torch.randint(3, V, (B, S))
    output = names["model"](input_ids=tokens, labels=tokens)
    assert has_no_logits(output)
    assert torch.isfinite(output.loss)
