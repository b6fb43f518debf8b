"""Renders the translation unit of one specialisation and collects the headers it needs, as text.

Nothing here touches CUDA or CuPy. A TU is one include, one alias, one size check and one entry:
the headers of `cuda_src` hold no `__global__`, so every cubin has the same single entry name.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from flashmoe_cupy.errors import CompileError

ENTRY = "fm_entry"  # the name of the kernel in every cubin

_INCLUDE = re.compile(r'[ \t]*#[ \t]*include[ \t]*"([^"]+)"')  # of a line


@cache
def source_root() -> Path | Traversable:
    """The folder of the device headers: `flashmoe_cupy/_cuda_src` in a wheel, `cuda_src` beside the package in git.

    Raises CompileError when neither exists.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_cuda_src", package.parent / "cuda_src"):
        if folder.is_dir():
            return folder
    inside = resources.files("flashmoe_cupy") / "_cuda_src"  # a zip import has no folder on disk
    if inside.is_dir():
        return inside
    raise CompileError(f"the device headers are missing: no {package / '_cuda_src'} and no cuda_src beside the package")


_folders: list[Path] = []


def add_folder(folder: Path) -> None:
    """Find headers in this folder too, behind the package's own: those of kernels that are declared elsewhere."""
    _folders.append(folder)


def render(
    header: str,
    kernel: str,
    params: str,
    params_size: int,
    threads: int,
    min_blocks: int,
    *,
    params_align: int | None = None,
    cluster: int = 1,
) -> str:
    """The whole TU for one kernel.

    header: include name of the kernel's file, such as "attention/fwd_sm80.cuh".
    kernel: type inside namespace fm with a static `run(const Params&)`, such as "Fwd<bf16, 128, 64>".
    params: name of the argument struct inside namespace fm; params_size (and params_align, when given) are
    the bytes that the Python packer uses, and the compiler checks them.
    threads, min_blocks: launch bounds. cluster: static cluster size along x; 1 = no cluster.
    """
    check = f"sizeof(fm::{params}) == {params_size}"
    if params_align is not None:
        check += f" && alignof(fm::{params}) == {params_align}"
    attributes = f"__launch_bounds__({threads}, {min_blocks})"
    if cluster > 1:
        attributes = f"__cluster_dims__({cluster}, 1, 1) {attributes}"
    return (
        f'#include "{header}"\n'
        "\n"
        f"using Kernel = fm::{kernel};\n"
        f'static_assert({check}, "fm::{params} differs from the Python packer");\n'
        "\n"
        f'extern "C" __global__ void {attributes}\n'
        f"{ENTRY}(const __grid_constant__ fm::{params} p) {{\n"
        "  Kernel::run(p);\n"
        "}\n"
    )


def headers_for(text: str) -> dict[str, str]:
    """Every header that `text` includes with quotes, also through other headers: include name -> text.

    Include names are paths from the root of `cuda_src` ("ptx/mma_sync.cuh") in every file. The result is sorted by
    name and cached for the life of the process: a header edited later is seen by the next process.
    Raises CompileError that names a missing header and the file that asks for it.
    """
    roots = source_root(), *_folders
    key = str(roots), tuple(_included(text))
    found = _closures.get(key)
    if found is None:
        found = _closures[key] = _closure(roots, key[1])  # two threads may both do it: the same result
    return dict(found)


_closures: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}  # by folders and the names that a text includes
_Roots = tuple[Path | Traversable, ...]


def _closure(roots: _Roots, names: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    pending = [(name, "the generated source") for name in names]
    while pending:
        name, asker = pending.pop()
        if name not in found:
            found[name] = text = _read(roots, name, asker)
            pending += [(inner, f"cuda_src/{name}") for inner in _included(text)]
    return dict(sorted(found.items()))


def _included(text: str) -> list[str]:
    """The names that a text includes with quotes, in its order."""
    # Few lines have a "#": to look for it takes a third of the time that an expression over the whole text takes.
    return [found[1] for line in text.split("\n") if "#" in line and (found := _INCLUDE.match(line))]


def _read(roots: _Roots, name: str, asker: str) -> str:
    parts = name.split("/")
    if ".." in parts or "" in parts or "." in parts:
        raise CompileError(f'#include "{name}" in {asker}: include names are plain paths from the root of cuda_src')
    errors = []
    for root in roots:
        try:
            if isinstance(root, Path):  # a call reads two dozen headers, and pathlib is slow
                with open(f"{root}/{name}", "rb") as file:
                    return file.read().decode("utf-8")
            return root.joinpath(*parts).read_bytes().decode("utf-8")
        except OSError as error:
            errors.append(error)
    raise CompileError(f'#include "{name}" in {asker}: no such file in cuda_src ({errors[0]})')
