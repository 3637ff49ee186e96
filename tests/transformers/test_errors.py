"""What cannot be patched, and what a patched model refuses: by name, before anything is changed."""

from __future__ import annotations

import re

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from cce_numba.transformers import patch, unpatch  # noqa: E402
from tests.transformers.models import S, V, make  # noqa: E402


class TestWhatCannotBePatched:
    @pytest.mark.parametrize("wrong", [None, "gpt2", torch.nn.Linear(2, 2), int, transformers.AutoModelForCausalLM])
    @pytest.mark.parametrize("function", [patch, unpatch])
    def test_no_model(self, function, wrong):
        with pytest.raises(TypeError, match="model_or_type: must be a language model of transformers"):
            function(wrong)

    def test_no_labels(self):
        with pytest.raises(TypeError, match="the forward of LlamaModel takes no labels"):
            patch(make().model)

    def test_no_such_option(self):
        with pytest.raises(TypeError, match="softcap: is no option of patch, which takes filter, filter_seed"):
            patch(make(), softcap=3.0)

    @pytest.mark.parametrize(
        ("error", "options"), [(ValueError, {"filter_eps": -1.0}), (TypeError, {"logits_in_evaluation": None})], ids=str
    )
    def test_wrong_option(self, error, options):
        model = make()
        with pytest.raises(error, match=f"{next(iter(options))}: "):
            patch(model, **options)
        assert type(model) is transformers.LlamaForCausalLM

    def test_no_head(self):
        model = make()
        model.lm_head = None
        with pytest.raises(NotImplementedError, match="it has no output head"):
            patch(model)

    def test_a_quantized_head(self):
        model = make()
        model.lm_head = torch.ao.nn.quantized.Linear(32, V)
        with pytest.raises(NotImplementedError, match="its output head, a Linear, has no weight"):
            patch(model)
        model.lm_head = torch.nn.Linear(32, V)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 32, dtype=torch.int8), requires_grad=False)
        with pytest.raises(NotImplementedError, match=r"has weights of torch.int8 \(quantized\?\)"):
            patch(model)


class Bent(torch.nn.Linear):
    """A head with something behind its product that is not linear."""

    def forward(self, x):
        return super().forward(x).relu()


class TestWhatAPatchedModelRefuses:
    def test_a_head_that_is_not_linear(self, batch):
        model = patch(make())
        model.lm_head = Bent(32, V)
        with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM: .* its output head, a Bent, is no linear layer"):
            model(**batch)
        assert unpatch(model)(**batch).logits.shape[-1] == V

    @pytest.mark.parametrize(
        ("use", "named"),
        [
            (lambda logits: logits + 1, "__add__ of int"),
            (lambda logits: logits + torch.ones(S, 1), "__add__ of Tensor"),
            (lambda logits: torch.ones(S, 1) + logits, "__add__ of Tensor"),
            (lambda logits: torch.ones(V) - logits, "sub"),
            (lambda logits: -logits, "__neg__"),
            (lambda logits: logits * torch.ones(S, 1), r"\* Tensor"),
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
            (
                lambda logits: torch.nn.functional.cross_entropy(
                    (logits.tanh() + torch.ones(V)).view(-1, V), torch.zeros(2 * S, dtype=int)
                ),
                "the steps tanh, __add__ in this order",
            ),
        ],
        ids=range(20),
    )
    def test_what_needs_logits(self, use, named, batch):
        model = patch(make())
        model.loss_function = lambda logits, **kwargs: use(logits)
        with pytest.raises(NotImplementedError, match=f"LlamaForCausalLM: does with its logits .*: .*{named}"):
            model(**batch)
        assert type(model.lm_head) is torch.nn.Linear
        assert isinstance(model.eval()(batch["input_ids"]).logits, torch.Tensor)

    def test_a_loss_of_something_else(self, batch):
        model = patch(make())
        model.loss_function = lambda logits, labels, **kwargs: torch.zeros(())
        with pytest.raises(NotImplementedError, match="LlamaForCausalLM: was given labels, but computes no cross-entropy"):
            model(**batch)

    @pytest.mark.parametrize("how", ["freed", "emptied"])
    def test_a_head_in_shards(self, how, batch):
        model = patch(make())
        with torch.no_grad():
            if how == "freed":
                model.lm_head.weight.untyped_storage().resize_(0)
            else:
                model.lm_head.weight.data = torch.empty(0)
        with pytest.raises(NotImplementedError, match="output head in shards"):
            model(**batch)

    @pytest.mark.parametrize("how", ["freed", "emptied"])
    def test_a_head_that_is_gathered_for_its_own_forward_alone_is_not_refused(self, how, batch):
        model = patch(make())
        expected = model(**batch).loss.item()
        weight, whole = model.lm_head.weight, model.lm_head.weight.detach().clone()

        def gather(head, args):
            with torch.no_grad():
                weight.data = whole.clone()

        def shard(head, args, output):
            with torch.no_grad():
                weight.data = torch.empty(0)

        model.lm_head.register_forward_pre_hook(gather)
        model.lm_head.register_forward_hook(shard)
        if how == "emptied":
            shard(None, None, None)
        with torch.no_grad():
            assert model(**batch).loss.item() == expected
        assert weight.numel() == 0

    @pytest.mark.parametrize("where", ["head", "all"])
    def test_full_backward_hooks_on_the_head(self, where, batch):
        """They would never run, since the gradient of logits that they wait for is not made."""
        model = patch(make())
        if where == "head":
            handle = model.lm_head.register_full_backward_hook(lambda *_: None)
        else:
            handle = torch.nn.modules.module.register_module_full_backward_hook(lambda *_: None)
        try:
            with pytest.raises(NotImplementedError, match=r"a full backward hook on its output head .*; remove the hook"):
                model(**batch)
        finally:
            handle.remove()
        model(**batch).loss.backward()

    def test_labels_out_of_range(self, batch):
        model = patch(make())
        with pytest.raises(ValueError, match="targets: "):
            model(**batch | {"labels": batch["labels"] + V})
        assert type(model.lm_head) is torch.nn.Linear


class TestNoLogits:
    """What stands in an output where logits were, for code that reads them."""

    @pytest.fixture
    def output(self, batch):
        return patch(make())(**batch)

    @pytest.mark.parametrize(
        "use",
        [
            lambda x: x[0],
            lambda x: x.argmax(-1),
            lambda x: x.shape,
            lambda x: x.detach(),
            lambda x: x + 1,
            lambda x: 2 * x,
            lambda x: x.float(),
            lambda x: len(x),
            lambda x: list(x),
            lambda x: bool(x),
            lambda x: torch.softmax(x, -1),
            lambda x: torch.stack([x, x]),
            lambda x: torch.nn.functional.cross_entropy(x, torch.zeros(1)),
            lambda x: x.__array__(),
        ],
        ids=range(14),
    )
    def test_any_use_says_why_there_are_none(self, use, output):
        said = "LlamaForCausalLM: there are no logits for .*cce_numba.transformers.patch.*skip_logits=False.*unpatch"
        with pytest.raises(NotImplementedError, match=said):
            use(output.logits)

    def test_what_looks_whether_there_are_some(self, output):
        assert output.logits is not None
        assert not isinstance(output.logits, torch.Tensor)
        assert not hasattr(output.logits, "shape")
        assert repr(output.logits) == "NoLogits(model_name='LlamaForCausalLM')"
        assert "logits" in output

    def test_what_goes_through_outputs(self, output):
        """FSDP, accelerate and `torch.utils.checkpoint` take outputs apart and put them together."""
        from torch.utils import _pytree

        leaves, spec = _pytree.tree_flatten(output)
        assert all(isinstance(x, torch.Tensor) for x in leaves)
        again = _pytree.tree_unflatten(leaves, spec)
        assert re.fullmatch(r"NoLogits\(.*\)", repr(again.logits))
        assert again.loss is output.loss

    def test_logits_of_one_call(self, batch):
        model = patch(make(), filter_eps=None)
        both = model(**batch, skip_logits=False)
        assert both.logits.shape[-1] == V
        torch.testing.assert_close(model(**batch).loss, both.loss)
