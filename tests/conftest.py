"""Markers, skip reasons, seeds, worker processes and the cache folder that all tests share.

FLASHMOE_REQUIRE_GPU=1 turns "no GPU" from a skip into an error, for machines that must test the kernels.
Tests run in several processes (pytest-xdist): one starts them, shares its folders with them and compiles ahead for GPU
tests; they collect and run. `-n 0` runs everything in one process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from threading import Thread
from typing import Any

import numpy as np
import pytest

_FOLDER = pytest.StashKey[str]()
_COMPILING = pytest.StashKey[Thread]()


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """How many `-n auto` means: one a core. None start where tests are named one by one, or print with `-s`."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None  # xdist reads it
    if any("::" in arg for arg in config.args) or config.option.capture == "no":
        return 0
    most = 6 if compute_capability()[0] is not None else 8  # each has a CUDA context and memory of its own
    return min(len(os.sched_getaffinity(0)), most)


def pytest_configure(config: pytest.Config) -> None:
    if not _is_worker(config):
        folder = config.stash[_FOLDER] = tempfile.mkdtemp(prefix="flashmoe-tests-")
        # A fresh cache for each run: a test must not pass because an older run left a cubin behind.
        os.environ.setdefault("FLASHMOE_CACHE_DIR", f"{folder}/cache")
        workers = getattr(config.option, "numprocesses", None) or 1
        if workers > 1:  # the workers share the cores
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
                os.environ.setdefault(name, str(max(1, len(os.sched_getaffinity(0)) // workers)))
    # No model or data set may be looked up on a hub by a test.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    # JAX tests spread arrays over several CPU devices.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()
    # JAX would take most of a GPU's memory at its first use.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if find_spec("hypothesis") is not None:
        from hypothesis import settings

        settings.register_profile("flashmoe", derandomize=True, deadline=None, max_examples=50)
        settings.load_profile("flashmoe")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["folder"] = node.config.stash[_FOLDER]


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(_FOLDER, None)
    if folder is not None:
        if os.environ.get("FLASHMOE_CACHE_DIR", "").startswith(folder):
            del os.environ["FLASHMOE_CACHE_DIR"]
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test marked `alone` runs while no other one does: it looks at the clock, or needs most of a device's memory."""
    if not _is_worker(item.config):
        return (yield)
    folder, alone = item.config.workerinput["folder"], item.get_closest_marker("alone") is not None  # type: ignore[attr-defined]
    with open(f"{folder}/turn.lock", "w") as turn, open(f"{folder}/running.lock", "w") as running:
        fcntl.flock(turn, fcntl.LOCK_EX)  # whoever waits to run alone is the next one
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason to skip, with how many tests it concerns."""
    reasons = Counter[str]()
    for report in terminalreporter.stats.get("skipped", []):
        reasons[report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""] += 1
    if reasons:
        terminalreporter.section("skipped", "-")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:5} {reason}")


@cache
def compute_capability() -> tuple[tuple[int, int] | None, str]:
    """((major, minor), "") of the current device, or (None, why there is none)."""
    from flashmoe_cupy.service.machine import driver

    if not driver().devices:
        return None, driver().error
    if find_spec("cupy") is None:
        return None, 'there is a GPU, but CuPy is not installed: pip install -e ".[cuda12]"'
    try:
        import cupy

        text = cupy.cuda.Device().compute_capability
        return (int(text[:-1]), int(text[-1])), ""
    except Exception as error:  # CuPy's own types, ImportError or OSError, by what is broken
        return None, f"there is a GPU, but CuPy does not run: {error}"


@cache
def _framework_sees_gpu(name: str) -> bool:
    if name == "torch":
        import torch

        return bool(torch.cuda.is_available())
    import jax

    return any(device.platform in ("gpu", "cuda") for device in jax.devices())


def _device_count() -> int:
    from flashmoe_cupy.service.machine import devices

    return len(devices())


def _skip_reason(item: pytest.Item) -> str | None:
    for name in ("torch", "jax"):
        if item.get_closest_marker(name) and find_spec(name) is None:
            return f"{name} is not installed"
    if item.get_closest_marker("compile") and find_spec("cupy") is None:
        return 'compiling needs NVRTC, which CuPy loads: pip install -e ".[cuda12]"'
    if not any(item.get_closest_marker(name) for name in ("gpu", "sm80", "sm90", "multi_gpu")):
        return None
    capability, reason = compute_capability()
    if capability is None:
        return reason
    if item.get_closest_marker("sm80") and capability < (8, 0):
        return f"needs compute capability 8.0 or newer, this device has {capability[0]}.{capability[1]}"
    if item.get_closest_marker("sm90") and capability[0] != 9:
        return f"needs compute capability 9.x, this device has {capability[0]}.{capability[1]}"
    if item.get_closest_marker("multi_gpu") and _device_count() < 2:
        return "needs two GPUs"
    for name in ("torch", "jax"):
        if item.get_closest_marker(name) and not _framework_sees_gpu(name):
            return f"this {name} is built without CUDA or sees no device"
    return None


def pytest_sessionstart(session: pytest.Session) -> None:
    """A run of all GPU tests compiles their kernels while they are collected: once, not in each worker."""
    config = session.config
    if _is_worker(config):
        return
    required = os.environ.get("FLASHMOE_REQUIRE_GPU", "") not in ("", "0")
    if required and compute_capability()[0] is None:
        raise pytest.UsageError(f"FLASHMOE_REQUIRE_GPU is set, but {compute_capability()[1]}")
    some = config.option.keyword or config.args_source is pytest.Config.ArgsSource.ARGS
    capability = None if some or config.option.markexpr != "gpu" else compute_capability()[0]
    if capability is not None:
        compiling = config.stash[_COMPILING] = Thread(target=_compile_all, args=(capability,), daemon=True)
        compiling.start()


def pytest_collection_finish(session: pytest.Session) -> None:
    _await_kernels(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """No worker begins before all have collected, nor before this returns."""
    _await_kernels(node.config)


def _await_kernels(config: pytest.Config) -> None:
    compiling = config.stash.get(_COMPILING, None)
    if compiling is not None:
        compiling.join()


def _compile_all(capability: tuple[int, int]) -> None:
    from compile_kit import compile_all

    from flashmoe_cupy.plan.archs import arch_for
    from flashmoe_cupy.plan.kernels import KERNELS

    with contextlib.suppress(Exception):  # the tests show what does not compile
        compile_all(list(KERNELS.values()), arch_for(capability))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = _skip_reason(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """The same global random state in front of each test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
    cupy = sys.modules.get("cupy")
    if cupy is not None and "cupy.random" in sys.modules and compute_capability()[0] is not None:
        with contextlib.suppress(ImportError):  # no cuRAND in this environment: nothing can draw from it either
            cupy.random.seed(0)
    yield


@pytest.fixture(params=["chosen", "attention_fwd_sm80"])
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """For GPU tests: once with the kernels that the library chooses, once with the general one where it has a rival."""
    from flashmoe_cupy.plan.archs import arch_for
    from flashmoe_cupy.plan.kernels import of_task, only

    if request.param == "chosen":
        yield
        return
    capability, given = compute_capability()[0], request.node.callspec.params
    arch = arch_for(capability or (0, 0))
    if not any(other.configs(arch) for name, other in of_task("attention_fwd").items() if name != request.param):
        pytest.skip(f"{arch} has no other kernel")
    if getattr(given.get("case"), "dtype", given.get("dtype")) == "float32":
        pytest.skip("fp32 has no other kernel")
    with only(request.param):
        yield


@pytest.fixture(params=["chosen", "grouped_gemm_sm80"])
def product_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same for mixtures of experts, whose kernels differ in their products."""
    from flashmoe_cupy.plan.archs import arch_for
    from flashmoe_cupy.plan.kernels import of_task, only

    if request.param == "chosen":
        yield
        return
    arch = arch_for(compute_capability()[0] or (0, 0))
    if not any(other.configs(arch) for name, other in of_task("grouped_gemm").items() if name != request.param):
        pytest.skip(f"{arch} has no other kernel")
    if request.node.callspec.params.get("dtype") == "float32":
        pytest.skip("fp32 has no other kernel")
    with only(request.param):
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator whose seed is the test's own name: adding a test does not change another one's numbers."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
