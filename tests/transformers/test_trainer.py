"""`transformers.Trainer` with patched models: its own losses, its evaluation, and training that goes around the patch."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from cce_numba.transformers import calls, patch, unpatch  # noqa: E402
from tests.transformers.models import B, S, Shapes, V, make  # noqa: E402


@pytest.fixture(autouse=True)
def each_warning_comes_again(monkeypatch):
    monkeypatch.setattr(calls, "_warned", set())


@pytest.fixture
def rows():
    torch.manual_seed(5)
    rows = [{"input_ids": torch.randint(3, V, (S,))} for _ in range(2 * B)]
    for n, row in enumerate(rows):
        row["labels"] = row["input_ids"].clone()
        row["labels"][: n + 1] = -100
    return rows


def trainer_of(model, rows, tmp_path, a_class=transformers.Trainer, compute_loss_func=None, compute_metrics=None, **arguments):
    args = transformers.TrainingArguments(
        output_dir=tmp_path,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        max_steps=2,
        save_strategy="no",
        per_device_train_batch_size=B,
        per_device_eval_batch_size=B,
        learning_rate=0.01,
        **arguments,
    )
    return a_class(
        model, args, train_dataset=rows, eval_dataset=rows, compute_loss_func=compute_loss_func, compute_metrics=compute_metrics
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def own_loss(outputs, labels, num_items_in_batch=None):
    """A loss that a user gives to Trainer: of every second token."""
    logits, labels = outputs["logits"][:, ::2], labels[:, ::2]
    total = torch.nn.functional.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), reduction="sum", label_smoothing=0.2)
    return total / num_items_in_batch


def wrapped_in_peft(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))


GIVEN = {
    "nothing": {},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"compute_loss_func": own_loss},
    "both": {"compute_loss_func": own_loss, "label_smoothing_factor": 0.1},
    "accumulation": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "bf16": {"label_smoothing_factor": 0.1, "bf16": True},
}


def in_evaluation(given):
    """The same, but that Trainer gives a loss function no number of items there."""
    if given == "compute_loss_func":
        return {given: lambda outputs, labels, num_items_in_batch: own_loss(outputs, labels, 3)}
    return GIVEN[given]


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("wrap", [lambda model: model, wrapped_in_peft], ids=["model", "peft"])
def test_training_has_the_same_losses_without_logits(given, wrap, rows, tmp_path):
    expected = losses(trainer_of(wrap(make()), rows, tmp_path, **given))
    with Shapes() as shapes, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cce_numba")
        actual = losses(trainer_of(wrap(patch(make(), filter_eps=None)), rows, tmp_path, **given))
    assert actual == pytest.approx(expected, rel=2e-3 if "bf16" in given else 2e-4)
    assert actual[0] != actual[1]
    assert not shapes.has_logits()


class Strict(transformers.LlamaForCausalLM):
    """A model that takes no arguments but those it names: Trainer gives it no `num_items_in_batch`."""

    accepts_loss_kwargs = False

    def forward(self, input_ids=None, labels=None):
        return super().forward(input_ids=input_ids, labels=labels)


@pytest.mark.parametrize("given", ["nothing", "label_smoothing_factor", "compute_loss_func"])
def test_a_model_with_no_more_arguments(given, rows, tmp_path):
    model, arguments = make(), {"gradient_accumulation_steps": 2} | GIVEN[given]
    strict = Strict(model.config)
    strict.load_state_dict(model.state_dict())
    expected, actual = (
        losses(trainer_of(each, rows, tmp_path, **arguments))
        for each in (copy.deepcopy(strict), patch(strict, filter_eps=None))
    )
    assert actual == pytest.approx(expected, rel=2e-4)


def test_smoothing_is_not_lost(rows, tmp_path):
    """The losses above are equal, but not since smoothing does nothing."""
    smooth, plain = (
        losses(trainer_of(patch(make()), rows, tmp_path, label_smoothing_factor=factor))[0] for factor in (0.3, 0.0)
    )
    assert abs(smooth - plain) > 1e-2


@pytest.mark.parametrize("given", ["nothing", "label_smoothing_factor", "compute_loss_func"])
class TestEvaluation:
    def test_for_the_loss_alone_makes_no_logits(self, given, rows, tmp_path):
        given, model = in_evaluation(given), make()
        expected = trainer_of(model, rows, tmp_path, **given).evaluate()["eval_loss"]
        trainer = trainer_of(patch(model, filter_eps=None), rows, tmp_path, **given, prediction_loss_only=True)
        with Shapes() as shapes:
            assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert not shapes.has_logits()

    def test_predictions_are_what_they_were(self, given, rows, tmp_path):
        given, model, seen = in_evaluation(given), make(), []

        def metrics(prediction):
            seen.append(torch.tensor(prediction.predictions))
            return {}

        for is_patched in (False, True):
            trainer = trainer_of(patch(model) if is_patched else model, rows, tmp_path, compute_metrics=metrics, **given)
            trainer.evaluate()
        assert seen[0].shape == (2 * B, S, V)
        torch.testing.assert_close(*seen)


class TestWithoutTrainer:
    def test_evaluation_for_the_loss_alone(self, batch):
        model = make().eval()
        expected = model(**batch).loss
        patch(model, logits_in_evaluation=False, filter_eps=None)
        with Shapes() as shapes, torch.no_grad():
            output = model(**batch)
        torch.testing.assert_close(output.loss, expected)
        assert not shapes.has_logits()
        assert model(batch["input_ids"]).logits.shape == (B, S, V)  # without labels, as ever
        assert model(**batch, skip_logits=False).logits.shape == (B, S, V)
        assert patch(model)(**batch).logits.shape == (B, S, V)
        with Shapes() as shapes:
            model(**batch, skip_logits=True)
        assert not shapes.has_logits()


class OwnHead(transformers.Trainer):
    """As TRL's trainers: asks the model for no loss, and multiplies by the head's weights itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
        logits = hidden @ model.lm_head.weight.t()
        return torch.nn.functional.cross_entropy(logits.reshape(-1, V), labels.reshape(-1))


class OwnLoss(transformers.Trainer):
    """As a user's subclass: computes a loss of the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits.reshape(-1, V), labels.reshape(-1))


class TestWhatGoesAroundThePatch:
    """It warns once, by name, with the way out."""

    @pytest.mark.parametrize("a_class", [OwnHead, OwnLoss])
    def test_a_trainer_with_a_loss_of_its_own(self, a_class, rows, tmp_path):
        with pytest.warns(UserWarning, match="LlamaForCausalLM: is patched") as seen:
            losses(trainer_of(patch(make()), rows, tmp_path, a_class))
        told = [str(each.message) for each in seen if "cce_numba" in str(each.message)]
        assert len(told) == 1
        assert f"but {a_class.__name__} has not asked it for its loss" in told[0]
        assert "or unpatch the model" in told[0]

    @pytest.mark.parametrize("a_class", [OwnHead, OwnLoss])
    def test_not_where_nothing_is_patched(self, a_class, rows, tmp_path):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*cce_numba")
            losses(trainer_of(unpatch(patch(make())), rows, tmp_path, a_class))

    def test_a_forward_that_was_replaced(self, rows, tmp_path):
        """As Liger's kernels do."""
        model = patch(make())
        before = transformers.LlamaForCausalLM.forward
        model.forward = functools.wraps(before)(lambda *args, **kwargs: before(model, *args, **kwargs))
        with pytest.warns(UserWarning, match="but Trainer has not asked it for its loss"):
            losses(trainer_of(model, rows, tmp_path))

    def test_a_loop_that_asks_for_no_loss(self, batch):
        model = patch(make())
        with pytest.warns(UserWarning, match=r"LlamaForCausalLM: is patched .* was called in training without labels"):
            model(batch["input_ids"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(batch["input_ids"])
