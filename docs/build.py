"""Builds the site, with warnings as errors: `python docs/build.py [--execute] [--out DIRECTORY]`.

It needs `pip install ".[docs]"`, and no network.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from sphinx.cmd.build import main as sphinx_build

DOCS = Path(__file__).parent


def build(out: Path, *, execute: bool = False, trees: Path | None = None, jobs: int = 1, fresh: bool = False) -> int:
    """Builds into a directory; returns Sphinx's exit status, 0 for a site without warnings.

    execute: run the notebooks instead of showing their committed outputs. Of notebooks that have not changed since, the outputs
        of the last run are taken.
    trees: where pages that were read are kept for the next build.
    fresh: read all pages, those too that have not changed since the last build.
    """
    os.environ["CCE_DOCS_EXECUTE"] = "1" if execute else "0"
    trees = trees or DOCS / "_build" / ("trees-executed" if execute else "trees")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--jobs", str(jobs), "--doctree-dir", str(trees)]
    options += ["--fresh-env"] if fresh else []
    return sphinx_build(["--builder", "html", *options, str(DOCS), str(out)])


def main() -> int:
    """Builds, and says where the site is."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--execute", action="store_true", help="run the notebooks (minutes), with a cache")
    parser.add_argument(
        "--out", type=Path, default=DOCS / "_build" / "html", help="where to write it (default docs/_build/html)"
    )
    parser.add_argument("--trees", type=Path, help="where to keep what was read (default beside the site)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that read and write pages")
    parser.add_argument("--fresh", action="store_true", help="read all pages anew")
    arguments = parser.parse_args()
    begin = time.monotonic()
    options = {"execute": arguments.execute, "trees": arguments.trees, "jobs": arguments.jobs, "fresh": arguments.fresh}
    status = build(arguments.out, **options)
    if status == 0:
        print(f"{arguments.out / 'index.html'}, {time.monotonic() - begin:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
