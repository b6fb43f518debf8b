"""What an install promises: a light import, a typed package, metadata that agrees with the code."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import flashmoe_cupy

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("cupy", "cupy_backends", "torch", "jax", "jaxlib", "rich", "filelock", "platformdirs")


def python(code: str, **env: str) -> str:
    """Standard output of `code` in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def metadata() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.alone
def test_import_is_light() -> None:
    """At most 50 ms beyond NumPy. The best of several processes: the first one may read files from a cold disk."""
    code = (
        "import time, numpy\nt = time.perf_counter()\nimport flashmoe_cupy\n"
        "print((time.perf_counter() - t) * 1e3)\nassert flashmoe_cupy.__version__"
    )
    best = min(float(python(code)) for _ in range(5))
    assert best <= 50, f"import flashmoe_cupy took {best:.1f} ms beyond NumPy"


def test_import_pulls_in_no_framework() -> None:
    code = f"import sys, json, flashmoe_cupy\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert json.loads(python(code)) == []


def test_a_numpy_call_pulls_in_no_framework() -> None:
    """Neither the call nor listing the public names may import CuPy, torch or JAX."""
    code = (
        "import sys, json, numpy as np, flashmoe_cupy as fm\n"
        "for name in dir(fm): getattr(fm, name)\n"
        "q = np.ones((1, 3, 2, 8), np.float32)\n"
        "out = fm.flash_attention(q, q, q)\n"
        "assert isinstance(out, np.ndarray) and np.allclose(out, 1)\n"
        "print(json.dumps([m for m in ('cupy', 'torch', 'jax') if m in sys.modules]))"
    )
    assert json.loads(python(code)) == []


def test_import_needs_no_driver_and_no_home() -> None:
    code = (
        "import sys\nfor name in ('cupy', 'torch', 'jax'): sys.modules[name] = None\n"
        "import numpy as np, flashmoe_cupy as fm\n"
        "q = np.ones((1, 3, 2, 8), np.float32)\nprint(fm.flash_attention(q, q, q).shape)"
    )
    missing = str(ROOT / "pyproject.toml" / "not-a-folder")
    out = python(code, HOME=missing, XDG_CACHE_HOME=missing, FLASHMOE_CACHE_DIR=missing, CUDA_VISIBLE_DEVICES="")
    assert out.strip() == "(1, 3, 2, 8)"


def test_public_names() -> None:
    import flashmoe_cupy

    names = ("flash_attention", "flash_attention_varlen", "explain", "warmup", "stats", "show_config", "clear_cache")
    for name in names:
        assert callable(getattr(flashmoe_cupy, name)), name
        assert name in dir(flashmoe_cupy)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flashmoe_cupy.no_such_name


def test_version_agrees() -> None:
    import flashmoe_cupy

    assert flashmoe_cupy.__version__ == metadata()["project"]["version"]
    try:
        installed = version("flashmoe-cupy")
    except PackageNotFoundError:
        pytest.skip("runs from the source tree, not from an install")
    assert installed == flashmoe_cupy.__version__


def test_package_is_typed() -> None:
    spec = find_spec("flashmoe_cupy")
    assert spec is not None and spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").is_file()


def test_extras_keep_one_cuda_major() -> None:
    extras = metadata()["project"]["optional-dependencies"]
    for major in (12, 13):
        names = {re.split(r"[<>=\[ ]", line)[0]: line for line in extras[f"cuda{major}"]}
        suffix = "-cu12" if major == 12 else ""
        assert set(names) == {f"cupy-cuda{major}x", f"nvidia-cuda-nvrtc{suffix}", f"nvidia-cuda-runtime{suffix}"}
        for part in ("nvrtc", "runtime"):
            line = names[f"nvidia-cuda-{part}{suffix}"]
            assert f">={major}" in line and f"<{major + 1}" in line, "CuPy loads the compiler of its own CUDA major"
    base = " ".join(metadata()["project"]["dependencies"]).lower()
    assert not any(name in base for name in ("cupy", "cuda", "torch", "jax"))
    assert [{"extra": "cuda12"}, {"extra": "cuda13"}] in metadata()["tool"]["uv"]["conflicts"]


def test_extras_bound_nothing_that_torch_bounds() -> None:
    """torch 2.14 wants cuda-bindings 13: an extra that wants others makes pip go back to an older torch."""
    for name, lines in metadata()["project"]["optional-dependencies"].items():
        assert not [line for line in lines if line.startswith("cuda-")], name
    used = re.compile(r"^\s*(?:import|from) cuda\b", re.MULTILINE)
    files = (ROOT / "flashmoe_cupy").rglob("*.py")
    assert not [path for path in files if used.search(path.read_text(encoding="utf-8"))]


def test_device_sources_are_found() -> None:
    from flashmoe_cupy.jit.source import source_root

    assert (source_root() / "prelude.cuh").is_file()


def test_every_variable_is_documented() -> None:
    """The README's table holds exactly the variables that the code knows."""
    from flashmoe_cupy import _env

    table = re.findall(r"^\| `(FLASHMOE_\w+)`", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(_env.VARIABLES)


def test_a_first_reading_takes_three_minutes() -> None:
    """What stands before the line that ends it, without what is folded. Words a minute: 230, of code twice as many."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("**That is all for a first reading.**")[0]
    text = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    code = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    words, words_of_code = len(text.split()), len(" ".join(code).split())
    assert words > 300 and 1.5 < (words - words_of_code) / 230 + words_of_code / 460 <= 3


def readme_examples() -> dict[str, str]:
    """The README's Python blocks by the library that they show, or as "moe", "packed", "padded" and so on."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = {}
    for block in blocks:
        lines = re.findall(r"^import (\w+)", block, re.MULTILINE)
        shown = (name for name in ("cupy", "torch", "jax", "numpy") if name in lines)
        kinds = (
            ("moe", "fused_moe"), ("instead", "flash_attn_func"), ("packed", "varlen"), ("padded", "leftpad"),
            ("gradients", "_backward"),
        )  # fmt: skip
        key = next((kind for kind, word in kinds if word in block), None) or next(shown)
        assert key not in found
        found[key] = block
    return found


@pytest.mark.parametrize(
    "library",
    [
        "numpy",
        "moe",
        "padded",
        "gradients",
        pytest.param("jax", marks=pytest.mark.jax),
        pytest.param("torch", marks=pytest.mark.torch),
        pytest.param("packed", marks=pytest.mark.torch),
        pytest.param("instead", marks=pytest.mark.torch),
        pytest.param("cupy", marks=pytest.mark.gpu),
    ],
)
def test_readme_example_runs(library: str) -> None:
    """As a script of its own: it also has to end, with work still in flight."""
    if library == "moe":
        python(readme_examples()[library] + "assert out.shape == x.shape and ids.shape == (100, 2)\n")
        return
    room = {"packed": "torch", "instead": "torch", "padded": "numpy", "gradients": "numpy"}.get(library, library)
    check = (
        f"assert type(out).__module__.split('.')[0].removesuffix('lib') == {room!r}, type(out)\n"
        "assert out.shape[-1] == v.shape[-1]\n"
    )
    if library == "instead":
        check += "torch.testing.assert_close(same, out)\nassert y.shape == (2, 1, 512) and cache.length == 101\n"
    if library == "gradients":
        check += "assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape and dv.any()\n"
    if library == "numpy":
        check += "assert np.abs(out - truth).max() < 1e-5 and stats.expert_counts.sum() == 200 and y.shape == x.shape\n"
    python(readme_examples()[library] + check)


@pytest.mark.parametrize(("name", "others"), [("flash_attention", 10), ("fused_moe", 4), ("moe_route", 3)])
def test_help_says_what_names_of_other_libraries_mean(name: str, others: int) -> None:
    """As the TypeError for each of them does."""
    function = getattr(flashmoe_cupy, name)
    ours = set(inspect.signature(function).parameters)
    found = re.search(r"Names elsewhere: (.*?)\n\n", function.__doc__, re.DOTALL)
    assert found is not None
    pairs = re.findall(r"([\w, ]+?) (?:is|are) (\w+)[;.]", " ".join(found[1].split()))
    assert {mine for _, mine in pairs} <= ours
    theirs = [word for words, _ in pairs for word in re.split(r", | and ", words.strip())]
    assert len(theirs) == others and not ours & set(theirs)
