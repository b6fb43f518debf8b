"""Order of work on the GPU: streams, graph capture, determinism under load, and nothing that waits for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_gpu_arrays import as_torch, to_cupy
from test_gpu_truth import Arrays, Tensor, attention, compile_registered, judge, register, same_bits, tensors

import flashmoe_cupy
from flashmoe_cupy import flash_attention
from flashmoe_cupy.testing import TOLERANCES, AttentionCase, Case, VarlenCase, compare_lse, relative_error

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

DENSE = AttentionCase(300, 500, 2, 8, 2, 128, causal=True)
FEATURES = AttentionCase(257, 511, 2, 8, 2, 64, sinks="same", alibi="bh", bias="1hqk", window_size=(200, 30))
PACKED = VarlenCase((200, 0, 77, 300), (210, 5, 70, 300), heads_q=8, causal=True, sinks="float32")
SINGLE = AttentionCase(200, 300, 2, 4, 2, 64, dtype="float32", causal=True)
CASES = (DENSE, FEATURES, PACKED, SINGLE)
NAP = 300_000_000  # clock cycles: about 0.15 s, far longer than any call's host side

register(CASES)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_registered()


def warm(case: Case) -> tuple[Arrays, Tensor, Tensor]:
    """A problem's arrays and its result; from here on the kernel is loaded."""
    t = tensors(case, "cuda")
    out, lse = attention(case, t)
    torch.cuda.synchronize()
    return t, out, lse


# ---------------------------------------------------------------------------------------------------------------------
# streams


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", CASES, ids=["dense", "features", "packed", "fp32"])
def test_torch_stream(case: Case) -> None:
    """Inputs arrive late on a side stream: the kernel waits for them there, and the host waits for nothing."""
    t, want, want_lse = warm(case)
    late = {n: x.clone() for n, x in t.items()}
    for name in "qkv":
        late[name].fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(NAP)
        for name in "qkv":
            late[name].copy_(t[name])
        out, lse = attention(case, late)
        waited = side.query()
        after = out.clone()
    side.synchronize()
    assert not waited, "the call waited for the device"
    assert same_bits(after, want) and same_bits(lse, want_lse)


@pytest.mark.usefixtures("kernel")
def test_cupy_stream() -> None:
    """The same for CuPy's current stream, while torch's current stream is another one."""
    import cupy

    t, want, want_lse = warm(DENSE)
    late = {n: torch.full_like(x, float("nan")) for n, x in t.items()}
    arrays, source = ({n: to_cupy(x) for n, x in arrays.items()} for arrays in (late, t))
    torch.cuda.synchronize()
    side = cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(torch.cuda.ExternalStream(side.ptr)):
        torch.cuda._sleep(NAP)
    with side:
        for name in "qkv":
            cupy.copyto(arrays[name].view(cupy.int16), source[name].view(cupy.int16))
        out, lse = flash_attention(**arrays, **DENSE.options(), return_lse=True)
        waited = side.done
    side.synchronize()
    assert not waited, "the call waited for the device"
    assert same_bits(as_torch(out), want) and same_bits(as_torch(lse), want_lse)


@pytest.mark.usefixtures("kernel")
def test_streams_run_beside_each_other() -> None:
    """Two threads, two streams, different problems: nobody's arguments reach the other's kernel."""
    from threading import Thread

    results: dict[int, list[bool]] = {0: [], 1: []}
    ready = [warm(case) for case in (DENSE, FEATURES)]

    def work(i: int, case: AttentionCase) -> None:
        t, want, want_lse = ready[i]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                out, lse = attention(case, t)
                results[i].append(same_bits(out, want) and same_bits(lse, want_lse))

    threads = [Thread(target=work, args=(i, case)) for i, case in enumerate((DENSE, FEATURES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(r) for r in results.values()] == [50, 50] and all(map(all, results.values()))


# ---------------------------------------------------------------------------------------------------------------------
# determinism


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", CASES, ids=["dense", "features", "packed", "fp32"])
def test_same_bits_every_run(case: Case) -> None:
    """50 runs while a second stream keeps the device busy: out and lse are equal to the bit."""
    t, want, want_lse = warm(case)
    noise = torch.randn((2048, 2048), device="cuda", dtype=torch.bfloat16)
    busy = torch.cuda.Stream()
    with torch.cuda.stream(busy):
        for _ in range(400):
            noise = torch.nn.functional.normalize(noise @ noise)
    results = [attention(case, t) for _ in range(50)]
    torch.cuda.synchronize()
    differ = [i for i, (out, lse) in enumerate(results) if not (same_bits(out, want) and same_bits(lse, want_lse))]
    assert differ == []


@pytest.mark.usefixtures("kernel")
def test_batch_does_not_change_a_sequence() -> None:
    """A sequence alone and the same sequence inside a batch."""
    t, want, want_lse = warm(DENSE)
    for i in range(DENSE.batch):
        out, lse = attention(DENSE, {n: x[i : i + 1] for n, x in t.items()})
        assert relative_error(out.double(), want[i : i + 1].double()) <= TOLERANCES["bfloat16"].norm
        assert compare_lse(lse, want_lse[i : i + 1], atol=TOLERANCES["bfloat16"].lse)


# ---------------------------------------------------------------------------------------------------------------------
# graphs


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", CASES, ids=["dense", "features", "packed", "fp32"])
@pytest.mark.parametrize("given", [False, True], ids=["allocated", "given"])
def test_torch_graph(case: Case, given: bool) -> None:
    """Captured once, replayed with other numbers in the same arrays."""
    t, want, _ = warm(case)
    mine = {"out": torch.empty_like(want)} if given else {}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention(case, t, **mine)
    for seed in (1, 2):
        for name, x in tensors(case, "cuda", seed).items():
            t[name].copy_(x)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert judge(case, t, out, lse) == []
        direct, direct_lse = attention(case, t)
        assert same_bits(out, direct) and same_bits(lse, direct_lse)


@pytest.mark.usefixtures("kernel")
def test_torch_graph_with_new_lengths() -> None:
    """The offsets of packed sequences are read when the graph is replayed."""
    t, want, _ = warm(PACKED)
    options: dict[str, Any] = {"max_seqlen_q": 600, "max_seqlen_k": 600, "causal": True, "return_lse": True}
    out, graph = torch.zeros_like(want), torch.cuda.CUDAGraph()
    flashmoe_cupy.flash_attention_varlen(**t, **options, out=out)
    with torch.cuda.graph(graph):
        _, lse = flashmoe_cupy.flash_attention_varlen(**t, **options, out=out)
    other = PACKED._replace(lengths_q=(1, 500, 76, 0), lengths_k=(5, 500, 70, 10))
    for name, x in other.indices().items():
        t[name].copy_(torch.from_numpy(x))
    graph.replay()
    torch.cuda.synchronize()
    assert judge(other, t, out, lse) == []


@pytest.mark.usefixtures("kernel")
def test_cupy_graph() -> None:
    import cupy

    t, want, _ = warm(DENSE)
    arrays, out = {n: to_cupy(x) for n, x in t.items()}, to_cupy(torch.zeros_like(want))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        flash_attention(**arrays, **DENSE.options(), out=out)
        stream.begin_capture()
        flash_attention(**arrays, **DENSE.options(), out=out)
        graph = stream.end_capture()
        stream.synchronize()
        for name, x in tensors(DENSE, "cuda", 5).items():
            t[name].copy_(x)
        torch.cuda.synchronize()
        graph.launch(stream)
        stream.synchronize()
    expected, _ = attention(DENSE, t)
    assert same_bits(as_torch(out), expected)


COLD = """
import json, os, sys
import cupy
import numpy as np
import flashmoe_cupy

rng = np.random.default_rng(0)
host = [rng.standard_normal((1, 70, 2, 64), np.float32).astype(np.float16) for _ in range(3)]
want = flashmoe_cupy.flash_attention(*host)
q, k, v = map(cupy.asarray, host)
out = cupy.zeros_like(q)
cupy.cuda.runtime.deviceSynchronize()
stream = cupy.cuda.Stream(non_blocking=True)

def capture():
    said = ""
    with stream:
        stream.begin_capture()
        try:
            flashmoe_cupy.flash_attention(q, k, v, out=out)
        except flashmoe_cupy.FlashMoEError as e:
            said = str(e)
        return stream.end_capture(), said

_, said = capture()
cold = flashmoe_cupy.stats().compiled
untouched = not out.get().any()
warmed = flashmoe_cupy.warmup(dtype="float16", head_dim=64)
graph, again = capture()
graph.launch(stream)
stream.synchronize()
error = float(np.abs(out.get().astype(np.float32) - want.astype(np.float32)).max())
files = [f for _, _, names in os.walk(os.environ["FLASHMOE_CACHE_DIR"]) for f in names if f.endswith(".cubin")]
stats = flashmoe_cupy.stats()
json.dump({"said": said, "cold": cold, "untouched": untouched, "again": again, "error": error, "warmed": len(warmed),
           "files": len(files), "compiled": stats.compiled, "late": stats.compiled_after_warmup}, sys.stdout)
"""


def test_capture_with_a_cold_cache_raises_and_after_warmup_works(tmp_path: Path) -> None:
    """A fresh process, an empty cache: the error names `warmup`, nothing is compiled; after `warmup` all is well."""
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "FLASHMOE_CACHE_DIR": str(tmp_path), "FLASHMOE_JIT": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", COLD], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "warmup" in result["said"] and result["cold"] == 0 and result["untouched"], result
    assert result["again"] == "" and result["error"] < 4e-3, result
    assert result["compiled"] == result["files"] == result["warmed"] > 0 and result["late"] == 0, result


def test_device_memory_does_not_leak() -> None:
    """200 calls on torch arrays leave the allocator where it was."""
    t, _, _ = warm(DENSE)
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        attention(DENSE, t)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before  # what earlier tests left may be freed meanwhile
