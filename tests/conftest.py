"""Hypothesis profiles, and the backends that the shared tests run on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

# With as many processes as cores, threads of each would only wait for those of the others. Libraries read this when they load.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import offline
from tests.helpers.cases import Edges
from tests.helpers.harness import (
    AmpereFloat32Harness,
    AmpereHarness,
    CpuHarness,
    GpuHarness,
    Harness,
    HopperHarness,
    SimulatorHarness,
    why_no_gpu,
)

TENSOR_CORES = {"hopper": HopperHarness, "ampere": AmpereHarness, "ampere in float32": AmpereFloat32Harness}

# quick is for every commit; long, on a GPU, looks around far more. Deadlines mean nothing where kernels are compiled.
_CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=100, **_CALM)
settings.register_profile("simulator", max_examples=12, **_CALM)
settings.register_profile("long", max_examples=500, **_CALM)
settings.load_profile(os.environ.get("CCE_TEST_PROFILE", "simulator" if SimulatorHarness.is_active() else "quick"))

REQUIRE_GPU = os.environ.get("CCE_REQUIRE_GPU") == "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker that has nothing left takes tests from another one: the slowest, those in the simulator, stand in a row."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


def skip_or_fail_without_gpu() -> None:
    """Skips with the reason where there is no GPU; fails instead with CCE_REQUIRE_GPU=1."""
    reason = why_no_gpu()
    if reason and REQUIRE_GPU:
        pytest.fail(f"CCE_REQUIRE_GPU=1, but {reason}")
    if reason:
        pytest.skip(f"needs a GPU: {reason}")


@pytest.fixture(
    scope="session", params=["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("simt", *TENSOR_CORES))]
)
def harness(request: pytest.FixtureRequest) -> Harness:
    """How to call each backend: arrays where it wants them, and sizes around its own tiles."""
    if request.param == "cpu":
        return CpuHarness()
    if SimulatorHarness.is_active():
        if request.param in TENSOR_CORES:
            pytest.skip("the simulator knows no tensor cores")
        return SimulatorHarness()
    skip_or_fail_without_gpu()
    if request.param in TENSOR_CORES:
        kind = TENSOR_CORES[request.param]
        if reason := kind.why_not():
            pytest.skip(reason)
        return kind()
    return GpuHarness("simt")


@pytest.fixture(autouse=True)
def no_programs() -> Iterator[None]:
    """What host functions read beside their arguments, such as sizes, tests may change: then nothing recorded holds."""
    yield
    for name in ("tensor_core.programs", "recurring"):
        if (module := sys.modules.get(f"cce_numba.{name}")) is not None:
            module.clear()


@pytest.fixture(scope="session")
def gpu() -> None:
    """For tests that are about a GPU alone."""
    skip_or_fail_without_gpu()


@pytest.fixture(scope="session")
def compiler() -> None:
    """For tests that compile kernels for a GPU without one."""
    if reason := offline.why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def edges(harness: Harness) -> Edges:
    """Sizes around the tiles of the backend under test."""
    return harness.edges
