"""Every kernel on small ragged problems, each checked against the reference: what compute-sanitizer runs.

    python -m benchmarks sanitize                                   all parts
    python -m benchmarks sanitize --only hopper-backward            one part
    python -m benchmarks sanitize --only "bfloat16 two thresholds"  the checks whose line contains this
    CCE_SANITIZE="memcheck racecheck" benchmarks/sanitize.sh        all parts, watched by each of these tools

Each check prints one line that ends in "right". A check that is wrong prints its traceback; the others run nevertheless.
Needs the test extra and runs from the repository's root, since problems and judges are those of the test suite.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable

from benchmarks.errors import CannotRun, Wrong
from benchmarks.measure import device
from benchmarks.small_cases import Check
from cce_numba.commands import UsageError, machine

HOPPER, AMPERE = ("hopper-forward", "hopper-backward", "hopper-distillation"), ("ampere-forward", "ampere-backward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help=f"parts ({', '.join(_parts())}), or text that a check's line must contain"
    )
    parser.add_argument("--list", action="store_true", help="print the checks' names and run none")


def run(arguments: argparse.Namespace) -> None:
    """Runs the checks. Raises Wrong if one failed."""
    wanted = arguments.only or [""]
    if arguments.list:
        print(*_checks(_parts(), wanted), sep="\n")
        return
    device.require()
    parts, capability = _parts(), machine.gpus()[0].compute_capability
    major = int(capability.partition(".")[0])
    for names, runs, about in ((HOPPER, major == 9, "9.x (Hopper)"), (AMPERE, major >= 8, "8.0 and later (Ampere)")):
        if not runs:
            why = f"the GPU has compute capability {capability}, and these parts are about {about}"
            if arguments.only and all(what in names for what in arguments.only):
                raise CannotRun(why)
            print(f"{', '.join(names)}: not run, since {why}")
            parts = {name: checks for name, checks in parts.items() if name not in names}
    wrong = []
    for name, check in _checks(parts, wanted).items():
        try:
            check()
        except Exception:
            traceback.print_exc()
            wrong.append(name)
        print(f"{name}: {'wrong' if name in wrong else 'right'}", flush=True)
    if wrong:
        raise Wrong("; ".join(wrong))


def _checks(parts: dict[str, Callable[[], dict[str, Check]]], wanted: list[str]) -> dict[str, Check]:
    """Checks whose line contains what is wanted, by that line. Raises UsageError if nothing is left."""
    every = {f"{part} {name}": check for part, checks in parts.items() for name, check in checks().items()}
    chosen = {name: check for name, check in every.items() if any(what in name for what in wanted)}
    if not chosen:
        raise UsageError(f"--only: no check's line contains {' or '.join(map(repr, wanted))}; --list prints them")
    return chosen


def _parts() -> dict[str, Callable[[], dict[str, Check]]]:
    """Checks by part."""

    def simt() -> dict[str, Check]:
        from benchmarks.small_cases import simt
        from tests.helpers.harness import GpuHarness

        return simt.checks(GpuHarness("simt"))

    def hopper_forward() -> dict[str, Check]:
        from benchmarks.small_cases import hopper_forward, odd
        from tests.helpers.harness import HopperHarness

        return hopper_forward.checks(HopperHarness(), odd.OddGpuHarness("hopper"))

    def hopper_backward() -> dict[str, Check]:
        from benchmarks.small_cases import hopper_backward, odd
        from tests.helpers.harness import HopperHarness

        return hopper_backward.checks(HopperHarness(), odd.OddGpuHarness("hopper"))

    def hopper_distillation() -> dict[str, Check]:
        from benchmarks.small_cases import distillation, odd
        from tests.helpers.harness import HopperHarness

        return distillation.checks(HopperHarness(), odd.OddGpuHarness("hopper"))

    def ampere_forward() -> dict[str, Check]:
        from benchmarks.small_cases import ampere, odd
        from tests.helpers.harness import AmpereHarness

        return ampere.forward(AmpereHarness(), odd.OddGpuHarness("ampere"))

    def ampere_backward() -> dict[str, Check]:
        from benchmarks.small_cases import ampere, odd
        from tests.helpers.harness import AmpereHarness

        return ampere.backward(AmpereHarness(), odd.OddGpuHarness("ampere"))

    return {
        "simt": simt,
        "hopper-forward": hopper_forward,
        "hopper-backward": hopper_backward,
        "hopper-distillation": hopper_distillation,
        "ampere-forward": ampere_forward,
        "ampere-backward": ampere_backward,
    }
