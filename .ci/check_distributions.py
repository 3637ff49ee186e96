"""What a wheel and a source distribution must hold, and what they must not. Usage: check_distributions.py DIRECTORY"""

import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(directory: Path) -> None:
    """Raises AssertionError, naming the file, for the first that is missing or does not belong there."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (wheel,), (source,) = directory.glob("*.whl"), directory.glob("*.tar.gz")
    assert wheel.name.startswith(f"cce_numba-{version}-"), wheel.name

    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "cce_numba").rglob("*.py")} | {"cce_numba/py.typed"}
    metadata = {name for name in in_wheel if name.startswith(f"cce_numba-{version}.dist-info/")}
    assert any(name.endswith("/LICENSE") for name in metadata), "the wheel has no licence"
    assert in_wheel - metadata == package, sorted((in_wheel - metadata) ^ package)

    prefix = f"cce_numba-{version}/"
    with tarfile.open(source) as archive:
        in_source = {name.removeprefix(prefix) for name in archive.getnames()}
    wanted = package | {"LICENSE", "CHANGELOG.md", "CITATION.cff", "reference/__init__.py", "tests/conftest.py", ".ci/run"}
    assert wanted <= in_source, sorted(wanted - in_source)
    assert not any(name.endswith(".pyc") for name in in_source)
    print(f"{wheel.name}: {len(in_wheel)} files; {source.name}: {len(in_source)} files")


main(Path(sys.argv[1]))
