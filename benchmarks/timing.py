"""Clocks: device and host time of a call, the ceiling of the machine, and the facts that every row repeats."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.cases import OURS

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

ROOT = Path(__file__).resolve().parent.parent


class Reference(NamedTuple):
    """Something that shows what the machine can do: `run` is one launch, a rate is `work` over its microseconds."""

    run: Callable[[int], Any]
    work: float


class Replay(NamedTuple):
    """Several calls as one launch: run(i) makes `calls` calls, `output` is what the last of them gave or will give."""

    run: Callable[[int], Any]
    calls: int
    output: Callable[[], Any]


class GpuTimer:
    """Times with CUDA events on the current stream of one device."""

    kind = "cuda events"

    def __init__(self, device: str) -> None:
        import torch

        self.torch = torch
        self.device = torch.device(device if ":" in device else f"{device}:{torch.cuda.current_device()}")
        torch.cuda.set_device(self.device)
        properties = torch.cuda.get_device_properties(self.device)
        self.name: str = properties.name
        self.cache_bytes = int(getattr(properties, "L2_cache_size", 50 << 20))
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)
        half = torch.bfloat16
        self.square = [torch.randn(8192, 8192, device=self.device).to(half) for _ in range(2)]
        self.product = torch.empty(8192, 8192, device=self.device, dtype=half)
        self.big: torch.Tensor | None = None

    def synchronize(self) -> None:
        self.torch.cuda.synchronize(self.device)

    def sample(self, run: Callable[[int], Any], launches: int, host_us: float = 0.0, lead: int = 1) -> float:
        """Device microseconds of one call after `lead` untimed ones.

        host_us > 0: a waiting kernel holds the device until all is queued. One call at least leads: the events never
        see an idle device, nor the cache as another library left it. Many bring the clock to what it is under load.
        """
        if host_us:
            self.torch.cuda._sleep(int(2000 * min(20_000.0, 50.0 + 1.5 * host_us * (launches + lead))))
        for i in range(1 - lead, 1):
            run(i)
        self.start.record()
        for i in range(1, launches + 1):
            run(i)
        self.end.record()
        self.end.synchronize()
        return 1000.0 * float(self.start.elapsed_time(self.end)) / launches

    def warm(self, milliseconds: float) -> None:
        """Matrix products, so that the clocks are up."""
        for _ in range(max(1, round(milliseconds / 1.5))):
            self.torch.mm(*self.square, out=self.product)

    def ceiling(self) -> float:
        """TFLOP/s of an 8192-cubed bf16 matrix product, median."""
        self.warm(300.0)
        run = [self.sample(lambda _: self.torch.mm(*self.square, out=self.product), 5) for _ in range(9)]
        return 2 * 8192**3 / statistics.median(run) / 1e6

    def references(self) -> dict[str, Reference]:
        """TFLOP/s of the same matrix product, GB/s of reading 2 GiB once."""
        if self.big is None:
            self.big = self.torch.randn(1 << 29, device=self.device)
        big = self.big
        return {
            "ceiling_tflops": Reference(lambda _: self.torch.mm(*self.square, out=self.product), 2 * 8192**3 / 1e6),
            "read_gbps": Reference(lambda _: big.sum(), 4 * big.numel() / 1e3),
        }

    def capture(self, run: Callable[[int], Any], calls: int) -> Replay:
        """A CUDA graph of run(1) ... run(calls); nothing in it may wait for the device."""
        return capture(run, calls, cuda=True)

    def release(self) -> None:
        """Give memory that no tensor holds back to the device: the next case may need it in other pieces."""
        self.torch.cuda.empty_cache()


class CpuTimer:
    """The same interface on the processor, by the wall clock."""

    kind = "wall clock"
    cache_bytes = 0

    def __init__(self) -> None:
        self.name = platform.processor() or platform.machine()

    def synchronize(self) -> None:
        return None

    def sample(self, run: Callable[[int], Any], launches: int, host_us: float = 0.0, lead: int = 1) -> float:  # noqa: ARG002
        start = time.perf_counter()
        for i in range(launches):
            run(i)
        return 1e6 * (time.perf_counter() - start) / launches

    def warm(self, milliseconds: float) -> None:  # noqa: ARG002
        return None

    def ceiling(self) -> float:
        """TFLOP/s of a 512-cubed float32 matrix product, median after three that are thrown away."""
        import torch

        a, b = torch.randn(512, 512), torch.randn(512, 512)
        run = [self.sample(lambda _: a @ b, 2) for _ in range(12)][3:]
        return 2 * 512**3 / statistics.median(run) / 1e6

    def references(self) -> dict[str, Reference]:
        """TFLOP/s of the same matrix product, GB/s of reading 64 MiB once."""
        import torch

        a, big = torch.randn(512, 512), torch.randn(1 << 24)
        product = Reference(lambda _: a @ a, 2 * 512**3 / 1e6)
        return {"ceiling_tflops": product, "read_gbps": Reference(lambda _: big.sum(), 4 * big.numel() / 1e3)}

    def capture(self, run: Callable[[int], Any], calls: int) -> Replay:
        """A plain loop over run(1) ... run(calls)."""
        return capture(run, calls, cuda=False)

    def release(self) -> None:
        return None


def capture(run: Callable[[int], Any], calls: int, cuda: bool) -> Replay:
    """run(1) ... run(calls) as one CUDA graph, or as a loop."""
    outputs: list[Any] = [None]

    def loop(_: int = 0) -> None:
        for i in range(1, calls + 1):
            outputs[0] = run(i)

    if not cuda:
        return Replay(loop, calls, lambda: outputs[0])
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a call makes once per stream is made before the capture
        loop()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    return Replay(lambda _: graph.replay(), calls, lambda: outputs[0])


def fastest(runs: list[Callable[[int], Any]], calls: int, cuda: bool, rounds: int = 5) -> int:
    """The place of the run whose graph of `calls` calls takes the least time; one that fails takes for ever."""
    times = []
    for run in runs:
        try:
            replay = capture(run, calls, cuda)
            replay.run(0)
            times.append(min(_once(replay, cuda) for _ in range(rounds)))
        except Exception:  # a tile that does not fit into shared memory, say
            times.append(float("inf"))
    best = min(times)
    if best == float("inf"):
        raise RuntimeError("no configuration runs")
    return times.index(best)


def _once(replay: Replay, cuda: bool) -> float:
    """Milliseconds of one launch."""
    if not cuda:
        start = time.perf_counter()
        replay.run(0)
        return 1000 * (time.perf_counter() - start)
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    replay.run(0)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


Timer = GpuTimer | CpuTimer


def host_microseconds(
    timer: Timer, run: Callable[[int], Any], calls: int, batch: int = 40, seconds: float = 0.0
) -> tuple[float, float]:  # fmt: skip
    """Processor microseconds of one call, from the medians of batches: the lowest of these, and the one in the middle.

    The device is drained after a batch, so that no queue fills up. What else the machine does adds to some batches and
    never takes away, which is why the lowest is the code's own. seconds: go on for so long, since a processor shared
    with others changes its pace only every few tenths of a second.
    """
    medians: list[float] = []
    end, done = time.perf_counter() + seconds, 0
    while done < calls or time.perf_counter() < end:
        timer.synchronize()
        times = []
        for i in range(done, done + (min(batch, calls - done) if done < calls else batch)):
            start = time.perf_counter_ns()
            run(i)
            times.append(time.perf_counter_ns() - start)
        done += len(times)
        medians.append(statistics.median(times))
    timer.synchronize()
    return min(medians) / 1000.0, statistics.median(medians) / 1000.0


def _version(*names: str) -> str:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> tuple[str, bool | None]:
    """(commit, dirty): FLASHMOE_COMMIT when given ("-dirty" at its end counts), else git's, else ("unknown", None)."""
    given = os.environ.get("FLASHMOE_COMMIT", "").strip()
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    found = _output("git", "rev-parse", "HEAD")
    if not found:
        return "unknown", None
    return found, bool(_output("git", "status", "--porcelain", "--untracked-files=no"))


def machine(timer: Timer) -> dict[str, Any]:
    """The facts that every row repeats: device, driver, versions, commit."""
    import torch

    versions = {
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "torch": str(torch.__version__),
        "cupy": _version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "triton": _version("triton"),
    }
    driver = ""
    if isinstance(timer, GpuTimer):
        versions["cudnn"] = str(torch.backends.cudnn.version())
        with contextlib.suppress(Exception):  # a CuPy without its compiler is reported by its own library
            nvrtc = importlib.import_module("cupy").cuda.nvrtc.getVersion()
            versions["nvrtc"] = ".".join(str(part) for part in nvrtc)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    with contextlib.suppress(ImportError, AttributeError):
        versions[OURS] = str(importlib.import_module(OURS).__version__)
    name, dirty = commit()
    facts = {"device": timer.name, "driver": driver, "timer": timer.kind, "commit": name, "dirty": dirty}
    return facts | {"versions": versions}


class Clocks:
    """Reads the device's clocks in MHz: through NVML's module, else nvidia-smi once (it is slow), else not at all."""

    def __init__(self, timer: Timer) -> None:
        self.handle: Any = None
        self.once: dict[str, int] = {}
        if isinstance(timer, GpuTimer):
            with contextlib.suppress(Exception):  # no module, no library, or a device that NVML cannot see
                self.nvml = importlib.import_module("pynvml")
                self.nvml.nvmlInit()
                uuid = f"GPU-{timer.torch.cuda.get_device_properties(timer.device).uuid}"
                self.handle = self.nvml.nvmlDeviceGetHandleByUUID(uuid)
                return
            timer.warm(1000.0)  # so that what nvidia-smi sees is a busy device
            text = _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits")
            self.once = dict(zip(("sm", "memory"), map(int, re.findall(r"\d+", text)[:2]), strict=False))
            timer.synchronize()

    def read(self) -> dict[str, int]:
        """{"sm": MHz, "memory": MHz}, or {}."""
        if self.handle is None:
            return self.once
        kinds = {"sm": self.nvml.NVML_CLOCK_SM, "memory": self.nvml.NVML_CLOCK_MEM}
        with contextlib.suppress(Exception):
            return {key: int(self.nvml.nvmlDeviceGetClockInfo(self.handle, kind)) for key, kind in kinds.items()}
        return {}
