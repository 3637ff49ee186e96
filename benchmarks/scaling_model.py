"""A prediction for several GPUs: bytes by formula, rates as measured on one. `python -m benchmarks.scaling_model`.

It prints the table of docs/several_gpus.md. NOTHING OF IT HAS BEEN CHECKED ON SEVERAL GPUS YET.

A model is trained on tensor x data x context ranks. Tensor ranks share the vocabulary; context ranks share the tokens of a
sequence, and data ranks the batch, so a loss sees the tokens of one data and context rank. With N such tokens, V entries, D
hidden entries, T tensor ranks and P = data x context ranks, a rank

    computes    1 / T of what one GPU computes for N tokens, forward and backward, at the rate that one GPU was measured at
    gathers     12 N bytes from each of the T - 1 other ranks: three float32 numbers a token; and in training 8 N bytes, on
                the way: bounds, by which ranks flag fewer columns
    sums dE     4 N D bytes (float32) over T ranks; a ring moves 2 (T - 1) / T of them through each link for an all-reduce,
                and (T - 1) / T for a reduce-scatter, where tokens are in shards
    gathers e   2 N D bytes (bfloat16) times (T - 1) / T, where tokens are in shards
    sums dC     2 V D / T bytes (bfloat16) over P ranks, 2 (P - 1) / P of them through each link; that is DDP's or FSDP's work

Not in the model: that a rank may have to look at more columns, by bounds that are lower than those of one GPU; the sort and the
lists of the backward, which do not shrink with V / T; and overlap. Without overlap the times add up, so this is what must be
beaten. Bandwidths are nominal, not measured, unless a record of `python -m benchmarks several_gpus` is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.measure import record

SHAPE = (8192, 256_000, 2304)
LAYOUTS = ((4, 1, 1), (8, 1, 1), (4, 2, 1), (8, 8, 1), (8, 4, 2), (8, 64, 2), (8, 128, 1))
PLACE = "scaling model"  # the marker in docs/several_gpus.md


@dataclass(frozen=True)
class Links:
    """What carries bytes. Nominal for H100 SXM: NVLink 4 in one direction, and one port of 400 Gbit/s for each GPU.

    Attributes:
        within: bytes a second and direction between GPUs of one host.
        between: the same between hosts.
        per_host: GPUs of a host.
        start_s: seconds until a collective begins to move.
        is_measured: whether `within` was measured.
    """

    within: float = 450e9
    between: float = 50e9
    per_host: int = 8
    start_s: float = 20e-6
    is_measured: bool = False


@dataclass(frozen=True)
class Layout:
    """Ranks. All tensor ranks are on one host."""

    tensor: int
    data: int
    context: int

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.tensor * self.data * self.context


@dataclass(frozen=True)
class Volumes:
    """Bytes through a rank's link in one direction, in a ring."""

    bounds: float
    gather: float
    sum_e: float
    gather_e: float
    sum_c: float


def volumes(shape: tuple[int, int, int], layout: Layout, in_shards: bool) -> Volumes:
    """Of a step. in_shards: tokens are in shards (sequence parallel).

    >>> volumes((1024, 128, 64), Layout(4, 2, 1), False)
    Volumes(bounds=24576, gather=36864, sum_e=393216.0, gather_e=0.0, sum_c=4096.0)
    """
    N, V, D = shape
    T, P = layout.tensor, layout.data * layout.context
    part = (T - 1) / T
    return Volumes(
        bounds=8 * N * (T - 1),
        gather=12 * N * (T - 1),
        sum_e=4 * N * D * part * (1 if in_shards else 2),
        gather_e=2 * N * D * part * in_shards,
        sum_c=2 * V * D / T * 2 * (P - 1) / P,
    )


@dataclass(frozen=True)
class Rates:
    """Milliseconds of one GPU, from recorded results: a forward; loss and gradients, exact and with the default filter."""

    forward: float
    exact: float
    default: float


def rates() -> Rates:
    """Those of one H100 with calibrated data (`benchmarks/results/backward_h100.json`), for `SHAPE`."""
    rows = {row["name"]: row for row in record.read("backward_h100")["rows"] if row["data"] == "calibrated"}
    return Rates(*(rows[name]["call"]["median_ms"] for name in ("forward alone", "exact", "default filter")))


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of a rank, without overlap, and what of T GPUs' time is not communication of the loss.

    Attributes:
        forward, exact, default: of the loss, and of loss and gradients.
        sum_c: of dC's sum over data and context ranks, which is not the loss's, and may overlap with the body's backward.
    """

    forward: float
    exact: float
    default: float
    sum_c: float

    def efficiency(self, one: Rates, tensor: int) -> Iterator[float]:
        """Of forward, exact and default: the time of one GPU, divided by tensor ranks and by the time predicted."""
        for name in ("forward", "exact", "default"):
            yield getattr(one, name) / tensor / getattr(self, name)


def predicted(one: Rates, shape: tuple[int, int, int], layout: Layout, links: Links, in_shards: bool = False) -> Prediction:
    """The times of a rank."""
    moved = volumes(shape, layout, in_shards)

    def ms(n_bytes: float, bandwidth: float) -> float:
        return 1e3 * (links.start_s + n_bytes / bandwidth) if n_bytes else 0.0

    forward = one.forward / layout.tensor + ms(moved.gather, links.within) + ms(moved.gather_e, links.within)
    backward = ms(moved.sum_e, links.within) + ms(moved.gather_e, links.within)
    bounds = ms(moved.bounds, links.within)
    between = links.within if layout.ranks <= links.per_host else links.between
    return Prediction(
        forward=forward,
        exact=forward + (one.exact - one.forward) / layout.tensor + backward,
        default=forward + bounds + (one.default - one.forward) / layout.tensor + backward,
        sum_c=ms(moved.sum_c, between),
    )


def table(links: Links, in_shards: bool = False) -> str:
    """The page's table."""
    one = rates()
    lines = [
        "| GPUs | tensor x data x context | forward | exact | default | efficiency of default | sum of dC over the others |",
        "|---|---|---|---|---|---|---|",
        f"| 1 | measured | {one.forward:.2f} ms | {one.exact:.2f} ms | {one.default:.2f} ms | | |",
    ]
    for sizes in LAYOUTS:
        layout = Layout(*sizes)
        found = predicted(one, SHAPE, layout, links, in_shards)
        *_, share = found.efficiency(one, layout.tensor)
        lines.append(
            f"| {layout.ranks} | {layout.tensor} x {layout.data} x {layout.context} | {found.forward:.2f} ms "
            f"| {found.exact:.2f} ms | {found.default:.2f} ms | {share:.0%} | {found.sum_c:.2f} ms |"
        )
    return "\n".join(lines)


def links_of(results: dict[str, Any]) -> Links:
    """With the bandwidth that a record of `several_gpus` has: that of the largest all-reduce, as a ring moves bytes."""
    measured = max(results["collectives"], key=lambda each: each["bytes"] if each["name"] == "all_reduce" else 0)
    return replace(Links(), within=measured["bytes_per_second"], is_measured=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--record", metavar="NAME", help="take the bandwidth that several_gpus measured: benchmarks/results/NAME.json"
    )
    parser.add_argument("--in-shards", action="store_true", help="tokens in shards (sequence parallel)")
    arguments = parser.parse_args()
    links = links_of(record.read(arguments.record)) if arguments.record else Links()
    print(table(links, arguments.in_shards))


if __name__ == "__main__":
    main()
