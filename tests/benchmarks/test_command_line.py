"""`python -m benchmarks`: the list of programs, what they import, how they end."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmarks
import cce_numba
from benchmarks import __main__ as command_line
from benchmarks import programs
from benchmarks.errors import CannotRun, Wrong
from benchmarks.programs import PROGRAMS
from cce_numba.commands import UsageError

ROOT = Path(__file__).parents[2]
NEED_TORCH = ("autograd", "comparison", "figure4", "figure5", "learning", "memory", "table1", "training_step")


def module(name):
    if name in NEED_TORCH:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    return importlib.import_module(f"benchmarks.programs.{name}")


def test_the_list_names_each_program_and_each_file_is_in_it(capsys):
    assert {found.name for found in pkgutil.iter_modules(programs.__path__)} == set(PROGRAMS)
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_tells_its_options(name, capsys):
    program = module(name)
    with pytest.raises(SystemExit, match="0"):
        command_line.main([name, "--help"])
    out = capsys.readouterr().out
    assert f"python -m benchmarks {name}" in program.__doc__
    assert program.__doc__.splitlines()[0] in out


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_needs_cupy_to_be_imported(name):
    """So `--help` works, and a machine without CuPy is told what it lacks. PyTorch imports CuPy by itself, if at all."""
    module(name)
    code = f"import sys; sys.modules['cupy'] = None; import benchmarks.programs.{name}"
    if name in NEED_TORCH:
        code = code.replace("import sys;", "import sys, torch;")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_list_imports_neither_cupy_nor_torch_nor_matplotlib():
    code = (
        "import sys, benchmarks.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: print(sorted({'cupy', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert told.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (None, 0, ""),
        (Wrong("dE"), 1, "benchmarks cpu: error: wrong: dE\n"),
        (UsageError("--data: none"), 2, "benchmarks cpu: error: --data: none\n"),
        (CannotRun("no GPU"), 3, "benchmarks cpu: error: no GPU\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_lines_and_exit_codes(error, code, told, monkeypatch, capsys):
    def run(arguments):
        if error is not None:
            raise error

    program = SimpleNamespace(add_arguments=lambda parser: None, run=run, __doc__="")
    monkeypatch.setattr(command_line, "_imported", lambda name: program)
    assert command_line.main(["cpu"]) == code
    assert capsys.readouterr().err == told


def test_a_program_that_is_not_there(capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["absent"])
    assert "invalid choice: 'absent'" in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_told(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(command_line.importlib, "import_module", missing)
    assert command_line.main(["autograd"]) == 3
    assert capsys.readouterr().err == "benchmarks autograd: error: needs torch, which is not installed\n"


def test_a_mistake_of_our_own_is_not_taken_for_that(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'benchmarks.absent'", name="benchmarks.absent")

    monkeypatch.setattr(command_line.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError):
        command_line.main(["autograd"])


def test_no_file_touches_the_search_path_or_has_a_sibling_by_its_bare_name():
    folder = Path(benchmarks.__file__).parent
    own = {path.stem for path in folder.rglob("*.py")} - {"__init__"}
    for path in folder.rglob("*.py"):
        source = path.read_text()
        assert "sys.path" not in source, path
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name in own], path


def test_benchmarks_are_not_shipped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    include = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert any(fnmatch(cce_numba.__name__, pattern) for pattern in include)
    for name in ("benchmarks", "benchmarks.programs"):
        assert not any(fnmatch(name, pattern) for pattern in include)
