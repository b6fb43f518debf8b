"""The compiler: cubins without a device, what ptxas said about them, and errors that name the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashmoe_cupy import _cupy
from flashmoe_cupy.errors import CompileError, DependencyError
from flashmoe_cupy.jit import compiler, source
from flashmoe_cupy.jit.log import map_places, parse_log

KERNEL = """#pragma once
#include "toy/params.cuh"
namespace fm {
template <int N> struct Toy {
  static void run(const Params& p) {
    __shared__ float s[N];
    s[threadIdx.x] = p.scale;
    __syncthreads();
    p.out[threadIdx.x] = s[N - 1 - threadIdx.x];
  }
};
}  // namespace fm
"""
PARAMS = """#pragma once
namespace fm { struct Params { float* out; float scale; int n; }; }
"""
HEADERS = {"toy/kernel.cuh": KERNEL, "toy/params.cuh": PARAMS}
TU = source.render("toy/kernel.cuh", "Toy<64>", "Params", 16, 64, 1)

compiles = pytest.mark.compile


def bare(body: str) -> str:
    return f'extern "C" __global__ void fm_entry(float* out, unsigned long long d, int n) {{ {body} }}\n'


@compiles
@pytest.mark.parametrize(("arch", "number"), [("sm_80", 80), ("sm_89", 89), ("sm_90a", 90)])
def test_a_cubin_for_each_arch_without_a_device(arch: str, number: int) -> None:
    made = compiler.compile_cubin(TU, HEADERS, arch)
    assert made.cubin[:4] == b"\x7fELF"
    assert number in made.cubin[48:50]  # the arch is the low byte of e_flags, the second one since CUDA 13
    assert b"fm_entry" in made.cubin
    assert 0 < made.registers < 64
    assert made.static_smem == 256
    assert (made.spill_stores, made.spill_loads, made.stack, made.remarks) == (0, 0, 0, ())
    assert made.milliseconds > 0
    assert f".target {arch}" in made.ptx
    assert "Compiling entry function 'fm_entry'" in made.log
    assert "\0" not in made.log


@compiles
def test_equal_bytes_from_any_folder_and_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.compile_cubin(TU, HEADERS, "sm_90a", name="first")
    monkeypatch.chdir(tmp_path)
    second = compiler.compile_cubin(TU, dict(reversed(HEADERS.items())), "sm_90a", name="second")
    assert first.cubin == second.cubin
    assert str(tmp_path).encode() not in second.cubin


@compiles
def test_only_headers_in_memory_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "params.cuh").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompileError, match=r"cuda_src/toy/kernel\.cuh:2: .*toy/params\.cuh"):
        compiler.compile_cubin(TU, {"toy/kernel.cuh": KERNEL}, "sm_80")


@compiles
def test_a_params_struct_of_another_size_does_not_compile() -> None:
    wrong = source.render("toy/kernel.cuh", "Toy<64>", "Params", 24, 64, 1)
    with pytest.raises(CompileError, match="differs from the Python packer") as caught:
        compiler.compile_cubin(wrong, HEADERS, "sm_80", name="toy d64")
    assert "toy d64 does not compile for sm_80 with NVRTC" in str(caught.value)
    assert "fm_entry.cu:4: error" in caught.value.log


@compiles
def test_errors_name_the_header_and_line_also_inside_templates() -> None:
    broken = KERNEL.replace("    __syncthreads();", "    helper(s[0]);").replace(
        "template <int N>", "template <class T> void helper(T x) { x.nothing(); }\ntemplate <int N>"
    )
    with pytest.raises(CompileError) as caught:
        compiler.compile_cubin(TU, {**HEADERS, "toy/kernel.cuh": broken}, "sm_80")
    assert "cuda_src/toy/kernel.cuh:4: error" in caught.value.log
    assert 'instantiation of "void fm::helper' in caught.value.log


@compiles
def test_an_assembler_error_shows_the_instruction() -> None:
    with pytest.raises(CompileError) as caught:
        compiler.compile_cubin(bare('asm volatile("no.such.f32;");'), {}, "sm_80")
    assert "error in PTX: no.such.f32;" in caught.value.log


@compiles
def test_an_unknown_arch_is_a_compile_error() -> None:
    with pytest.raises(CompileError, match="sm_17"):
        compiler.compile_cubin(TU, HEADERS, "sm_17")


@compiles
def test_spills_and_stack_are_seen() -> None:
    body = "float a[64]; for (int i = 0; i < 64; ++i) a[i] = out[i * n]; __syncthreads();"
    body += "for (int i = 0; i < 64; ++i) out[i] = a[i] * a[63 - i];"
    body = body.replace("for (", "\n#pragma unroll\nfor (")
    made = compiler.compile_cubin(bare(body), {}, "sm_80", (*compiler.OPTIONS, "-maxrregcount=24"))
    assert made.registers <= 24
    assert made.spill_stores > 0
    assert made.spill_loads > 0
    assert made.stack > 0
    loose = compiler.compile_cubin(bare(body), {}, "sm_80")
    assert (loose.spill_stores, loose.spill_loads, loose.stack) == (0, 0, 0)


@compiles
def test_wgmma_remarks_are_seen() -> None:
    text = (
        "float a = out[0], b = out[1], c = out[2], e = out[3];"
        "for (int i = 0; i < n; i++) {"
        ' asm volatile("wgmma.fence.sync.aligned;");'
        ' asm volatile("{wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %4, 1, 1, 1, 0, 0;}"'
        ' : "+f"(a), "+f"(b), "+f"(c), "+f"(e) : "l"(d));'
        " TOUCH"
        ' asm volatile("wgmma.commit_group.sync.aligned;");'
        ' asm volatile("wgmma.wait_group.sync.aligned 0;" : "+f"(a), "+f"(b), "+f"(c), "+f"(e) :: "memory");'
        "} out[threadIdx.x] = a + b + c + e;"
    )
    bad = compiler.compile_cubin(bare(text.replace("TOUCH", "a += 1.f;")), {}, "sm_90a")
    assert bad.remarks
    assert all("(C75" in line for line in bad.remarks)


def test_a_log_of_two_functions_is_summed() -> None:
    made = parse_log(
        "ptxas info    : Function properties for helper\n"
        "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Function properties for fm_entry\n"
        "    48 bytes stack frame, 2 bytes spill stores, 1 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 64 bytes cumulative stack size, 1024 bytes smem\n"
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
    )
    assert made[2:7] == (168, 10, 5, 64, 1024)
    assert made.remarks == (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
    )


def test_places_outside_the_headers_keep_their_names() -> None:
    log = "toy/params.cuh(3): error: no\nother.cuh(4): warning #177-D: unused\n  f(2): error in text\n"
    log += '   instantiation of "f" at line 9 of toy/kernel.cuh\n   instantiation of "g" at line 8 of fm_entry.cu\n'
    assert map_places(log, HEADERS) == (
        "cuda_src/toy/params.cuh:3: error: no\nother.cuh:4: warning #177-D: unused\n  f(2): error in text\n"
        '   instantiation of "f" at cuda_src/toy/kernel.cuh:9\n   instantiation of "g" at fm_entry.cu:8\n'
    )


# ---- what may be missing --------------------------------------------------------------------------------------------


def test_an_old_nvrtc_is_refused_with_the_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_version", (12, 3))
    with pytest.raises(DependencyError, match=r"NVRTC 12\.3 is too old, 12\.4 or newer .* pip install"):
        compiler.compile_cubin(TU, HEADERS, "sm_80")


def test_no_cupy_is_refused_with_the_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(_cupy, "import_module", missing)
    monkeypatch.setattr(_cupy, "_sound", None)
    monkeypatch.setattr(compiler, "_nvrtc_module", None)
    monkeypatch.setattr(compiler, "_version", None)
    monkeypatch.setattr(_cupy, "installed", list)
    with pytest.raises(DependencyError, match=r"needs CuPy, which is not installed; repair: pip install"):
        compiler.nvrtc_version()
    monkeypatch.setattr(_cupy, "installed", lambda: ["cupy-cuda13x"])
    with pytest.raises(DependencyError, match=r"cupy-cuda13x does not import .* pip install .*cuda13"):
        compiler.nvrtc_version()


def test_two_cupy_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cupy, "_sound", None)
    monkeypatch.setattr(compiler, "_nvrtc_module", None)
    monkeypatch.setattr(compiler, "_version", None)
    monkeypatch.setattr(_cupy, "installed", lambda: ["cupy-cuda12x", "cupy-cuda13x"])
    with pytest.raises(DependencyError, match="pip uninstall -y cupy-cuda12x cupy-cuda13x"):
        compiler.nvrtc_version()


def test_installed_cupy_reads_the_package_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _cupy.installed()
    folder = tmp_path / "cupy_cuda11x-13.0.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: cupy-cuda11x\nVersion: 13.0.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(_cupy.installed()) == {*before, "cupy-cuda11x"}


def test_an_nvrtc_that_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def getVersion() -> tuple[int, int]:
            raise RuntimeError("libnvrtc.so.12 not found")

    monkeypatch.setattr(compiler, "_nvrtc_module", Broken)
    monkeypatch.setattr(compiler, "_version", None)
    with pytest.raises(DependencyError, match=r"libnvrtc\.so\.12 not found.*pip install"):
        compiler.nvrtc_version()
