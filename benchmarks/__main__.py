"""The command line, `python -m benchmarks NAME [options]`: finds the program, runs it, turns errors into exit codes."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from benchmarks.errors import CannotRun, Wrong
from benchmarks.programs import PROGRAMS
from cce_numba.commands import Exit, UsageError

_EPILOG = f"""\
`python -m benchmarks NAME --help` tells the options of a program. Exit codes:
  {Exit.FINE:d}  fine
  {Exit.DISAGREES:d}  a result is wrong
  {Exit.USAGE:d}  wrong arguments or input file
  {Exit.UNAVAILABLE:d}  this machine lacks what the program needs
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a program and returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv[0] if argv and argv[0] in PROGRAMS else ""
    try:
        parser, chosen = _parsers(name)
        if not name:
            parser.parse_args(argv)  # prints the list or says what is wrong, and exits
        program = _imported(name)
        chosen.description = program.__doc__
        program.add_arguments(chosen)
        return program.run(parser.parse_args(argv)) or Exit.FINE
    except Wrong as error:
        return _failed(name, f"wrong: {error}", Exit.DISAGREES)
    except UsageError as error:
        return _failed(name, error, Exit.USAGE)
    except CannotRun as error:
        return _failed(name, error, Exit.UNAVAILABLE)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _parsers(name: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of the command line, and that of the program `name`, whose own options are still to be added."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measurements of cce_numba. Programs:",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    programs = parser.add_subparsers(metavar="NAME", required=True)
    parsers = {
        each: programs.add_parser(each, help=help_, formatter_class=argparse.RawDescriptionHelpFormatter)
        for each, help_ in PROGRAMS.items()
    }
    return parser, parsers.get(name, parser)


def _imported(name: str) -> ModuleType:
    """The program's module. Only this one is imported, so that the others may need packages that are not installed."""
    try:
        return importlib.import_module(f"benchmarks.programs.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("benchmarks", "cce_numba"):
            raise
        raise CannotRun(f"needs {error.name}, which is not installed") from error


def _failed(name: str, error: object, code: Exit) -> int:
    print(f"benchmarks {name}: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
