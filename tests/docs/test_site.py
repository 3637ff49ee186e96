"""The site builds without a warning, asks nothing of the network, and shows what the package and the records say."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import cce_numba
from benchmarks.measure import record
from benchmarks.tables.table1 import Figures
from tests.helpers.harness import SimulatorHarness

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
for package in ("sphinx", "furo", "myst_nb", "sphinx_copybutton", "latex2mathml", "torch", "transformers"):
    pytest.importorskip(package, reason="the docs extra is not installed: pip install '.[docs]'")

pytestmark = pytest.mark.skipif(SimulatorHarness.is_active(), reason="there is one site, whatever runs the kernels")
sys.path.append(str(DOCS))
from extensions import choices, docstrings, formulas, lessons  # noqa: E402


class Fetched(HTMLParser):
    """What a browser fetches to show a page: scripts, styles, pictures, fonts, frames; and where its links lead."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if "id" in given:
            self.ids.add(given["id"])
        if "src" in given:
            self.sources.append(given["src"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") not in ("canonical", None) and given.get("href"):
            self.sources.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where it was built, from scratch."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "docs/build.py", "--fresh", "--out", str(out), "--trees", str(out.with_name("trees"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Fetched(path) for path in sorted(site.rglob("*.html"))}


def test_the_pages_are_there(pages):
    for name in (
        "index",
        "start",
        "the_filter",
        "faq",
        "api/cce_numba",
        "notebooks/index",
        "notebooks/04_tiles_in_shared_memory",
    ):
        assert f"{name}.html" in pages
    assert sum(name.startswith("notebooks/") for name in pages) == 13


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for name, page in pages.items():
        assert page.sources, name
        remote = [source for source in page.sources if re.match(r"(?:https?:)?//", source)]
        assert not remote, f"{name} fetches {remote}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_links_within_the_site_lead_somewhere(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            path = (site / name).parent / target if target else site / name
            if not path.exists():
                broken.append(f"{name}: {link}")
            elif anchor and path.suffix == ".html":
                other = pages[path.resolve().relative_to(site.resolve()).as_posix()]
                broken += [] if anchor in other.ids else [f"{name}: {link}"]
    assert not broken, "\n".join(broken[:20])


def test_formulas_need_no_script(site):
    text = (site / "notebooks" / "01_the_problem.html").read_text(encoding="utf-8")
    assert text.count("<math") > 10
    assert "MathJax" not in text
    assert "<mfrac>" in formulas.mathml(r"\frac{e^{z_v}}{\sum_w e^{z_w}}", "block")


@pytest.mark.parametrize("module", ["cce_numba", "cce_numba.torch", "cce_numba.transformers", "cce_numba.parallel"])
def test_every_public_name_is_in_the_api(module, pages):
    names = __import__(module, fromlist=["__all__"]).__all__
    page = pages[f"api/{'cce_numba' if module == 'cce_numba.parallel' else module.rpartition('.')[2]}.html"]
    missing = [name for name in names if f"{module}.{name}" not in page.ids]
    assert not missing, f"docs/api lacks {missing}"


def test_every_name_of_the_reference_is_in_the_api(pages):
    import reference

    names = [name for name, x in vars(reference).items() if callable(x) and not name.startswith("_")]
    missing = [name for name in names if f"reference.{name}" not in pages["api/reference.html"].ids]
    assert not missing, f"docs/api/reference.md lacks {missing}"


def test_tables_are_those_of_the_records(site):
    text = (site / "speed.html").read_text(encoding="utf-8")
    for row in record.read("backward_h100")["rows"]:
        assert f"{row['call']['median_ms']:.2f} ms" in text
    assert record.read("forward_h100")["surroundings"]["commit"] in text
    for cell in record.read("table1_h100")["cells"]:
        if (figures := Figures.of(cell)) is not None:
            assert f"{figures.ms['both']:.1f} ms, {figures.x['both']['median']:.2f} X" in text


def test_what_the_package_chooses():
    import numpy as np

    half, single = np.dtype(np.float16), np.dtype(np.float32)
    assert [choices.chosen(cc, half) for cc in ((7, 5), (8, 0), (9, 0), (12, 0))] == ["simt", "ampere", "hopper", "ampere"]
    assert {choices.chosen(cc, single) for ccs in choices.GPUS for cc in ccs} == {"simt"}
    assert len(choices.chosen_table()) == 2 + len(choices.GPUS)
    assert any("distillation" in row for row in choices.extras_table())


def test_pictures_of_lessons_have_titles():
    notebook = lessons.SOURCE / "07_softmax_is_sparse.ipynb"
    found = lessons.pictures(notebook)
    assert len(found) >= 5
    assert all(svg.lstrip().startswith(("<svg", "<?xml")) for svg in found.values())


def test_the_version_is_the_packages(pages, site):
    assert f"cce_numba {cce_numba.__version__}" in (site / "index.html").read_text(encoding="utf-8")


def test_what_a_function_returns_is_not_taken_for_a_type(site):
    text = (site / "api" / "cce_numba.html").read_text(encoding="utf-8")
    assert "s device: 0-d, or for" in re.sub(r"\s+", " ", text)  # in one piece


def test_solutions_are_folded_away(site):
    text = (site / "notebooks" / "07_softmax_is_sparse.html").read_text(encoding="utf-8")
    hidden = (lessons.SOURCE / "07_softmax_is_sparse.ipynb").read_text(encoding="utf-8").count('"source_hidden": true')
    assert hidden >= 1
    assert text.count("Show the code") == hidden


def test_what_filters_cost_is_what_was_recorded():
    """The table of accuracy.md is a choice of a record's rows."""
    errors = {(row["name"], row["data"]): row["errors"] for row in record.read("backward_h100")["rows"] if "errors" in row}
    table = re.findall(
        r"^\|.*(`\"unbiased\"`|`\"drop\"`|exact) \|.*?\| (\S+e-3) \| (\S+e-3) \|$", (DOCS / "accuracy.md").read_text(), re.M
    )
    names = {'`"unbiased"`': "default filter", '`"drop"`': "filter that drops", "exact": "exact"}
    expected = [
        (word, *(f"{errors[name, data][of]['error'] * 1e3:.1f}e-3" for of in ("e", "c")))
        for data in ("calibrated", "real")
        for word, name in names.items()
    ]
    assert table == expected


@pytest.mark.parametrize("module", [choices, docstrings], ids=lambda module: module.__name__)
def test_examples_of_extensions(module):
    assert doctest.testmod(module).attempted >= 1
    assert doctest.testmod(module).failed == 0
