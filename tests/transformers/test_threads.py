"""Several threads on one model: what a call puts in place of the head is that call's alone."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from cce_numba.transformers import patch  # noqa: E402
from tests.transformers.models import V, has_no_logits, make  # noqa: E402


@pytest.fixture
def model():
    """One whose loss waits until the other thread has seen the model, so that no luck is needed to see them at once."""
    model = patch(make(num_hidden_layers=1), filter_eps=None)
    model.in_loss, model.may_go_on = threading.Event(), threading.Event()
    loss_function = model.loss_function

    def slow(**kwargs):
        model.in_loss.set()
        assert model.may_go_on.wait(60)
        return loss_function(**kwargs)

    model.loss_function = slow
    return model


def in_a_thread(function):
    result = []

    def work():
        try:
            result.append(function())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, result


@pytest.mark.parametrize("wants", ["logits", "loss", "head", "generate"])
def test_while_another_thread_is_between_head_and_loss(model, wants, batch):
    thread, result = in_a_thread(lambda: model(**batch))
    try:
        assert model.in_loss.wait(60)
        if wants == "logits":
            with torch.no_grad():
                assert isinstance(model(batch["input_ids"]).logits, torch.Tensor)
        elif wants == "head":
            assert type(model.lm_head) is torch.nn.Linear
            assert model.lm_head(torch.ones(3, 32)).shape == (3, V)
            assert "forward" not in vars(model.lm_head)
        elif wants == "generate":
            assert model.generate(batch["input_ids"], max_new_tokens=2, pad_token_id=0).shape[1] > 11
        else:
            model.may_go_on.set()
            assert has_no_logits(model(**batch))
    finally:
        model.may_go_on.set()
        thread.join()
    assert has_no_logits(result[0]), result
    assert type(model.lm_head) is torch.nn.Linear


def test_gradients_of_two_threads_add_up(batch):
    """As several threads train one model without locks; each thread's backward is of its own call."""
    model = patch(make(num_hidden_layers=1), filter_eps=None)
    expected = torch.autograd.grad(model(**batch).loss, model.lm_head.weight)[0]
    barrier = threading.Barrier(2)

    def work():
        grads = []
        for _ in range(5):
            barrier.wait(60)
            grads += torch.autograd.grad(model(**batch).loss, model.lm_head.weight)
        return grads

    threads, results = zip(*(in_a_thread(work) for _ in range(2)), strict=True)
    for thread in threads:
        thread.join()
    for result in results:
        assert isinstance(result[0], list), result
        for grad in result[0]:
            torch.testing.assert_close(grad, expected, rtol=0, atol=0)
