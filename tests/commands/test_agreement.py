"""The demo's comparison behind the unbiased filter: a rule that differs in a detail does not pass.

`test_command_line.py` has what goes wrong without a filter, and with the one that drops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

import reference
from cce_numba.commands.agreement import Computed, compare
from cce_numba.commands.problems import DemoProblem, synthetic

BLOCK = 128
EPS = 0.05  # so high that a detail of the rule is more than rounding to bfloat16 is allowed


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the filter decides by. Blocks are of 128 tokens.

    Attributes:
        p: (N, V) probabilities.
        targets: (N,).
        u: (n_blocks, V) draws.
        eps: the threshold.
        block: tokens of a block.
    """

    p: np.ndarray
    targets: np.ndarray
    u: np.ndarray
    eps: float
    block: int = BLOCK

    @staticmethod
    def of(problem: DemoProblem, eps: float = EPS) -> Rule:
        p = reference.softmax(reference.forward(problem.e, problem.c, problem.targets).logits)
        u = reference.draws(-(-len(p) // BLOCK), p.shape[1], reference.draw_seed(problem.targets))
        return Rule(p, problem.targets, u, eps)

    def scales(self, **changes: object) -> np.ndarray:
        """(N, V) what G is multiplied by, by the reference; with some attributes changed."""
        rule = dataclasses.replace(self, **changes)
        return reference.of_tokens(
            reference.roulette(rule.p, rule.targets, rule.eps, rule.u, rule.block), len(rule.p), rule.block
        )

    def of_column(self, x: np.ndarray) -> np.ndarray:
        """(N, V) the largest of x (N, V) among the tokens of a block."""
        return reference.of_tokens(np.maximum.reduceat(x, range(0, len(x), self.block)), len(x), self.block)


def computed(problem: DemoProblem, rule: Rule, scales: np.ndarray) -> Computed:
    """What a backend would make of a problem if it multiplied G by these scales, all of whose columns the forward flags."""
    exact = reference.forward(problem.e, problem.c, problem.targets)
    grads = reference.backward(problem.e, problem.c, problem.targets, keep_e=scales, keep_c=scales)
    return Computed(
        loss=float(exact.loss),
        nll=exact.nll,
        lse=exact.lse,
        d_e=grads.e.astype(problem.e.dtype),
        d_c=grads.c.astype(problem.c.dtype),
        kept=np.ones(rule.u.shape, bool),
        block=BLOCK,
        filter_eps=rule.eps,
        draw_seed=reference.draw_seed(problem.targets),
    )


def wrong(problem: DemoProblem, result: Computed, seed: int = 0) -> list[str]:
    """Names of the checks that fail."""
    return [check.name for check in compare(problem, result, seed).checks if not check.passed]


def targets_multiplied(rule: Rule) -> np.ndarray:
    """Targets are kept, but multiplied as if they had survived by chance."""
    largest, hot = rule.of_column(rule.p), rule.of_column(reference.onehot(rule.targets, rule.p.shape[1]))
    return np.where((hot == 1) & (largest < rule.eps), rule.eps / largest, rule.scales())


WRONG_SCALES: dict[str, Callable[[Rule], np.ndarray]] = {
    "not multiplied": lambda rule: np.minimum(rule.scales(), 1),
    "targets multiplied": targets_multiplied,
    "multiplied by 1 / u": lambda rule: np.where(
        rule.scales() > 1, 1 / reference.of_tokens(rule.u, len(rule.p), BLOCK), rule.scales()
    ),
    "multiplied, none dropped": lambda rule: np.where(rule.scales() == 0, EPS / rule.of_column(rule.p), rule.scales()),
    "none dropped": lambda rule: np.maximum(rule.scales(), 1),
    "all below the threshold dropped": lambda rule: (rule.scales() == 1) * 1.0,
    "every eighth survivor dropped": lambda rule: rule.scales() * (np.arange(rule.p.shape[1]) % 8 != 3),
    "drawn anew": lambda rule: rule.scales(u=np.random.default_rng(0).random(rule.u.shape)),
    "drawn by the first block": lambda rule: rule.scales(u=rule.u[[0, 0, 0]]),
    "decided by half a block": lambda rule: rule.scales(u=rule.u.repeat(2, axis=0)[:5], block=BLOCK // 2),
    "a threshold 20 % higher": lambda rule: rule.scales(eps=1.2 * rule.eps),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", WRONG_SCALES)
def test_a_wrong_rule_does_not_pass(what: str, dtype: str) -> None:
    """Three blocks, the last of 44 tokens; most of the 500 entries are dropped by chance, and 7 % are multiplied."""
    problem = synthetic(300, 500, 16).astype(dtype)
    rule = Rule.of(problem)
    assert wrong(problem, computed(problem, rule, WRONG_SCALES[what](rule))) == ["dE", "dC"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("seed", range(4))
def test_the_right_rule_passes(dtype: str, seed: int) -> None:
    """And what it costs is told."""
    problem = synthetic(300, 500, 16, seed=seed).astype(dtype)
    rule = Rule.of(problem)
    right = rule.scales()
    assert (right > 1).mean() > 0.05
    assert 0.1 < (right == 0).mean() < 0.9
    found = compare(problem, computed(problem, rule, right), seed)
    assert found.passed
    assert found.tokens in (128 + 44, 256)  # whole blocks
    _, d_e, d_c, _ = found.checks
    assert d_e.filtered > 1e-3 < d_c.filtered
    assert found.dropped_mass == pytest.approx(float((rule.p * (right == 0)).sum(axis=1).mean()), rel=0.3)


def test_a_forward_that_flags_too_little_does_not_pass() -> None:
    """Whatever the backward makes of the columns: one that survives for sure, or a target, must have been flagged."""
    problem = synthetic(300, 500, 16)
    rule = Rule.of(problem)
    right = computed(problem, rule, rule.scales())
    for kept, names in (
        (rule.scales() != 0, []),
        (rule.scales() == 1, ["filter"]),
        (rule.of_column(reference.onehot(rule.targets, 500)) == 0, ["filter"]),
    ):
        assert wrong(problem, dataclasses.replace(right, kept=kept[::BLOCK])) == names


@pytest.mark.parametrize("by_rounding", [True, False])
def test_only_decisions_within_rounding_may_turn_out_either_way(by_rounding: bool) -> None:
    """A column whose largest probability is eps * u may be there or not, but is not multiplied by anything else.

    One of eps * u * (1 - 1e-10) may not be there, in float64.
    """
    problem = synthetic(200, 60, 8).astype("float64")  # all blocks and entries are in the sample
    rule = Rule.of(problem)
    largest = rule.p[:BLOCK].max(axis=0) * (reference.onehot(rule.targets[:BLOCK], 60).max(axis=0) == 0)
    ratio = largest / rule.u[0]
    column = int(np.argmax(np.where(ratio < 0.1, ratio, 0)))
    eps = float(ratio[column]) * (1 if by_rounding else 1 + 1e-10)
    rule = dataclasses.replace(rule, eps=eps)
    for scale, passes in ((0, True), (eps / largest[column], by_rounding), (4 * eps / largest[column], False)):
        scales = rule.scales()
        scales[:BLOCK, column] = scale
        assert wrong(problem, computed(problem, rule, scales)) == ([] if passes else ["dE", "dC"]), scale


def test_zeros_and_gradients_without_targets_do_not_pass() -> None:
    """Behind the filter, too."""
    problem = synthetic(300, 500, 16)
    rule = Rule.of(problem)
    right = computed(problem, rule, rule.scales())
    without = reference.backward(
        problem.e, problem.c, problem.targets, d_loss=0.0, d_lse=1 / 300, keep_e=rule.scales(), keep_c=rule.scales()
    )
    for name, check, without_target in (("d_e", "dE", without.e), ("d_c", "dC", without.c)):
        for gradient in (np.zeros_like(getattr(right, name)), without_target.astype(np.float32)):
            assert wrong(problem, dataclasses.replace(right, **{name: gradient})) == [check]
