"""What stands between output head and loss: steps of the model's own code, and the bias that some models add."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from torch.nn.functional import cross_entropy  # noqa: E402

from cce_numba.transformers import patch  # noqa: E402
from tests.transformers.models import SIZES, B, S, Shapes, V, assert_same, make, step, unpatched_and_patched  # noqa: E402

torch.manual_seed(2)
ROWS, BIAS = torch.rand(V) + 0.5, torch.randn(V)

LOSSES = {
    "shift": lambda logits, labels, **_: torch.nn.CrossEntropyLoss()(
        logits[..., :-1, :].contiguous().view(-1, logits.size(-1)), labels[..., 1:].reshape(-1)
    ),
    "mask": lambda logits, labels, **_: cross_entropy(
        logits[..., :-1, :][labels[:, 1:] > 9].float(), labels[:, 1:][labels[:, 1:] > 9], reduction="sum"
    ),
    "weights": lambda logits, labels, **_: cross_entropy(
        (2 * logits).to(torch.float32).to(labels.device).reshape((-1, logits.shape[-1])) / 3,
        labels.view(-1),
        weight=torch.arange(V) / V,
        label_smoothing=0.1,
        ignore_index=-100,
    ),
    "softcap": lambda logits, labels, **_: cross_entropy(
        (5.0 * torch.tanh(logits * 0.5 / 0.7) * 1.5 / 2).view(-1, V), labels.view(-1), reduction="none"
    ).mean(),
    "padded vocabulary": lambda logits, labels, **_: cross_entropy(
        logits[:, :-1, : V - 7].reshape(-1, V - 7), labels[:, 1:].where(labels[:, 1:] < V - 7, -100).reshape(-1)
    ),
    "bias": lambda logits, labels, **_: cross_entropy((logits + BIAS).view(-1, V), labels.view(-1)),
    "bias before": lambda logits, labels, **_: cross_entropy((BIAS[None] + logits).view(-1, V), labels.view(-1)),
    "scale, bias, scale": lambda logits, labels, **_: cross_entropy(
        ((logits * 0.5 + BIAS) / 3 + BIAS).view(-1, V), labels.view(-1)
    ),
    "bias, softcap": lambda logits, labels, **_: cross_entropy(
        (2 * torch.tanh((logits / 4 + BIAS) / 2)).view(-1, V), labels.view(-1)
    ),
    "bias, padded vocabulary": lambda logits, labels, **_: cross_entropy(
        ((logits / 2 + BIAS)[..., : V - 7] * 2).reshape(-1, V - 7), labels.where(labels < V - 7, -100).view(-1)
    ),
    "a scale in a tensor": lambda logits, labels, **_: cross_entropy(
        (torch.tensor(0.5) * logits + BIAS).view(-1, V), labels.view(-1)
    ),
    "a scale for each entry": lambda logits, labels, **_: cross_entropy(
        (((logits + BIAS) * ROWS) / 2).view(-1, V), labels.view(-1)
    ),
}


@pytest.mark.parametrize("loss_function", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("name", ["Llama", "Phi"])  # the latter's head has a bias
def test_a_loss_function_of_one_s_own(name, loss_function, batch):
    model = make(name)
    model.loss_function = loss_function
    assert_same(*unpatched_and_patched(model, batch))


@pytest.mark.parametrize("kind", ["scale", "bias"])
def test_steps_that_are_trained(kind, batch):
    """A scale or a bias with a gradient of its own, as some models learn."""
    model = make()
    model.learned = torch.nn.Parameter(torch.tensor(0.7) if kind == "scale" else BIAS.clone())

    def loss_function(logits, labels, **_):
        logits = logits * model.learned if kind == "scale" else logits + model.learned
        return cross_entropy(logits.view(-1, V), labels.view(-1))

    model.loss_function = loss_function
    actual, expected = unpatched_and_patched(model, batch)
    assert expected[1]["learned"].abs().max() > 0
    assert_same(actual, expected)


CONDITIONAL = {
    "Bart": {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "Marian": {"decoder_start_token_id": 0},
    "Pegasus": {},
    "MBart": {},
    "T5": {"d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0},
}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_encoders_and_decoders(name, batch):
    """Those of Bart's family add `final_logits_bias`, a constant, to their logits."""
    sizes = SIZES | {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0} | CONDITIONAL["Bart"]
    config = getattr(transformers, f"{name}Config")(**sizes | CONDITIONAL[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        if name != "T5":
            model.final_logits_bias.normal_()
    expected = step(model, **batch)
    assert expected[0].logits.shape == (B, S, V)
    patch(model, filter_eps=None)
    with Shapes() as shapes:
        actual = step(model, **batch)
    assert_same(actual, expected)
    assert not shapes.has_logits()
