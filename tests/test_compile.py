"""Every configuration of every kernel compiles for every supported architecture: no spills, no wgmma remarks."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from flashmoe_cupy.jit import cache, compiler, source
from flashmoe_cupy.plan.config import MAX_SMEM, AttentionConfig
from flashmoe_cupy.plan.kernels import ARCHS, KERNELS, arch_for

pytest.importorskip("cupy")
pytestmark = pytest.mark.compile


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_all_configurations(kernel: str, arch: str) -> None:
    spec = KERNELS[kernel]
    configs = spec.configs(arch)
    assert len({c.name for c in configs}) == len(configs) > 0

    def build(config: AttentionConfig) -> list[str]:
        tu = spec.source(config)
        made = compiler.compile_cubin(tu, source.headers_for(tu), arch, cache.options(), config.name)
        bad = list(made.remarks)
        if made.spill_stores or made.spill_loads or made.stack:
            bad.append(f"spills {made.spill_stores}/{made.spill_loads} bytes, stack {made.stack}")
        if not 0 < made.registers * config.threads * config.min_blocks <= 65536:
            bad.append(f"{made.registers} registers x {config.threads} threads x {config.min_blocks} blocks")
        if made.static_smem or config.smem_bytes > MAX_SMEM[arch]:
            bad.append(f"shared memory {made.static_smem} + {config.smem_bytes}")
        return [f"{config.name}: {text}" for text in bad]

    with ThreadPoolExecutor(2) as pool:
        assert [text for found in pool.map(build, configs) for text in found] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_shared_memory_arithmetic(kernel: str) -> None:
    """The host's smem_bytes is the kernel's Smem::kBytes: a wrong number stops the compile."""
    spec = KERNELS[kernel]
    for config in spec.configs("sm_80")[::5]:
        tu = spec.source(config) + f"static_assert(Kernel::Smem::kBytes == {config.smem_bytes});\n"
        compiler.compile_cubin(tu, source.headers_for(tu), "sm_80")
        with pytest.raises(Exception, match=r"static assertion"):
            compiler.compile_cubin(tu.replace(f"== {config.smem_bytes}", "== 1"), source.headers_for(tu), "sm_80")


def test_params_layout() -> None:
    """The packer's fields are the C++ struct's, in its order and sizes; equal total size then forbids padding."""
    spec = KERNELS["attention_fwd_sm80"]
    text = f'#include "{spec.header}"\n'
    header = re.sub(r"//[^\n]*", "", source.headers_for(text)["attention/params.cuh"])
    body = re.search(r"struct AttentionFwdParams \{(.*?)\};", header, re.S)
    assert body is not None
    lines = [re.sub(r"^\s*(const )?\w+", "", line).split(",") for line in body[1].split(";")]
    assert [name.strip(" *") for line in lines for name in line if name.strip()] == list(spec.fields)
    sizes = [8] * (len(spec.fields) - 16) + [4] * 16
    assert sum(sizes) == spec.params_size
    for name, size in zip(spec.fields, sizes, strict=True):
        text += f"static_assert(sizeof(fm::{spec.params}::{name}) == {size});\n"
    compiler.compile_cubin(text, source.headers_for(text), "sm_80")


CAPABILITIES = [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"), ((12, 0), "sm_120")]


@pytest.mark.parametrize(("cc", "arch"), CAPABILITIES)
def test_arch_for(cc: tuple[int, int], arch: str) -> None:
    assert arch_for(cc) == arch
