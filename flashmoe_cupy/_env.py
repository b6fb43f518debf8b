"""Every environment variable of the library, parsed once at first use.

| Variable             | Default        | Effect                                                                      |
|----------------------|----------------|-----------------------------------------------------------------------------|
| FLASHMOE_CACHE_DIR   | user cache     | folder for compiled kernels                                                 |
| FLASHMOE_LOG         | warning        | `warning`, `info` or `debug` for the logger `flashmoe_cupy`                 |
| FLASHMOE_JIT         | 1              | 0 = load from the cache only, never compile                                 |
| FLASHMOE_ARCH        | the device's   | target for work that only compiles, for example `sm_90a`                    |
| FLASHMOE_DUMP        | off            | folder that gets the source, PTX, cubin and log of every compile            |
| FLASHMOE_LINEINFO    | 0              | 1 = source lines for Nsight; part of the cache key                          |
| FLASHMOE_CHECK       | 0              | 1 = synchronise and check after each launch                                 |

Switches take 1, 0, true, false, yes, no, on, off. An empty value is the same as an unset one.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("flashmoe_cupy")

_LEVELS = {"warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class Env(NamedTuple):
    """The parsed variables. Paths are absolute, with `~` expanded; None: the variable is not set."""

    cache_dir: Path | None = None
    log: str = "warning"
    jit: bool = True
    arch: str | None = None
    dump: Path | None = None
    lineinfo: bool = False
    check: bool = False


# Variable -> one line for `python -m flashmoe_cupy info`; the same order as Env's fields.
VARIABLES: dict[str, str] = {
    "FLASHMOE_CACHE_DIR": "folder for compiled kernels",
    "FLASHMOE_LOG": "warning, info or debug",
    "FLASHMOE_JIT": "0 = load from the cache only, never compile",
    "FLASHMOE_ARCH": "target for work that only compiles, for example sm_90a",
    "FLASHMOE_DUMP": "folder that gets the source, PTX, cubin and log of every compile",
    "FLASHMOE_LINEINFO": "1 = source lines for Nsight",
    "FLASHMOE_CHECK": "1 = synchronise and check after each launch",
}


def parse(environ: Mapping[str, str]) -> Env:
    """Parse the variables of `environ`. Raises ValueError that names the variable and what it may be."""

    def text(name: str) -> str:
        return environ.get(name, "").strip()

    def switch(name: str, default: bool) -> bool:
        value = text(name).lower()
        if value and value not in _SWITCH:
            raise ValueError(f"{name}={value!r} is not understood; use 1 or 0")
        return _SWITCH.get(value, default)

    def path(name: str) -> Path | None:
        value = text(name)
        full = os.path.expanduser(value)  # leaves `~` alone when there is no home
        if full.startswith("~"):
            raise ValueError(f"{name}={value!r}: no home folder is known for {value.split('/')[0]}; use a full path")
        if not value:
            return None
        with suppress(OSError):  # the working directory may be gone; then nothing can be written there
            return Path(full).absolute()
        return Path(full)

    level = text("FLASHMOE_LOG").lower() or "warning"
    if level not in _LEVELS:
        raise ValueError(f"FLASHMOE_LOG={level!r} is not understood; use warning, info or debug")
    arch = text("FLASHMOE_ARCH").lower() or None
    if arch is not None and not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
        raise ValueError(f"FLASHMOE_ARCH={arch!r} is not understood; use a name such as sm_80 or sm_90a")
    return Env(
        cache_dir=path("FLASHMOE_CACHE_DIR"),
        log=level,
        jit=switch("FLASHMOE_JIT", True),
        arch=arch,
        dump=path("FLASHMOE_DUMP"),
        lineinfo=switch("FLASHMOE_LINEINFO", False),
        check=switch("FLASHMOE_CHECK", False),
    )


_env: Env | None = None


def get() -> Env:
    """The process's settings. Parsed at the first call; later changes of os.environ need `reload()`."""
    return _env if _env is not None else reload()


def reload() -> Env:
    """Parse os.environ again (tests, notebooks). Raises ValueError as `parse` does."""
    global _env
    _env = parse(os.environ)
    if os.environ.get("FLASHMOE_LOG", "").strip():  # unset: the application's own logging set-up stays in charge
        _show_lines(_env.log)
    return _env


def cache_dir() -> Path | None:
    """The folder of the kernels, made at the first write; None when no place is known (no home).

    Order: FLASHMOE_CACHE_DIR; XDG_CACHE_HOME/flashmoe_cupy; the platform's user cache, ~/.cache/flashmoe_cupy on Linux.
    """
    chosen = get().cache_dir
    if chosen is not None:
        return chosen
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG rules: a relative path is to be ignored
        return Path(xdg) / "flashmoe_cupy"
    import platformdirs  # 20 ms, and most servers set one of the two variables

    try:
        folder = Path(platformdirs.user_cache_dir("flashmoe_cupy", appauthor=False))
    except (OSError, RuntimeError, KeyError):
        return None
    return folder if folder.is_absolute() else None  # without a home the path keeps its "~"


def why_not_writable(folder: Path, keep: bool = False) -> str:
    """"" when `folder` is there or can be made, and can be written; else why not. Tried, not asked: rights, read-only
    file systems, quotas and root's powers all have their say. keep: leave the folder that was made for the trial.
    """
    import tempfile

    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".flashmoe-", dir=folder))
        made = [] if keep else made
    except OSError as error:
        return str(error)
    finally:
        for path in made:  # the innermost first
            with suppress(OSError):
                path.rmdir()
    return ""


def _show_lines(level: str) -> None:
    """Give the logger its level, and a handler on stderr if nothing else would show its lines."""
    log.setLevel(_LEVELS[level])
    if not log.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
