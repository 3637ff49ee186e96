"""An instance, a class; copies, pickles, wrappers; what of a model `patch` changes and what it leaves."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import types
import warnings
import weakref

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from cce_numba.transformers import patch, unpatch  # noqa: E402
from tests.transformers.models import S, V, assert_same, has_no_logits, make, step  # noqa: E402


def is_in_use(model, batch):
    """Whether a patch is: in training with labels, no logits are returned."""
    return has_no_logits(model(**batch))


class TestWhich:
    def test_an_instance_alone(self, batch):
        one, other = patch(make()), make()
        assert is_in_use(one, batch)
        assert not is_in_use(other, batch)
        assert not is_in_use(unpatch(one), batch)
        assert type(one) is transformers.LlamaForCausalLM
        assert vars(one).keys() == vars(other).keys()
        assert unpatch(one) is one

    def test_a_class(self, batch):
        a_class, before = transformers.LlamaForCausalLM, transformers.LlamaForCausalLM.forward
        one = make()
        try:
            assert patch(a_class) is a_class
            assert is_in_use(one, batch)
            assert is_in_use(make(), batch)
            plain = one(**batch).loss
            assert patch(one, z_loss=0.1)(**batch).loss > plain  # its own options go first
            assert patch(patch(a_class), filter_eps=None) is a_class
            assert patch(one, z_loss=0.1)(**batch).loss > plain
            assert unpatch(one)(**batch).loss == plain
        finally:
            unpatch(a_class)
        assert a_class.forward is before
        assert not is_in_use(one, batch)

    def test_an_instance_before_its_class(self, batch):
        one = patch(make(), z_loss=0.1)
        loss = one(**batch).loss
        try:
            patch(transformers.LlamaForCausalLM)
            assert one(**batch).loss == loss
            assert unpatch(one)(**batch).loss < loss
            assert is_in_use(one, batch)
        finally:
            unpatch(transformers.LlamaForCausalLM)
        assert not is_in_use(one, batch)

    def test_a_class_that_inherits_its_forward(self, batch):
        class Mine(transformers.LlamaForCausalLM):
            pass

        model = make()
        mine = Mine(model.config).train()
        try:
            patch(transformers.LlamaForCausalLM)
            patch(Mine)
            assert is_in_use(mine, batch)
            unpatch(transformers.LlamaForCausalLM)
            assert is_in_use(mine, batch)
            assert not is_in_use(model, batch)
            unpatch(Mine)
            assert not is_in_use(mine, batch)
            assert "forward" not in vars(Mine)
        finally:
            unpatch(transformers.LlamaForCausalLM)

    def test_a_class_whose_patched_forward_was_wrapped(self, batch):
        """A wrapper has the attributes of what it wraps, but is none of ours to take away."""
        a_class, before = transformers.LlamaForCausalLM, transformers.LlamaForCausalLM.forward
        try:
            patch(a_class)
            wrapper = functools.wraps(a_class.forward)(lambda self, *args, **kwargs: before(self, *args, **kwargs))
            a_class.forward = wrapper
            unpatch(a_class)
            assert a_class.forward is wrapper
        finally:
            a_class.forward = before


def zeroed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "save": saved}


class TestABoundMethod:
    """What `forward` is to those who wrap, copy or look at it: an ordinary method of the model that it is asked of."""

    def test_it_is_one(self):
        model = make()
        expected = inspect.signature(model.forward)
        forward = patch(model).forward
        assert isinstance(forward, types.MethodType)
        assert forward.__self__ is model
        assert forward.__name__ == "forward"
        assert isinstance(forward.__func__.__code__, types.CodeType)
        assert not hasattr(forward, "__wrapped__")  # which accelerate would take for what it has wrapped
        assert inspect.signature(forward) == expected
        assert inspect.signature(type(model).forward) == inspect.signature(transformers.LlamaForCausalLM.forward)

    @pytest.mark.parametrize("how", COPIES)
    def test_copies(self, how, batch):
        model = patch(make(), filter_eps=None)
        expected = step(model, **batch)
        other = COPIES[how](model)
        assert other.forward.__self__ is other
        model.zero_grad()
        assert_same(step(other, **batch), expected)
        assert all(x.grad is None for x in model.parameters())
        assert zeroed(other)(**batch).loss.item() == pytest.approx(torch.tensor(float(V)).log().item())
        assert not is_in_use(unpatch(other), batch)
        assert is_in_use(model, batch)

    def test_a_class_that_says_how_it_is_copied(self, batch):
        class Mine(transformers.LlamaForCausalLM):
            def __reduce_ex__(self, protocol):
                return Mine, (self.config,)

        mine = patch(Mine(make().config).train())
        with pytest.raises(TypeError, match="Mine: cannot be copied or pickled while it is patched; unpatch it first"):
            copy.deepcopy(mine)
        assert isinstance(copy.deepcopy(unpatch(mine)), Mine)

    def test_saved_and_loaded(self, tmp_path, batch):
        model = patch(make("Llama tied"))
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is transformers.LlamaForCausalLM
        assert loaded(**batch).loss.item() == pytest.approx(model(**batch).loss.item())
        assert sorted(loaded.state_dict()) == sorted(model.state_dict())

    def test_a_replica(self, batch):
        """As `nn.DataParallel` makes them: a shallow copy of each module, with the parameters as tensors of autograd."""
        model = patch(make(), filter_eps=None)
        expected = step(model, **batch)
        model.zero_grad()
        output = replicated(model)(**batch)
        output.loss.backward()
        assert_same((output, {name: x.grad for name, x in model.named_parameters()}), expected)
        loss = replicated(model, factor=0)(**batch).loss
        assert loss.item() == pytest.approx(torch.tensor(float(V)).log().item())
        assert model(**batch).loss == expected[0].loss

    @pytest.mark.parametrize("trained", [False, True])
    def test_it_is_freed_without_the_garbage_collector(self, trained, batch):
        model = patch(make())
        if trained:
            model(**batch).loss.backward()
        gc.collect()
        gc.disable()
        try:
            gone = weakref.ref(model)
            del model
            assert gone() is None
        finally:
            gc.enable()

    def test_what_its_forward_writes_to_it_is_written(self, batch):
        class Mine(transformers.LlamaForCausalLM):
            def forward(self, input_ids=None, labels=None, **kwargs):
                self.calls = getattr(self, "calls", 0) + 1
                self.seen = torch.nn.Parameter(torch.ones(2))
                return super().forward(input_ids, labels=labels, **kwargs)

        mine = patch(Mine(make().config).train())
        assert is_in_use(mine, batch)
        assert is_in_use(mine, batch)
        assert mine.calls == 2
        assert "seen" in dict(mine.named_parameters())

    @pytest.mark.parametrize("strict", [False, True])
    def test_exported(self, strict, batch):
        model = make(num_hidden_layers=1)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        expected, logits = model(**batch).loss, model.eval()(batch["input_ids"], use_cache=False).logits
        patch(model, filter_eps=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, (), {"input_ids": batch["input_ids"], "use_cache": False}, strict=strict)
            torch.testing.assert_close(exported.module()(input_ids=batch["input_ids"], use_cache=False).logits, logits)
            exported = torch.export.export(model.train(), (), batch, strict=strict)
        assert any("cce_numba.linear_cross_entropy" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(**batch).loss, expected)


def replicated(model, factor=1):
    """A copy of modules as `torch.nn.parallel.replicate` makes it, on the CPU; its parameters times a factor."""
    modules = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in modules.items():
        for name, child in module._modules.items():
            replica._modules[name] = modules[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter * factor)
    return modules[model]


class TestOtherPatches:
    def test_below(self, batch):
        """One that replaced `forward` by a method before."""
        model, calls = make(), []
        before = type(model).forward

        def forward(self, input_ids=None, labels=None, **kwargs):
            calls.append(self)
            return before(self, input_ids, labels=labels, **kwargs)

        model.forward = types.MethodType(forward, model)
        its_own = model.forward
        assert is_in_use(patch(model), batch)
        assert len(calls) == 1
        other = copy.deepcopy(model)
        assert is_in_use(other, batch)
        assert len(calls) == 2
        assert vars(calls[1]) is vars(other)
        assert is_in_use(patch(model, z_loss=0.1), batch)
        assert unpatch(model).forward == its_own
        assert not is_in_use(model, batch)
        assert len(calls) == 4

    @pytest.mark.parametrize(
        ("kind", "named"), [("lambda", r"test_\w+\.\S+lambda>"), ("partial", "functools.partial"), ("compiled", r"\S+forward")]
    )
    def test_below_that_is_no_method(self, kind, named):
        model = make()
        before = model.forward
        model.forward = {
            "lambda": lambda *args, labels=None, **kwargs: before(*args, labels=labels, **kwargs),
            "partial": functools.partial(before, use_cache=False),
            "compiled": torch.compile(before, backend="eager"),
        }[kind]
        its_own = model.forward
        with pytest.raises(NotImplementedError, match=rf"its forward was replaced by \S*{named}, .*; patch it before that"):
            patch(model)
        assert model.forward is its_own
        assert type(model) is transformers.LlamaForCausalLM

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_above(self, wrapped, batch):
        """One that replaced `forward` afterwards, and calls what it was: that goes on without the patch."""
        model = patch(make())
        above = functools.partial(model.forward)
        model.forward = functools.wraps(model.forward)(above) if wrapped else above
        assert is_in_use(model, batch)
        assert not is_in_use(unpatch(model), batch)
        assert model.forward is above

    def test_above_and_below(self):
        model = make()
        model.forward = types.MethodType(type(model).forward, model)
        patch(model)
        model.forward = functools.partial(model.forward)
        with pytest.raises(ValueError, match=r"LlamaForCausalLM: functools.partial has taken the place of the patched forward"):
            unpatch(model)


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel, DataParallel and DeepSpeed's engine have a model within."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class TestWrappers:
    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize(
        "wrap",
        [Wrapper, torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager"), "ddp"],
        ids=["module", "dp", "compile", "ddp"],
    )
    def test_each_works(self, wrap, after, batch, tmp_path):
        torch._dynamo.reset()
        model = make(num_hidden_layers=1)
        expected = step(model, **batch)
        group = wrap == "ddp"
        if group:
            torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
            wrap = torch.nn.parallel.DistributedDataParallel
        try:
            if after:
                wrapped = wrap(model)
                if not group:
                    wrapped(**batch)  # a compiled program that is there knows nothing of the patch
                assert patch(wrapped, filter_eps=None) is wrapped
            else:
                wrapped = wrap(patch(model, filter_eps=None))
            model.zero_grad()
            output = wrapped(**batch)
            assert has_no_logits(output)
            output.loss.backward()
            assert_same((output, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}), expected)
            assert unpatch(wrapped) is wrapped
            assert wrapped(**batch).logits.shape == (2, S, V)
        finally:
            if group:
                torch.distributed.destroy_process_group()
            torch._dynamo.reset()

    def test_something_else_within(self):
        with pytest.raises(
            TypeError, match="model_or_type: must be a language model of transformers, or its class, got a Wrapper"
        ):
            patch(Wrapper(torch.nn.Linear(2, 2)))


class TestAccelerate:
    """Its mixed precision wraps `forward`; its offloading wraps it too, and that of the head."""

    @pytest.fixture
    def prepare(self):
        accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of Trainer, in other tests
        yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    @pytest.mark.parametrize("after", [False, True])
    def test_mixed_precision(self, prepare, after, batch):
        model = make()
        model = patch(prepare.prepare(model)) if after else prepare.prepare(patch(model))
        loss = model(**batch).loss
        assert is_in_use(model, batch)
        assert has_no_logits(model(**batch))
        copied = copy.deepcopy(model)
        assert copied(**batch).loss == loss
        copied(**batch).loss.backward()
        assert all(x.grad is None for x in model.parameters())
        assert all(x.grad is not None for x in copied.parameters())
        assert zeroed(copied)(**batch).loss.item() == pytest.approx(torch.tensor(float(V)).log().item())
        assert isinstance(copied.eval()(**batch).logits, torch.Tensor)
        assert is_in_use(pickle.loads(pickle.dumps(model)), batch)
        assert not is_in_use(unpatch(model), batch)

    @pytest.mark.parametrize("keep", [False, True])
    def test_unwrapped(self, prepare, keep, batch):
        model = patch(make(), filter_eps=None)
        expected = step(model, **batch)
        unwrapped = prepare.unwrap_model(prepare.prepare(model), keep_fp32_wrapper=keep)
        for other in (unwrapped, copy.deepcopy(unwrapped), pickle.loads(pickle.dumps(unwrapped))):
            assert other.forward.__self__ is other
            assert is_in_use(other, batch)
            if not keep:
                assert_same(step(other, **batch), expected)
        assert not is_in_use(unpatch(unwrapped), batch)

    @pytest.mark.parametrize("after", [False, True])
    def test_offloading(self, prepare, after, batch):
        import accelerate

        model = make()
        expected = step(model, **batch)[0].loss
        if after:
            accelerate.cpu_offload(model, execution_device="cpu")
            patch(model, filter_eps=None)
        else:
            accelerate.cpu_offload(patch(model, filter_eps=None), execution_device="cpu")
        with torch.no_grad():
            output = model(**batch)
        assert has_no_logits(output)
        torch.testing.assert_close(output.loss, expected)
        with torch.no_grad():
            assert not is_in_use(unpatch(model), batch)
            accelerate.hooks.remove_hook_from_module(patch(model, filter_eps=None), recurse=True)
            assert is_in_use(model, batch)
            assert not is_in_use(unpatch(model), batch)
