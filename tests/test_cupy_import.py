"""The import of CuPy, which makes a folder of its own: homes and folders that cannot be used, and the repair."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cache_kit
import pytest
from cache_kit import Fake, fresh, get, toy
from test_cache_folders import no_rights, open_tmp

from flashmoe_cupy import _cupy, _env, service
from flashmoe_cupy.jit import disk

ROOT = Path(__file__).resolve().parent.parent
NOWHERE = "/proc/nope"  # cannot be made, not even by root
folder, fake, open_tmp = cache_kit.folder, cache_kit.fake, open_tmp  # fixtures


def run(*argv: str, **env: str | None) -> subprocess.CompletedProcess[str]:
    """A fresh process; a variable that is None is not set."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CUPY_CACHE_DIR", "XDG_CACHE_HOME", "FLASHMOE_LOG")}
    given = {**kept, "PYTHONPATH": str(ROOT), "FLASHMOE_LOG": "info", **env}
    clean = {name: value for name, value in given.items() if value is not None}
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=120, check=False, env=clean, cwd=ROOT
    )


def info(**env: str | None) -> tuple[dict[str, Any], str]:
    done = run("-m", "flashmoe_cupy", "info", "--no-test", "--json", **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.compile
@pytest.mark.parametrize(
    "env",
    [
        {"HOME": NOWHERE},
        {"HOME": "/dev/null"},
        {"HOME": "not/absolute"},
        {"HOME": NOWHERE, "CUPY_CACHE_DIR": ""},
        {"HOME": NOWHERE, "TMPDIR": NOWHERE, "XDG_CACHE_HOME": NOWHERE},
    ],
    ids=["missing", "file", "relative", "empty-variable", "nothing"],
)
def test_a_home_that_cannot_be_written(env: dict[str, str], tmp_path: Path) -> None:
    """CuPy's folder then lies in ours; the report shows the variable as the user has it."""
    seen, log = info(**env, FLASHMOE_CACHE_DIR=str(tmp_path / "ours"))
    assert seen["compiler"]["nvrtc"] and not seen["compiler"]["error"]
    assert (tmp_path / "ours" / "cupy").is_dir()
    assert f"CuPy keeps its own kernels in {tmp_path / 'ours' / 'cupy'}: " in log, log
    assert "CUPY_CACHE_DIR names another" in log
    assert seen["environment"]["CUPY_CACHE_DIR"] == env.get("CUPY_CACHE_DIR")
    assert seen["cache"]["writable"]
    assert not (ROOT / "not").exists()


@pytest.mark.compile
def test_a_home_that_works_is_left_alone(tmp_path: Path) -> None:
    seen, log = info(HOME=str(tmp_path), FLASHMOE_CACHE_DIR=str(tmp_path / "ours"))
    assert seen["compiler"]["nvrtc"] and not log
    assert (tmp_path / ".cupy" / "kernel_cache").is_dir() and not (tmp_path / "ours").exists()
    seen, log = info(HOME=NOWHERE, CUPY_CACHE_DIR=str(tmp_path / "given"), FLASHMOE_CACHE_DIR=str(tmp_path / "ours"))
    assert seen["compiler"]["nvrtc"] and not log
    assert (tmp_path / "given").is_dir() and not (tmp_path / "ours").exists()


@pytest.mark.compile
def test_warmup_without_any_folder(tmp_path: Path) -> None:
    """One temporary folder for CuPy, removed at the end; our kernels stay in memory."""
    argv = ("-m", "flashmoe_cupy", "warmup", "--arch", "sm_80", "--op", "moe", "--dtype", "float32")
    quick = ("-c", f"""
import sys
from flashmoe_cupy import cli
from flashmoe_cupy.service import warm
whole = warm.specialisations
warm.specialisations = lambda *a, **k: [(k, c) for k, c in whole(*a, **k) if k.name == "moe_permute_count"]
sys.exit(cli.main({argv[2:]!r}))""")
    done = run(*quick, HOME=NOWHERE, FLASHMOE_CACHE_DIR=NOWHERE, TMPDIR=str(tmp_path))
    assert done.returncode == 0 and "1 configurations ready" in done.stdout, done.stderr
    assert "CuPy's own kernels are kept until this process ends" in done.stderr
    assert "compiled kernels stay in memory only" in done.stderr
    assert not list(tmp_path.iterdir())


COMPILE = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from flashmoe_cupy import DependencyError
from flashmoe_cupy.jit import compiler
try:
    print(compiler.nvrtc_version())
except DependencyError as error:
    print("refused:", error)
"""


@pytest.mark.compile
def test_no_folder_at_all_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for given in (NOWHERE, str(tmp_path / "file"), str(tmp_path / ("long" * 100))):
        said = run("-c", COMPILE, str(tmp_path), CUPY_CACHE_DIR=given)
        assert said.stdout.startswith(f"refused: CuPy cannot use CUPY_CACHE_DIR={given} ("), said
    said = run("-c", COMPILE, NOWHERE, HOME=NOWHERE, FLASHMOE_CACHE_DIR=NOWHERE)
    assert said.stdout.startswith("refused:") and "set CUPY_CACHE_DIR to a folder that can be written" in said.stdout
    assert said.stdout.count(NOWHERE) >= 3, said  # what was tried, with its reason


@pytest.mark.gpu
@pytest.mark.torch
def test_the_first_gpu_call_without_a_home(tmp_path: Path) -> None:
    code = """
import torch, flashmoe_cupy
q = torch.randn(1, 8, 2, 16, device="cuda", dtype=torch.float16)
print(flashmoe_cupy.flash_attention(q, q, q).shape)
"""
    done = run("-c", code, HOME=NOWHERE, FLASHMOE_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and "[1, 8, 2, 16]" in done.stdout, done.stderr


# ---- our folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [NOWHERE, "/dev/null/cache", "{tmp}/file", "{tmp}/file/deep", "{tmp}/" + "x" * 300])
def test_info_does_not_call_a_folder_writable_that_is_not(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Fake
) -> None:
    del fake
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", path.format(tmp=tmp_path))
    fresh()
    seen = service.show_config()["cache"]
    assert not seen["writable"] and seen["error"]
    assert get().path is None  # and so it is
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_info_tries_the_folders_inside_too(folder: Path, fake: Fake) -> None:
    """A file in place of a folder of kernels stands for whatever others leave there."""
    del fake
    made = get()
    assert disk.why_not_writable() == "" and made.path is not None
    for name in ("v1/ab", "v1"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).write_text("")
        assert name in disk.why_not_writable()
        (folder / name).unlink()
    assert disk.why_not_writable() == ""


def test_a_trial_leaves_nothing(folder: Path) -> None:
    assert disk.why_not_writable() == "" and not folder.exists()
    assert _env.why_not_writable(folder / "a" / "b", keep=True) == ""
    assert list((folder / "a" / "b").iterdir()) == []


def test_a_folder_of_someone_else(
    fake: Fake, open_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readable or closed: it is survived, and the report says what it is."""
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(open_tmp / "cache"))
    fresh()
    get()
    with no_rights(open_tmp / "cache"):
        seen = service.show_config()["cache"]
        assert (seen["writable"], seen["entries"]) == (False, 1) and "denied" in seen["error"]
    (open_tmp / "cache").chmod(0o700)
    with no_rights(open_tmp / "cache" / "v1"):
        fresh()
        seen = service.show_config()["cache"]
        assert seen["writable"] == (os.geteuid() != 0 and os.getuid() != 0)  # closed to all but the owner
        if not seen["writable"]:
            assert get(toy(2)).path is None and disk.entries() == []
    assert fake.count >= 1


def test_a_relative_folder_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Fake) -> None:
    del fake
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", "mine")
    fresh()
    monkeypatch.chdir(tmp_path / "other")
    assert disk.cache_dir() == tmp_path / "mine"
    assert get().path is not None and not (tmp_path / "other" / "mine").exists()


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Fake) -> None:
    del fake
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", "mine")
    fresh()
    assert get().path is None and disk.why_not_writable() and disk.entries() == []
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("variable", ["FLASHMOE_CACHE_DIR", "FLASHMOE_DUMP"])
def test_a_tilde_without_a_home_is_refused(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would become a folder called ~ in the working directory."""
    import pwd

    def nobody(_: object) -> object:
        raise KeyError("nobody")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(pwd, "getpwnam", nobody)
    monkeypatch.chdir(tmp_path)
    for value in ("~/kernels", "~stranger/kernels"):
        with pytest.raises(ValueError, match=rf"{variable}='{value}'.*full path"):
            _env.parse({variable: value})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(_env.parse({variable: "~/kernels"}), variable[9:].lower()) == tmp_path / "kernels"


# ---- the repair -----------------------------------------------------------------------------------------------------


def test_the_repair_of_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cupy, "installed", list)
    monkeypatch.setattr(_cupy, "_requires", lambda package: [])
    monkeypatch.chdir(ROOT)
    assert _cupy.repair("13") == 'pip install -e ".[cuda13]"'
    assert _cupy.repair() == 'pip install -e ".[cuda13]", or with CUDA 12 pip install -e ".[cuda12]"'
    monkeypatch.chdir(tmp_path)
    assert _cupy.repair("12") == f'pip install -e ".[cuda12]" (in {ROOT})'
    both = 'pip install -e ".[cuda13]", or with CUDA 12 pip install -e ".[cuda12]"'
    assert _cupy.repair() == f"{both} (in {ROOT})"


def test_the_repair_of_a_wheel_names_packages_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project itself is not on the index."""
    monkeypatch.setattr(_cupy, "__file__", str(tmp_path / "site-packages" / "flashmoe_cupy" / "_cupy.py"))
    monkeypatch.setattr(_cupy, "installed", list)
    lines = {
        "flashmoe-cupy": ["numpy>=2.1.2", "cupy-cuda12x<15,>=14.2; extra == 'cuda12'",
                          "nvidia-cuda-nvrtc-cu12<13,>=12.9 ; extra == 'cuda12'", "cupy-cuda13x ; extra == 'cuda13'"],
    }  # fmt: skip
    monkeypatch.setattr(_cupy, "_requires", lambda package: lines.get(package, []))
    assert _cupy.repair("12") == "pip install 'cupy-cuda12x<15,>=14.2' 'nvidia-cuda-nvrtc-cu12<13,>=12.9'"
    assert _cupy.repair("13") == "pip install cupy-cuda13x"
    lines.clear()
    assert _cupy.repair("13") == "pip install cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-runtime"
    assert "flashmoe" not in _cupy.repair()


def test_the_repair_follows_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torch = {"12": ["filelock", "nvidia-cudnn-cu12==9.1"], "13": ["nvidia-cudnn-cu13==9.24", "triton"]}
    for major in ("12", "13"):
        monkeypatch.setattr(_cupy, "installed", list)
        monkeypatch.setattr(_cupy, "_requires", lambda package, lines=torch[major]: lines)
        assert _cupy.repair() == f'pip install -e ".[cuda{major}]"'
        monkeypatch.setattr(_cupy, "_requires", lambda package: [])
        monkeypatch.setattr(_cupy, "installed", lambda name=f"cupy-cuda{major}x": [name])
        assert _cupy.repair() == f'pip install -e ".[cuda{major}]"'


def test_no_text_names_a_package_that_is_not_on_the_index() -> None:
    for path in (ROOT / "flashmoe_cupy").rglob("*.py"):
        assert "flashmoe-cupy[" not in path.read_text(encoding="utf-8"), path
