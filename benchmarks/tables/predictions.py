"""What other GPUs would take: an H100's recorded times, scaled by datasheets' rates. Predictions, not measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SHAPE = (8192, 256_000, 2304)  # N, V, D of the predicted problem
_H100_BF16 = 989.4  # TFLOP/s, dense


@dataclass(frozen=True)
class Gpu:
    """A GPU by its datasheet.

    Attributes:
        name: as its maker calls it.
        bf16: TFLOP/s of dense bfloat16 products that are summed in float32.
        tf32: TFLOP/s of dense tf32 products.
        float32: TFLOP/s of ordinary float32 arithmetic.
        native: whether `mma.sync` reaches these rates; where newer instructions alone do, this says nothing of ours.
        source: where this is from.
    """

    name: str
    bf16: float
    tf32: float
    float32: float
    native: bool
    source: str


GPUS = (
    Gpu("A100 SXM", 312, 156, 19.5, True, "[datasheet](https://www.nvidia.com/en-us/data-center/a100/)"),
    Gpu(
        *("RTX 4090", 165.2, 82.6, 82.6, True),
        "[Ada whitepaper](https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf), appendix A",
    ),
    Gpu("L40S", 362, 183, 91.6, True, "[datasheet](https://www.nvidia.com/en-us/data-center/l40s/)"),
    Gpu(
        *("RTX 5090", 209.5, 104.8, 104.8, True),
        "[RTX Blackwell whitepaper](https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/"
        "nvidia-rtx-blackwell-gpu-architecture.pdf), "
        "appendix A",
    ),
    Gpu("B200 SXM", 2250, 1125, 75, False, "[HGX datasheet](https://www.nvidia.com/en-us/data-center/hgx/)"),
)


def markdown(forward: dict[str, Any], ampere: dict[str, Any] | None) -> str:
    """The table. forward: a record of `forward`. ampere: a record of `ampere`, None before there is one.

    One product is predicted to run at the share of the datasheet's rate that cuBLAS has on the H100. Our calls are predicted to
    take as many times the time of `mma.sync` alone as on the H100, and `mma.sync` alone to be as fast as one product.
    """
    product_ms = _product_ms(forward)
    share = 2 * _volume() / product_ms / 1e9 / _H100_BF16
    times = _times_of_limit(ampere)
    columns = "GPU", "bf16, TFLOP/s", "one product", *times, "float32 by tf32 products, of FMA's rate", "source"
    rows = [columns, ("---",) * len(columns)]
    for gpu in GPUS:
        floor = 2 * _volume() / (gpu.bf16 * share) / 1e9
        # Three products of tf32 for each one of float32.
        speed = f"{gpu.tf32 / 3 / gpu.float32:.2f}" if gpu.native else "not known"
        calls = [f"{floor * x:.0f} ms" if x is not None and gpu.native else "not known" for x in times.values()]
        rows.append((gpu.name, f"{gpu.bf16:g}", f"{floor:.1f} ms", *calls, speed, gpu.source))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _volume() -> float:
    N, V, D = _SHAPE
    return float(N) * V * D


def _product_ms(forward: dict[str, Any]) -> float:
    problem = next(p for p in forward["problems"] if (p["N"], p["V"], p["D"]) == _SHAPE)
    return problem["calls"]["cuBLAS e @ c.T"]["median_ms"]


def _times_of_limit(ampere: dict[str, Any] | None) -> dict[str, float | None]:
    """How many times the time of `mma.sync` alone each call takes on the H100, by name; None before that was measured."""
    names = {"forward alone": "loss", "default filter": "loss and gradients, default", "exact": "loss and gradients, exact"}
    found: dict[str, float | None] = dict.fromkeys(names.values())
    if ampere is not None and "limit" in ampere:
        limit = ampere["limit"]["ways"]["registers"]["x"]["median"]
        for row in ampere.get("rows", ()):
            if row["data"] == "calibrated" and "ampere" in row.get("calls", {}):
                found[names[row["name"]]] = row["calls"]["ampere"]["x"]["median"] / limit
    return found
