"""CuPy: found and imported here, with the words for what is missing. Needs no device and no driver.

CuPy makes a folder for its own kernels when it is imported, `CUPY_CACHE_DIR` or `~/.cupy/kernel_cache`, and its import
fails where that folder cannot be made. So a folder that works is chosen before, if this library is the first to import
CuPy: the default, else `cupy` in the cache folder of this library, else a temporary one.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from flashmoe_cupy import _env
from flashmoe_cupy.errors import DependencyError

VARIABLE = "CUPY_CACHE_DIR"
_WHEELS = ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy-cuda14x", "cupy", "cupy-rocm-7-0")
_PARTS = {  # packages that each extra brings, for an installation whose metadata does not say
    "12": ("cupy-cuda12x", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"),
    "13": ("cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime"),
}
_lock = threading.Lock()
_sound: Any = None  # CuPy, once it was imported and no other package of it was found
_working: Any = None  # CuPy, once a driver answered it


def load(what: str = "a GPU") -> ModuleType:
    """The module cupy. what: who needs it, for the error.

    Raises DependencyError, which says what to install or which variable to set.
    """
    global _sound
    known = sys.modules.get("cupy")
    if known is not None and known is _sound:
        return known  # to look at all packages takes a millisecond
    wheels = installed()
    if len(wheels) > 1:
        raise DependencyError(
            f"{len(wheels)} CuPy packages are installed and overwrite each other: {', '.join(wheels)}; "
            f"repair: pip uninstall -y {' '.join(wheels)}, then {repair()}"
        )
    if wheels and "cupy" not in sys.modules:
        with _lock:
            _choose_folder()
    try:
        cupy = import_module("cupy")
    except Exception as error:  # whatever a broken or a half-installed package raises
        if not wheels:
            said = f"{what} needs CuPy, which is not installed"
        else:
            said = f"{what} needs CuPy, and {wheels[0]} does not import ({type(error).__name__}: {error})"
        raise DependencyError(f"{said}; repair: {repair()}") from error
    _sound = cupy
    return cupy


def with_driver() -> Any:
    """CuPy on a machine with a driver. Raises DependencyError where one of the two is missing."""
    global _working
    if _working is None:
        cupy: Any = load("an array on a GPU")
        try:
            cupy.cuda.runtime.getDeviceCount()
        except RuntimeError as error:  # the base of CuPy's own errors
            raise DependencyError(f"GPU arrays need a working NVIDIA driver ({error}); NumPy arrays do not") from error
        _working = cupy
    return _working


def installed() -> list[str]:
    """Names of the installed CuPy packages; a sound environment has exactly one."""
    from importlib.metadata import PackageNotFoundError, distribution

    found = []
    for wheel in _WHEELS:
        try:
            distribution(wheel)
        except PackageNotFoundError:
            continue
        found.append(wheel)
    return found


# ---- the folder of CuPy's own kernels -------------------------------------------------------------------------------


def _choose_folder() -> None:
    """Set CUPY_CACHE_DIR where CuPy's default cannot be written. Raises DependencyError where nothing can."""
    given = os.environ.get(VARIABLE, "")
    if given:
        error = "" if os.path.isdir(given) else _env.why_not_writable(Path(given), keep=True)
        if error:
            raise DependencyError(f"CuPy cannot use {VARIABLE}={given} ({error}); set it to a folder that can be made")
        return
    failed: list[str] = []
    default, ours = Path(os.path.expanduser("~/.cupy/kernel_cache")), _env.cache_dir()
    for folder in (default, *([ours / "cupy"] if ours is not None else [])):
        error = _env.why_not_writable(folder, keep=True) if folder.is_absolute() else "no home folder is known"
        if not error:
            if folder is not default or VARIABLE in os.environ:  # CuPy takes an empty variable as a folder name
                os.environ[VARIABLE] = str(folder)
            if failed:
                _env.log.info("CuPy keeps its own kernels in %s: %s; %s names another", folder, failed[0], VARIABLE)
            return
        failed.append(f"{folder} cannot be written ({error})")
    try:
        temporary = tempfile.mkdtemp(prefix="flashmoe_cupy-")
    except OSError as error:
        raise DependencyError(
            f"CuPy needs a folder for its own kernels: {'; '.join((*failed, str(error)))}; "
            f"set {VARIABLE} to a folder that can be written"
        ) from error
    atexit.register(_remove, temporary, os.getpid())
    os.environ[VARIABLE] = temporary
    _env.log.warning("CuPy's own kernels are kept until this process ends: %s; %s names a folder for them",
                     "; ".join(failed), VARIABLE)  # fmt: skip


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # in a fork the folder is the parent's
        shutil.rmtree(folder, ignore_errors=True)


# ---- the repair -----------------------------------------------------------------------------------------------------


def repair(major: str = "") -> str:
    """The command that brings CuPy and its compiler; nothing in it that this installation cannot give.

    major: the CUDA major "12" or "13"; "" = that of the CuPy here, else that of torch, else 13 and a word of 12.
    """
    chosen = major or _major()
    command, where = _command(chosen or "13")
    return command + where if chosen else f"{command}, or with CUDA 12 {_command('12')[0]}{where}"


def _major() -> str:
    if any(found := [wheel for wheel in installed() if re.fullmatch(r"cupy-cuda1[23]x", wheel)]):
        return found[0][-3:-1]
    for line in _requires("torch"):  # a torch for a CUDA major brings the compiler of that major
        if built := re.match(r"nvidia-\w+-cu(1[23])\b", line):
            return built[1]
    return ""


def _command(major: str) -> tuple[str, str]:
    """The command, and where to give it."""
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file() and (root / "cuda_src").is_dir():  # a clone, installed or not
        where = "" if root == Path(os.path.realpath(os.curdir)) else f" (in {root})"
        return f'pip install -e ".[cuda{major}]"', where
    extra = re.compile(rf"""extra\s*==\s*["']cuda{major}["']""")
    parts = [line.partition(";")[0].replace(" ", "") for line in _requires("flashmoe-cupy") if extra.search(line)]
    import shlex

    return "pip install " + " ".join(shlex.quote(part) for part in parts or _PARTS[major]), ""


def _requires(package: str) -> list[str]:
    from importlib.metadata import PackageNotFoundError, requires

    try:
        return requires(package) or []
    except PackageNotFoundError:
        return []
