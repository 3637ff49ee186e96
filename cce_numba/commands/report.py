"""What the demo found, between the code that finds it (`demo.py`) and the code that shows it (`show.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from cce_numba.commands.agreement import Agreement
from cce_numba.commands.problems import DemoProblem
from cce_numba.plan import Plan


@dataclass(frozen=True)
class Report:
    """For tables and for scripts; seconds and bytes.

    Attributes:
        problem: what was computed.
        counting: how many tokens count.
        plan: how it ran.
        loss: mean loss over the tokens that count.
        known_loss: mean of the file's own losses, or None.
        norm_d_e: Frobenius norm of the gradient of e.
        norm_d_c: Frobenius norm of the gradient of c.
        filter_name: "unbiased" or "drop"; None where nothing is filtered.
        filter_eps: the filter's threshold, or None.
        survivor_block: how many tokens share survivors.
        survivors: mean share of the vocabulary that a block of tokens computes again for the gradients; None if not filtered.
        compile_seconds: first calls, which compile; None in the simulator, where nothing is compiled.
        loss_seconds: the loss alone.
        grad_seconds: loss and gradients.
        peak_bytes: most memory taken by loss and gradients at once, beyond the inputs.
        grad_bytes: the gradients' part of it.
        agreement: how right it is.
    """

    problem: DemoProblem
    counting: int
    plan: Plan
    loss: float
    known_loss: float | None
    norm_d_e: float
    norm_d_c: float
    filter_name: str | None
    filter_eps: float | None
    survivor_block: int
    survivors: float | None
    compile_seconds: float | None
    loss_seconds: float
    grad_seconds: float
    peak_bytes: int
    grad_bytes: int
    agreement: Agreement
