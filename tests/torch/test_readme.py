"""The README's lines for those who come from elsewhere: they run, and give what stood there before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

README = (Path(__file__).parent.parent.parent / "README.md").read_text()
CHANGES = dict(re.findall(r"<!-- ([\w.]+) -->\n```diff\n(.*?)```", README, re.DOTALL))


def test_there_is_one_for_each():
    assert set(CHANGES) == {"cut_cross_entropy", "Liger", "F.cross_entropy"}
    assert all(change.count("\n") == 3 for change in CHANGES.values())


@pytest.mark.parametrize("name", CHANGES)
def test_the_lines_run(name):
    torch.manual_seed(0)
    weight = torch.randn(50, 8, requires_grad=True)
    e, targets = torch.randn(2, 9, 8) if name == "cut_cross_entropy" else torch.randn(18, 8), torch.randint(0, 50, (18,))
    targets = targets.reshape(e.shape[:-1])
    names = {"e": e, "weight": weight, "targets": targets, "torch": torch}
    after = "".join(line[1:] for line in CHANGES[name].splitlines(keepends=True) if line[0] in " +")
    exec(compile(after, "README.md", "exec"), names)
    if name == "cut_cross_entropy":
        e, targets = e[:, :-1].reshape(-1, 8), targets[:, 1:].reshape(-1)
    smoothing = 0.1 if name == "Liger" else 0.0
    expected = torch.nn.functional.cross_entropy(e @ weight.T, targets, label_smoothing=smoothing)
    torch.testing.assert_close(names["loss"], expected)
    names["loss"].backward()
    assert weight.grad.abs().max() > 0
