"""The rendered source and the headers that go with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flashmoe_cupy
from flashmoe_cupy.errors import CompileError
from flashmoe_cupy.jit import source


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small header tree in place of cuda_src: kernel -> params, tile -> params."""
    files = {
        "toy/kernel.cuh": '#include "toy/params.cuh"\n  #  include "tile/copy.cuh"\n// #include "no.cuh"\n',
        "toy/params.cuh": "#pragma once\nstruct P {};\n",
        "tile/copy.cuh": '#pragma once\n#include "toy/params.cuh"\n#include "tile/copy.cuh"\n',
        "lonely.cuh": "",
        "broken.cuh": '#include "toy/nothing.cuh"\n',
        "outside.cuh": '#include "../secret.cuh"\n',
    }
    for name, text in files.items():
        path = tmp_path / "cuda_src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "secret.cuh").write_text("")
    monkeypatch.setattr(source, "source_root", lambda: tmp_path / "cuda_src")
    return tmp_path / "cuda_src"


def test_render_is_the_whole_translation_unit() -> None:
    text = source.render("toy/kernel.cuh", "Toy<64, true>", "ToyParams", 48, 128, 2)
    assert text == (
        '#include "toy/kernel.cuh"\n'
        "\n"
        "using Kernel = fm::Toy<64, true>;\n"
        'static_assert(sizeof(fm::ToyParams) == 48, "fm::ToyParams differs from the Python packer");\n'
        "\n"
        'extern "C" __global__ void __launch_bounds__(128, 2)\n'
        "fm_entry(const __grid_constant__ fm::ToyParams p) {\n"
        "  Kernel::run(p);\n"
        "}\n"
    )


def test_render_with_alignment_and_cluster() -> None:
    text = source.render("k.cuh", "K", "P", 256, 384, 1, params_align=128, cluster=2)
    assert "static_assert(sizeof(fm::P) == 256 && alignof(fm::P) == 128," in text
    assert "__cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)" in text
    assert "__cluster_dims__" not in source.render("k.cuh", "K", "P", 256, 384, 1)


@pytest.mark.usefixtures("root")
def test_headers_are_the_transitive_closure_sorted_by_name() -> None:
    headers = source.headers_for('#include "toy/kernel.cuh"\n')
    assert list(headers) == ["tile/copy.cuh", "toy/kernel.cuh", "toy/params.cuh"]
    assert headers["toy/params.cuh"] == "#pragma once\nstruct P {};\n"


@pytest.mark.usefixtures("root")
def test_headers_are_a_fresh_dict_for_each_caller() -> None:
    source.headers_for('#include "lonely.cuh"\n').clear()
    assert source.headers_for('#include "lonely.cuh"\n') == {"lonely.cuh": ""}


@pytest.mark.usefixtures("root")
def test_a_missing_header_is_named_with_the_file_that_asks() -> None:
    with pytest.raises(CompileError, match=r'"toy/nothing.cuh" in cuda_src/broken.cuh: no such file'):
        source.headers_for('#include "broken.cuh"\n')
    with pytest.raises(CompileError, match=r'"gone.cuh" in the generated source'):
        source.headers_for('#include "gone.cuh"\n')


@pytest.mark.usefixtures("root")
def test_includes_cannot_leave_the_source_folder() -> None:
    for name in ("outside.cuh", "../secret.cuh", "./lonely.cuh", "/etc/hosts"):
        with pytest.raises(CompileError, match="plain paths from the root"):
            source.headers_for(f'#include "{name}"\n')


def test_every_include_of_the_device_sources_resolves() -> None:
    root = source.source_root()
    assert isinstance(root, Path)
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.cuh")]
    assert "prelude.cuh" in names
    for name in names:
        assert name in source.headers_for(f'#include "{name}"\n')


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_an_installed_package_brings_its_own_headers(tmp_path: Path, packed: bool) -> None:
    here = Path(next(iter(flashmoe_cupy.__path__)))
    package = tmp_path / "lib" / "flashmoe_cupy"
    (package / "jit").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in ("errors.py", "jit/__init__.py", "jit/source.py"):
        shutil.copy(here / name, package / name)
    (package / "_cuda_src" / "toy").mkdir(parents=True)
    (package / "_cuda_src" / "toy" / "k.cuh").write_text('#include "p.cuh"\n')
    (package / "_cuda_src" / "p.cuh").write_text("from the wheel")
    (tmp_path / "lib" / "cuda_src").mkdir()
    (tmp_path / "lib" / "cuda_src" / "p.cuh").write_text("from somewhere else")
    path = tmp_path / "lib"
    if packed:
        path = tmp_path / "lib.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in (tmp_path / "lib").rglob("*"):
                archive.write(file, file.relative_to(tmp_path / "lib").as_posix())
    code = f"""
import sys
sys.path.insert(0, {str(path)!r})
from flashmoe_cupy.jit import source
assert source.__file__.startswith({str(path)!r}), source.__file__
assert source.headers_for('#include "toy/k.cuh"') == {{"p.cuh": "from the wheel", "toy/k.cuh": '#include "p.cuh"\\n'}}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
