"""Every configuration of every kernel compiles for every supported architecture: soon, no spills, no wgmma remarks."""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flashmoe_cupy.jit import cache, compiler, source
from flashmoe_cupy.plan.archs import ARCHS, MAX_SMEM, arch_for
from flashmoe_cupy.plan.kernels import KERNELS

pytest.importorskip("cupy")
pytestmark = pytest.mark.compile
MAX_SECONDS = 8.0  # of processor time, whatever else the machine does: what a first call may wait for one kernel


PAIRS = [(name, arch) for name, kernel in KERNELS.items() for arch in ARCHS if kernel.configs(arch)]
NAMES = {(kernel, arch): [config.name for config in KERNELS[kernel].configs(arch)] for kernel, arch in PAIRS}


def usual_arch(kernel: str, config: str) -> str:
    """For which architecture every run compiles a configuration: one of those that have it, by its name."""
    archs = [arch for name, arch in PAIRS if name == kernel and config in NAMES[name, arch]]
    return archs[zlib.crc32(config.encode()) % len(archs)]


def is_twin(kernel: str, arch: str, config: str) -> bool:
    """Whether a configuration differs from another one by fp16 in the place of bf16 alone."""
    return config.startswith("fp16") and f"b{config.removeprefix('f').replace('p16', 'f16', 1)}" in NAMES[kernel, arch]


def parts() -> Iterator[Any]:
    """(kernel, arch, a few configurations): small tests, which processes share. `-m compile` asks for all of them."""
    for kernel, arch in PAIRS:
        usual: list[Any] = []
        rest: list[Any] = []
        twins: list[Any] = []
        for config in KERNELS[kernel].configs(arch):
            if is_twin(kernel, arch, config.name):
                twins.append(config)
            else:
                (usual if arch == usual_arch(kernel, config.name) else rest).append(config)
        more = (pytest.mark.every_arch,)
        for label, configs, marks in (("", usual, ()), ("rest", rest, more), ("twins", twins, more)):
            for i in range(0, len(configs), 8):
                name = f"{kernel}-{arch}-{label}{i // 8}"
                yield pytest.param(kernel, arch, configs[i : i + 8], marks=marks, id=name)


PARTS = list(parts())


def test_every_configuration_is_in_a_part() -> None:
    """Once for each architecture that has it, and in the parts that every run has."""
    for pair in PAIRS:
        found = [config.name for part in PARTS if part.values[:2] == pair for config in part.values[2]]
        assert len(found) == len(set(found)) and set(found) == set(NAMES[pair])
    usual = {(part.values[0], config.name) for part in PARTS if not part.marks for config in part.values[2]}
    every = {(kernel, arch, config) for kernel, arch in PAIRS for config in NAMES[kernel, arch]}
    assert usual == {(kernel, config) for kernel, arch, config in every if not is_twin(kernel, arch, config)}
    assert any(is_twin(*one) for one in every) and usual


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "arch", "configs"), PARTS)
def test_all_configurations(kernel: str, arch: str, configs: list[Any]) -> None:
    spec = KERNELS[kernel]

    def build(config: Any) -> list[str]:
        tu = spec.source(config)
        start = time.thread_time()
        made = compiler.compile_cubin(tu, source.headers_for(tu), arch, cache.options(), config.name)
        seconds = time.thread_time() - start
        bad = list(made.remarks)
        if seconds > MAX_SECONDS:
            bad.append(f"{seconds:.1f} s of processor time")
        if made.spill_stores or made.spill_loads or made.stack:
            bad.append(f"spills {made.spill_stores}/{made.spill_loads} bytes, stack {made.stack}")
        if not 0 < made.registers * config.threads * config.min_blocks <= 65536:
            bad.append(f"{made.registers} registers x {config.threads} threads x {config.min_blocks} blocks")
        if made.static_smem or config.smem_bytes > MAX_SMEM[arch]:
            bad.append(f"shared memory {made.static_smem} + {config.smem_bytes}")
        return [f"{config.name}: {text}" for text in bad]

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // workers)) as pool:
        assert [text for found in pool.map(build, configs) for text in found] == []


def test_the_thread_that_asks_does_the_work() -> None:
    """So the clock of that thread, above, has all of a compile."""
    kernel = KERNELS["attention_bwd_dot"]
    tu = kernel.source(kernel.configs("sm_80")[0])
    thread, process = time.thread_time(), time.process_time()
    compiler.compile_cubin(tu, source.headers_for(tu), "sm_80", cache.options())
    thread, process = time.thread_time() - thread, time.process_time() - process
    assert 0.9 * process <= thread and thread > 0.02


WITH_SMEM = [name for name, kernel in KERNELS.items() if any(c.smem_bytes for c in kernel.configs("sm_90a"))]


@pytest.mark.parametrize("kernel", WITH_SMEM)
def test_shared_memory_arithmetic(kernel: str) -> None:
    """The host's smem_bytes is the kernel's Smem::kBytes: a wrong number stops the compile."""
    spec = KERNELS[kernel]
    arch = next(arch for name, arch in PAIRS if name == kernel)
    text = f'#include "{spec.header}"\n'
    for config in spec.configs(arch):
        text += f"static_assert(fm::{config.struct}::Smem::kBytes == {config.smem_bytes});\n"
    compiler.compile_cubin(text, source.headers_for(text), arch)
    with pytest.raises(Exception, match=r"static assertion"):
        compiler.compile_cubin(text.replace(f"== {config.smem_bytes}", "== 1"), source.headers_for(text), arch)


@pytest.mark.parametrize("kernel", KERNELS)
def test_params_lie_where_they_were_read(kernel: str) -> None:
    """The compiler puts each member of Params where `plan.params` read it to be. NVRTC has no offsetof."""
    spec = KERNELS[kernel]
    arch = next(arch for name, arch in PAIRS if name == kernel)
    text = f'#include "{spec.header}"\nusing P = fm::{spec.params.name};\n'
    text += f"static_assert(sizeof(P) == {spec.params.size} && alignof(P) == {spec.params.align});\n"
    fields = spec.params.fields
    ends = [*[field.at for field in fields.values()][1:], spec.params.size]
    for (name, field), end in zip(fields.items(), ends, strict=True):
        text += f"static_assert(__INTADDR__(&((P*)0)->{name}) == {field.at});\n"
        text += f"static_assert(sizeof(P::{name}) <= {end - field.at});\n"
    compiler.compile_cubin(text, source.headers_for(text), arch)
    assert list(fields)[-len(spec.params.maps) :] == list(spec.params.maps) or not spec.params.maps
    assert spec.params.pointers, "what a call stores anew comes first"


# What no kernel above uses yet, or only beside much else: wrappers of cuda_src/ptx, and products of A transposed.
WRAPPERS = """
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/global_memory.cuh"
#include "ptx/tma.cuh"
#include "tile/warpgroup_gemm.cuh"
using namespace fm;
extern "C" __global__ void fm_entry(const __grid_constant__ TensorMap m, u32* g, float* f) {
  griddepcontrol_wait(), griddepcontrol_launch_dependents();
  g[0] = ld_acquire_gpu_u32(g) + atom_add_u32(g, 2);
  red_add_release_gpu_u32(g, 1), red_add_f32(f, 1.f);
  barrier_cluster_arrive(), barrier_cluster_wait(), mbarrier_arrive_cluster(mapa(1024, cluster_ctarank() ^ 1));
  cp_async_mbarrier_arrive_noinc(64);
  tma_load_2d(0, m, 64, 0, 1, 2), tma_load_2d_multicast(0, m, 64, 3, 0, 1, 2);
  tma_load_4d_multicast(0, m, 64, 3, 0, 1, 2, 3, 4);
  tma_store_2d(m, 0, 1, 2), bulk_commit_group(), bulk_wait_group<0>();
  using Tile = SmemTile<bf16, 64, 64>;
  float d[2][8][4];
  wgmma_fence();
  multiply<bf16, 64>(d, MNMajor<Tile>(0), KMajor<Tile>(8192), true);
  multiply<bf16, 64>(d, MNMajor<Tile>(0), MNMajor<Tile>(8192), false);
  wgmma_commit_group(), wait_for_products<0>(d);
  f[threadIdx.x] = d[0][0][0] + d[1][7][3];
}
"""


def test_wrappers_assemble() -> None:
    ptx = compiler.compile_cubin(WRAPPERS, source.headers_for(WRAPPERS), "sm_90a").ptx
    for word in ("multicast::cluster", "red.add.relaxed", "mapa.shared::cluster", "griddepcontrol.wait", "noinc"):
        assert word in ptx
    assert len(re.findall(r"p, 1, 1, 1, 0;", ptx)) == len(re.findall(r"p, 1, 1, 1, 1;", ptx)) == 8


CAPABILITIES = [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"), ((12, 0), "sm_120")]


@pytest.mark.parametrize(("cc", "arch"), CAPABILITIES)
def test_arch_for(cc: tuple[int, int], arch: str) -> None:
    assert arch_for(cc) == arch
