"""The command line, `python -m cce_numba`: reads arguments, runs a command, turns what went wrong into exit codes."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import cce_numba
from cce_numba.backend import BACKENDS, BackendUnavailable
from cce_numba.commands import DTYPES, Exit, UsageError
from cce_numba.commands.options import OPTIONS
from cce_numba.options import DEFAULTS, FILTERS

_EXIT_CODES = f"""\
exit codes:
  {Exit.FINE:d}  fine
  {Exit.DISAGREES:d}  demo: the result does not agree with float64 mathematics
  {Exit.USAGE:d}  wrong arguments or input file, or too little memory for the problem, or no cache to compile into
  {Exit.UNAVAILABLE:d}  the backend that was asked for cannot run on this machine, or not be compiled on it (info tells why)
Results go to stdout, messages and progress to stderr; every error is a line that starts with "cce_numba: error:".
"""


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments as every other error is reported."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        _need_rich()
        if arguments.command == "info":
            from cce_numba.commands import info

            return info.run(as_json=arguments.json)
        if arguments.command == "precompile":
            from cce_numba.commands import precompile

            return precompile.run(arguments)
        from cce_numba.commands import demo

        return demo.run(arguments)
    except UsageError as error:
        return _failed(error, Exit.USAGE)
    except MemoryError as error:
        return _failed(f"too little memory for this problem, choose a smaller one: {error}", Exit.USAGE)
    except BackendUnavailable as error:
        return _failed(error, Exit.UNAVAILABLE)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cce_numba",
        description="Cut Cross-Entropy: loss and gradients of a linear layer with cross-entropy, without stored logits.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cce_numba {cce_numba.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands.add_parser("demo", help="compute loss and gradients of a problem, and compare with float64"))
    _add_precompile(commands.add_parser("precompile", help="compile kernels into the cache on disk; needs no GPU"))
    info = commands.add_parser("info", help="tell devices, versions, which backend would run, what is missing or compiled")
    info.epilog, info.formatter_class = _EXIT_CODES, argparse.RawDescriptionHelpFormatter
    info.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.description = (
        "Computes the loss and its gradients, of a problem that it makes or reads, and shows time, memory and how\n"
        "well they agree with float64 mathematics on a sample of tokens and vocabulary entries."
    )
    demo.epilog = (
        "FILE.npz holds e (N, D) and c (V, D) in float16, float32, float64, or bfloat16 as uint16 bit patterns;\n"
        "targets (N,), integers in [0, V) or -100 for tokens that do not count; and, if known, loss (N,), each\n"
        "token's loss to compare with.\n\n" + _EXIT_CODES
    )
    demo.formatter_class = argparse.RawDescriptionHelpFormatter
    demo.add_argument("--data", metavar="FILE.npz", help="read the problem from a file instead of making one")
    demo.add_argument("--tokens", type=_size, metavar="N", help="how many tokens; with --data, take the first N")
    demo.add_argument("--vocab", type=_size, metavar="V", help="how many vocabulary entries to make")
    demo.add_argument("--dim", type=_size, metavar="D", help="hidden size of the problem to make")
    demo.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of e and c; otherwise the file's own, or float32 on a CPU and bfloat16 on a GPU",
    )
    demo.add_argument("--backend", choices=BACKENDS, help="force a backend; otherwise a GPU is used if there is one")
    demo.add_argument(
        "--filter",
        choices=FILTERS,
        default=DEFAULTS["filter"],
        help="what becomes of probabilities below --filter-eps: unbiased (default) lets some survive by chance and multiplies "
        "them, so that gradients are right on average; drop leaves them out of the gradients",
    )
    demo.add_argument(
        "--filter-eps",
        type=_filter_eps,
        default="auto",
        metavar="EPS",
        help="probabilities below this are filtered: auto (default, which depends on the filter and the dtype), a number in "
        "(0, 1), or none for exact gradients",
    )
    demo.add_argument("--seed", type=_seed, default=0, help="of the problem and of the sample to compare (default 0)")
    demo.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _add_precompile(precompile: argparse.ArgumentParser) -> None:
    precompile.description = (
        "Compiles the kernels that loss and gradients launch, for devices of a compute capability, and keeps them on\n"
        "disk, where a process on such a device finds them: for containers, which are built on machines without a GPU.\n"
        "The directory is CCE_CACHE_DIR, or ~/.cache/cce_numba. Kernels for strided arrays are not among them."
    )
    precompile.epilog, precompile.formatter_class = _EXIT_CODES, argparse.RawDescriptionHelpFormatter
    precompile.add_argument(
        "--backend",
        nargs="+",
        choices=BACKENDS[:-1],
        help="which backends; otherwise for each dtype the one that would be chosen",
    )
    precompile.add_argument("--dtype", nargs="+", choices=DTYPES, help="of e and c; otherwise all that the backend takes")
    precompile.add_argument(
        "--options",
        nargs="+",
        choices=OPTIONS,
        default=(),
        metavar="OPTION",
        help=f"what calls have, all of these at once; otherwise nothing but e, c and targets: {', '.join(OPTIONS)}",
    )
    precompile.add_argument(
        "--cc",
        nargs="+",
        type=_compute_capability,
        default=((9, 0),),
        metavar="CC",
        help="compute capabilities, like 8.0 (default 9.0)",
    )
    precompile.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _size(text: str) -> int:
    return _integer(text, 1)


def _seed(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    # The upper limit keeps what sizes are multiplied to within 64 bits, so that too much is told by a MemoryError.
    if not (text.isdecimal() and len(text) <= 9 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"must be an integer of at most 9 digits, and at least {least}, got {text!r}")
    return int(text)


def _filter_eps(text: str) -> float | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        eps = float(text)
    except ValueError:
        eps = 0.0
    if not 0 < eps < 1:
        raise argparse.ArgumentTypeError(f"must be auto, none or a number in (0, 1), got {text!r}")
    return eps


def _compute_capability(text: str) -> tuple[int, int]:
    if (match := re.fullmatch(r"(\d{1,2})\.(\d)", text)) is None:
        raise argparse.ArgumentTypeError(f"must be a compute capability like 9.0, got {text!r}")
    return int(match[1]), int(match[2])


def _need_rich() -> None:
    try:
        import rich  # noqa: F401
    except ImportError:
        raise UsageError("the command line needs rich: pip install 'cce_numba[cli]'") from None


def _failed(error: object, code: Exit) -> int:
    print(f"cce_numba: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
