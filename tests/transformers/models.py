"""Models of transformers, tiny and randomly initialised, and how what they return is compared."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from cce_numba.transformers import patch  # noqa: E402
from cce_numba.transformers.logits import NoLogits  # noqa: E402

B, S, V = 2, 11, 200
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "dropout": 0.0}
MOE = {**EXPERTS, "output_router_logits": True, "router_aux_loss_coef": 0.1}

# By model, what its configuration has besides the sizes.
MODELS = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma": {},
    "Gemma2": {"final_logit_softcapping": 0.3},
    "Gemma2 untied": {"final_logit_softcapping": 30.0, "tie_word_embeddings": False},
    "Gemma3 text": {"final_logit_softcapping": 0.7},
    "Mistral": {},
    "Phi": {"resid_pdrop": 0.0},  # its head has a bias
    "Phi3": {},
    "SmolLM3": {},
    "Olmo2": {},
    "Cohere": {"logit_scale": 0.0625},
    "Cohere2": {"logit_scale": 3.0, "tie_word_embeddings": False},
    "Granite": {"logits_scaling": 8.0},
    "GraniteMoe": {"logits_scaling": 0.7, **MOE},
    "GPT2": NO_DROPOUT,
    "GPTNeoX": {},
    "OPT": {"dropout": 0.0, "word_embed_proj_dim": 32, "ffn_dim": 48},
    "Roberta": {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "Bart": {"dropout": 0.0, "d_model": 32},  # a cross-entropy of its own, without a shift
    "Mixtral": MOE,
    "Qwen3 moe": MOE,
}


def make(name="Llama", **extra):
    """A model in training mode; biases are not 0, which they are made with."""
    family, *kind = name.split()
    config_class = getattr(transformers, family + {"text": "Text", "moe": "Moe"}.get("".join(kind), "") + "Config")
    torch.manual_seed(0)
    config = config_class(**SIZES | MODELS[name] | extra)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.mul_(4)
            if parameter_name.endswith("bias"):
                parameter.normal_()
    return model


def step(model, **inputs):
    """The output and all parameters' gradients."""
    model.zero_grad()
    output = model(**inputs)
    loss = output[0]
    loss.backward()
    return output, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same(actual, expected):
    """Losses and gradients, as far as float32 goes: a gradient's elements are sums of terms as large as its largest.

    Of some parameters (biases of keys) it is 0, but for the rounding of what flows through them.
    """
    (output, grads), (expected_output, expected_grads) = actual, expected
    torch.testing.assert_close(output[0], expected_output[0], rtol=2e-6, atol=0, equal_nan=True)
    assert grads.keys() == expected_grads.keys()
    largest = {name: grad.abs().max().item() for name, grad in expected_grads.items()}
    floor = 1e-7 * max(largest.values())
    assert floor > 1e-10
    for name, grad in grads.items():
        error = (grad - expected_grads[name]).abs().max().item()
        assert error <= 1e-5 * largest[name] + floor, f"{name}: off by {error}, of {largest[name]}"


def unpatched_and_patched(model, batch, **options):
    expected = step(model, **batch)
    assert expected[0].logits.shape == (B, S, V)
    return step(patch(model, filter_eps=None, **options), **batch), expected


class Shapes(TorchDispatchMode):
    """Remembers the shapes of all that operators return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.seen.add(tuple(x.shape))
        return result

    def has_logits(self):
        """Or what has their shape, by the number of tokens: a classifier the other way round has D rows, which are more."""
        assert SIZES["hidden_size"] > B * S
        return any(shape[-1:] == (V,) and S - 1 <= torch.Size(shape[:-1]).numel() <= B * S for shape in self.seen)


def has_no_logits(output):
    """Where logits were stands what says that there are none."""
    return isinstance(output["logits"], NoLogits) and output.logits is output["logits"]
