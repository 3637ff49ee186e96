"""Every example of the site's pages runs, and the lines for those who come from elsewhere give what stood there before."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.harness import SimulatorHarness

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).parts[0] not in ("_build", "notebooks"))
BLOCK = re.compile(r"^(?:<!-- (?P<mark>[\w.]+) -->\n)?```(?P<language>[^\n`]*)\n(?P<source>.*?)^```$", re.DOTALL | re.MULTILINE)
CUPY, GPU = "cupy", "gpu"
OF_OTHERS = {"recipes.md": "tests/torch/test_recipes.py runs these, and checks what they compute"}

pytestmark = pytest.mark.skipif(SimulatorHarness.is_active(), reason="their sizes are not for the simulator")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. line: where it begins, from 1."""

    mark: str | None
    language: str
    source: str
    line: int


def blocks(text: str) -> list[Block]:
    return [
        Block(found["mark"], found["language"], found["source"], text[: found.start("source")].count("\n") + 1)
        for found in BLOCK.finditer(text)
    ]


def examples(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text(encoding="utf-8")) if block.language == "python"]


def with_examples() -> list[Path]:
    return [page for page in PAGES if examples(page) and page.name not in OF_OTHERS]


def run(page: Path, has_gpu: bool) -> dict:
    """The page's examples one after the other, in one namespace; without a GPU those with CuPy run with NumPy."""
    names: dict = {"__name__": "page"}
    for block in examples(page):
        source = block.source
        if block.mark == GPU and not has_gpu:
            continue
        if block.mark == CUPY and not has_gpu:
            source = source.replace("import cupy as cp", "import numpy as cp")
        compiled = compile("\n" * (block.line - 1) + source, str(page), "exec")  # so that errors name the page's lines
        exec(compiled, names)
    return names


def needs(page: Path) -> None:
    text = "".join(block.source for block in examples(page))
    for package in ("torch", "transformers", "hypothesis", "jax"):
        if re.search(rf"^(?:import|from) {package}\b|^from cce_numba\.{package}", text, re.MULTILINE):
            pytest.importorskip(package, reason=f"{package} is not installed")


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.fixture(autouse=True)
def _no_group_is_left():
    """A page may begin a process group of `torch.distributed`; other tests need there to be none."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.parametrize("page", with_examples(), ids=name_of)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_examples_run(page, capsys):
    needs(page)
    run(page, has_gpu=False)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "page", [page for page in with_examples() if any(b.mark in (CUPY, GPU) for b in examples(page))], ids=name_of
)
def test_the_examples_run_on_a_gpu(page, capsys):
    needs(page)
    run(page, has_gpu=True)


def test_no_page_is_forgotten():
    """Python under another name would not run: only what is marked as someone else's to run may be so."""
    pages = {name_of(page) for page in with_examples()}
    assert {"index.md", "start.md", "the_filter.md", "testing.md", "cupy_numba.md", "hugging_face.md"} <= pages
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            if re.search(r"^(?:import|from) \w", block.source, re.MULTILINE) and block.language not in ("python", "diff"):
                assert block.language == "py", f"{name_of(page)}:{block.line} is not run"
                assert block.source in (DOCS.parent / "README.md").read_text(), (
                    f"{name_of(page)}:{block.line} is not the README's"
                )


def test_an_example_that_fails_names_its_page_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\nx = 1\n```\n\n<!-- gpu -->\n```python\nno_gpu\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as failed:
        run(page, has_gpu=False)
    last = failed.traceback[-1]
    assert (Path(str(last.path)).name, last.lineno + 1) == ("page.md", 13)


CHANGES = {b.mark: b.source for b in blocks((DOCS / "from_peers.md").read_text(encoding="utf-8")) if b.language == "diff"}


def lines(change: str, signs: str) -> str:
    return "".join(line[1:] for line in change.splitlines(keepends=True) if line[0] in signs)


def test_there_is_a_change_for_each_peer():
    expected = {"cut_cross_entropy", "Liger", "F.cross_entropy", "F.linear_cross_entropy", "quack", "verl", "TRL", "Megatron"}
    assert set(CHANGES) == expected
    readme = (DOCS.parent / "README.md").read_text()
    for name in ("cut_cross_entropy", "Liger", "F.cross_entropy"):
        assert CHANGES[name] in readme


@pytest.mark.parametrize("name", CHANGES)
def test_the_lines_give_what_stored_logits_give(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(0)
    weight = torch.randn(50, 8, requires_grad=True)
    e, targets = torch.randn(2, 9, 8) if name == "cut_cross_entropy" else torch.randn(18, 8), torch.randint(0, 50, (18,))
    targets = targets.reshape(e.shape[:-1])
    names = {"e": e, "weight": weight, "targets": targets, "torch": torch}
    exec(compile(lines(CHANGES[name], " +"), "docs/from_peers.md", "exec"), names)

    if name == "cut_cross_entropy":
        e, targets = e[:, :-1].reshape(-1, 8), targets[:, 1:].reshape(-1)
    logits = e @ weight.T
    functional = torch.nn.functional
    if name in ("verl", "TRL"):
        log_p = (logits / 0.7).log_softmax(-1)
        torch.testing.assert_close(names["logprobs"], log_p.gather(-1, targets[:, None])[:, 0])
        torch.testing.assert_close(names["entropy"], -(log_p.exp() * log_p).sum(-1))
        (names["logprobs"].sum() + names["entropy"].sum()).backward()
    elif name == "Megatron":
        torch.testing.assert_close(names["losses"], functional.cross_entropy(logits, targets, reduction="none"))
        names["losses"].sum().backward()
    else:
        smoothing = 0.1 if "label_smoothing" in CHANGES[name] else 0.0
        torch.testing.assert_close(names["loss"], functional.cross_entropy(logits, targets, label_smoothing=smoothing))
        names["loss"].backward()
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["F.cross_entropy", "F.linear_cross_entropy"])
def test_what_stood_there_is_pytorchs(name):
    """Of PyTorch the lines that are taken away run, too."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not hasattr(torch.nn.functional, name.removeprefix("F.")):
        pytest.skip("this PyTorch has no such function")
    torch.manual_seed(0)
    given = {"e": torch.randn(18, 8), "weight": torch.randn(50, 8), "targets": torch.randint(0, 50, (18,)), "torch": torch}
    before, after = dict(given), dict(given)
    exec(lines(CHANGES[name], " -"), before)
    exec(lines(CHANGES[name], " +"), after)
    torch.testing.assert_close(after["loss"], before["loss"])
