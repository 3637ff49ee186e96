"""Tables of the forward mark what is above its limit."""

from __future__ import annotations

from benchmarks.tables import forward as tables


def test_what_is_above_its_limit_is_marked(shown):
    def call(ratio, limit, size):
        times = {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "tflops": 500.0}
        x = {"median": ratio, "p10": ratio - 0.01, "p90": ratio + 0.01}
        return times | {"x": x, "x_at_most": limit, "extra_bytes": size, "extra_bytes_at_most": 2**20}

    problem = {"N": 1, "V": 2, "D": 3, "data": "random", "mean_loss": 1, "survivors": {"flagged": 0.5, "surviving": 0.25}}
    calls = {"good": call(1.1, 1.1, 2**20), "slow": call(1.101, 1.1, 0), "large": call(1.0, None, 2**21)}
    text = shown(tables.problem_table([problem | {"calls": calls}]))
    lines = {name: next(line for line in text.splitlines() if name in line) for name in calls}
    assert "over" not in lines["good"]
    assert "over: 1.101" in lines["slow"]
    assert "over: 2.00" in lines["large"]
    us = {"median": 160.0, "p10": 150.0, "p90": 170.0}
    host = {"at_most": 150, "CuPy": {"linear_cross_entropy": us | {"median": 149.0}, "forward": us}}
    text = shown(tables.host_table(host | {"PyTorch": host["CuPy"]}))
    assert text.count("over: 160 (150 - 170)") == 2
    assert text.count("149 (150 - 170)") == 2
