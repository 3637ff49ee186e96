"""Patched models of transformers, tiny and randomly initialised, against the same models as they were."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from cce_numba.transformers import patch, unpatch  # noqa: E402
from tests.conftest import skip_or_fail_without_gpu  # noqa: E402

README = Path(__file__).parent.parent.parent / "README.md"
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
    config = config_class(**SIZES, **MODELS[name], **extra)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.mul_(4)
            if parameter_name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    tokens = torch.randint(3, V, (B, S))
    labels = tokens.clone()
    labels[0, :4] = -100
    labels[1, -3:] = -100
    return {"input_ids": tokens, "labels": labels, "use_cache": False}


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
        return any(shape[-1:] == (V,) and torch.Size(shape).numel() >= (S - 1) * V for shape in self.seen)


@pytest.mark.parametrize("name", MODELS)
def test_same_loss_and_gradients(name, batch):
    model = make(name)
    names = list(model.state_dict())
    actual, expected = unpatched_and_patched(model, batch)
    assert_same(actual, expected)
    assert list(model.state_dict()) == names
    assert actual[0].logits is None
    assert "logits" not in actual[0]
    assert list(actual[0]) == [key for key in expected[0] if key != "logits"]


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
    assert len(actual[0]) == len(expected[0]) - 1
    assert torch.equal(actual[0][1][0], expected[0][2][0])


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
    assert output.logits is None
    assert not output.loss.requires_grad


def test_labels_by_position(batch):
    model = patch(make())
    place = list(inspect.signature(model.forward).parameters).index("labels")
    output = model(batch["input_ids"], *[None] * (place - 1), batch["labels"])
    assert output.logits is None
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
    assert output.logits is None
    torch.testing.assert_close(output.loss.float(), expected.loss.float(), rtol=rtol / 4, atol=0)
    floor = rtol * 1e-2 * max(grad.float().norm().item() for grad in expected_grads.values())
    for key, grad in expected_grads.items():
        error = (grads[key].float() - grad.float()).norm().item()
        assert error <= rtol * grad.float().norm().item() + floor, f"{key}: off by {error}"


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Granite"])
def test_compiled(name, batch):
    torch._dynamo.reset()
    model = patch(make(name), filter_eps=None)
    expected = step(model, **batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        output = compiled(**batch)
        model.zero_grad()
        output.loss.backward()
        assert output.logits is None
        assert_same((output, {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}), expected)
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


class TestWhatIsPatched:
    def test_an_instance_alone(self, batch):
        one, other = patch(make()), make()
        assert one(**batch).logits is None
        assert other(**batch).logits is not None
        assert unpatch(one)(**batch).logits is not None
        assert "forward" not in vars(one)
        assert unpatch(one) is one

    def test_a_class(self, batch):
        a_class, before = transformers.LlamaForCausalLM, transformers.LlamaForCausalLM.forward
        one = make()
        try:
            assert patch(a_class) is a_class
            assert one(**batch).logits is None
            assert make()(**batch).logits is None
            plain = one(**batch).loss
            assert patch(one, z_loss=0.1)(**batch).loss > plain  # its own options go first
            assert patch(patch(a_class), filter_eps=None) is a_class
            assert unpatch(one)(**batch).loss == plain
        finally:
            unpatch(a_class)
        assert a_class.forward is before
        assert one(**batch).logits is not None

    def test_a_class_that_inherits_its_forward(self, batch):
        class Mine(transformers.LlamaForCausalLM):
            pass

        model = make()
        mine = Mine(model.config).train()
        try:
            patch(transformers.LlamaForCausalLM)
            patch(Mine)
            assert mine(**batch).logits is None
            unpatch(transformers.LlamaForCausalLM)
            assert mine(**batch).logits is None
            assert model(**batch).logits is not None
            unpatch(Mine)
            assert mine(**batch).logits is not None
            assert "forward" not in vars(Mine)
        finally:
            unpatch(transformers.LlamaForCausalLM)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
    def test_copies(self, copied, batch):
        model = patch(make(), filter_eps=None)
        expected = step(model, **batch)
        other = copied(model)
        assert other.forward.model is other
        model.zero_grad()
        assert_same(step(other, **batch), expected)
        assert all(x.grad is None for x in model.parameters())
        assert unpatch(other)(**batch).logits is not None
        assert model(**batch).logits is None

    def test_saved_and_loaded(self, tmp_path, batch):
        model = patch(make("Llama tied"))
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded(**batch).loss.item() == pytest.approx(model(**batch).loss.item())
        assert sorted(loaded.state_dict()) == sorted(model.state_dict())

    def test_another_patch_below(self, batch):
        model, calls = make(), []
        below = model.forward
        model.forward = lambda input_ids=None, labels=None, **kwargs: (
            calls.append(1) or below(input_ids, labels=labels, **kwargs)
        )
        its_own = model.forward
        assert patch(model)(**batch).logits is None
        assert calls
        assert unpatch(model).forward is its_own

    def test_another_patch_above(self):
        model = patch(make())
        model.forward = functools.wraps(model.forward)(functools.partial(model.forward))
        with pytest.raises(ValueError, match=r"LlamaForCausalLM: .* has taken the place of the patched forward"):
            unpatch(model)

    def test_its_signature(self):
        model = make()
        expected = inspect.signature(model.forward)
        assert inspect.signature(patch(model).forward) == expected


class TestErrors:
    @pytest.mark.parametrize("wrong", [None, "gpt2", torch.nn.Linear(2, 2), int, transformers.AutoModelForCausalLM])
    @pytest.mark.parametrize("function", [patch, unpatch])
    def test_no_model(self, function, wrong):
        with pytest.raises(TypeError, match="model_or_type: must be a language model of transformers"):
            function(wrong)

    def test_no_labels(self):
        with pytest.raises(TypeError, match="the forward of LlamaModel takes no labels"):
            patch(make().model)

    def test_no_such_option(self):
        with pytest.raises(TypeError, match="softcap: is no option of patch, which takes filter_eps"):
            patch(make(), softcap=3.0)

    def test_wrong_option(self):
        model = make()
        with pytest.raises(ValueError, match="filter_eps: "):
            patch(model, filter_eps=-1.0)
        assert "forward" not in vars(model)

    def test_a_head_that_is_no_linear_layer(self, batch):
        class Adapter(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x) + 1

        model = make()
        model.lm_head = Adapter(32, V)
        with pytest.raises(
            NotImplementedError, match="LlamaForCausalLM: cannot be patched, since its output head is a Adapter"
        ):
            patch(model)
        patch(transformers.LlamaForCausalLM)
        try:
            with pytest.raises(NotImplementedError, match="its output head is a Adapter"):
                model(**batch)
        finally:
            unpatch(transformers.LlamaForCausalLM)
        model.lm_head = None
        with pytest.raises(NotImplementedError, match="it has no output head"):
            patch(model)

    def test_a_head_whose_forward_was_replaced(self):
        model = make()
        model.lm_head.forward = model.lm_head.forward
        with pytest.raises(NotImplementedError, match="the forward of its output head was replaced"):
            patch(model)

    @pytest.mark.parametrize(
        ("use", "named"),
        [
            (lambda logits: logits + 1, "__add__"),
            (lambda logits: torch.ones(V) + logits, "add"),
            (lambda logits: -logits, "__neg__"),
            (lambda logits: logits * torch.ones(V), r"\* Tensor"),
            (lambda logits: logits * -1, r"\* int"),
            (lambda logits: logits / 0, "/ int"),
            (lambda logits: logits[..., 7], "indexing"),
            (lambda logits: logits[0], "indexing"),
            (lambda logits: logits[:, :, :, :7], "indexing 3 dimensions with 4"),
            (lambda logits: logits.logsumexp(-1), "logsumexp"),
            (lambda logits: torch.softmax(logits, -1), "softmax"),
            (lambda logits: torch.cat([logits, logits]), "cat"),
            (lambda logits: logits.tanh().tanh(), "tanh, twice"),
            (lambda logits: logits.view(-1, V + 1), "view"),
            (lambda logits: logits.to("meta"), "to"),
            (lambda logits: float(logits), "__float__"),
            (lambda logits: torch.nn.functional.cross_entropy(logits, None), "cross_entropy of 3 dimensions"),
        ],
        ids=range(17),
    )
    def test_what_cannot_be_done_without_logits(self, use, named, batch):
        model = patch(make())
        model.loss_function = lambda logits, **kwargs: use(logits)
        with pytest.raises(NotImplementedError, match=f"LlamaForCausalLM: does with its logits .*: .*{named}"):
            model(**batch)
        assert "forward" not in vars(model.lm_head)
        model.eval()(**{**batch, "labels": None})

    def test_a_loss_of_something_else(self, batch):
        model = patch(make())
        model.loss_function = lambda logits, labels, **kwargs: torch.zeros(())
        with pytest.raises(NotImplementedError, match="LlamaForCausalLM: was given labels, but computes no cross-entropy"):
            model(**batch)

    @pytest.mark.parametrize("how", ["freed", "emptied"])
    def test_a_head_that_is_gathered_for_its_own_forward_alone(self, how, batch):
        model = patch(make())

        def shard(head, args, output):
            if how == "freed":
                head.weight.untyped_storage().resize_(0)
            else:
                head.weight.data = torch.empty(0)

        model.lm_head.register_forward_hook(shard)
        with pytest.raises(NotImplementedError, match="output head in shards"):
            model(**batch)

    def test_labels_out_of_range(self, batch):
        model = patch(make())
        with pytest.raises(ValueError, match="targets: "):
            model(**batch | {"labels": batch["labels"] + V})
        assert "forward" not in vars(model.lm_head)


class TestStepsBetweenHeadAndLoss:
    @pytest.mark.parametrize(
        "loss_function",
        [
            lambda logits, labels, **_: torch.nn.CrossEntropyLoss()(
                logits[..., :-1, :].contiguous().view(-1, logits.size(-1)), labels[..., 1:].reshape(-1)
            ),
            lambda logits, labels, **_: torch.nn.functional.cross_entropy(
                logits[..., :-1, :][labels[:, 1:] > 9].float(), labels[:, 1:][labels[:, 1:] > 9], reduction="sum"
            ),
            lambda logits, labels, **_: torch.nn.functional.cross_entropy(
                (2 * logits).to(torch.float32).to(labels.device).reshape((-1, logits.shape[-1])) / 3,
                labels.view(-1),
                weight=torch.arange(V) / V,
                label_smoothing=0.1,
                ignore_index=-100,
            ),
            lambda logits, labels, **_: torch.nn.functional.cross_entropy(
                (5.0 * torch.tanh(logits * 0.5 / 0.7) * 1.5 / 2).view(-1, V), labels.view(-1), reduction="none"
            ).mean(),
            lambda logits, labels, **_: torch.nn.functional.cross_entropy(
                logits[:, :-1, : V - 7].reshape(-1, V - 7), labels[:, 1:].where(labels[:, 1:] < V - 7, -100).reshape(-1)
            ),
        ],
        ids=["shift", "mask", "weights", "softcap", "padded vocabulary"],
    )
    @pytest.mark.parametrize("name", ["Llama", "Phi"])  # the latter's head has a bias
    def test_a_loss_function_of_one_s_own(self, name, loss_function, batch):
        model = make(name)
        model.loss_function = loss_function
        assert_same(*unpatched_and_patched(model, batch))


def test_the_readmes_lines_patch_a_model(monkeypatch):
    """With a tiny model in place of what they would fetch."""
    _, example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: make("SmolLM3"))
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    tokens = torch.randint(3, V, (B, S))
    output = names["model"](input_ids=tokens, labels=tokens)
    assert output.logits is None
    assert torch.isfinite(output.loss)
