"""Compiled kernels on disk: where their files are, checked when they are read, written whole or not at all.

    <folder>/v1/ab/<key>.cubin   the kernel
    <folder>/v1/ab/<key>.cu      its source, for reading
    <folder>/v1/ab/<key>.json    name, arch, registers, spills, versions, and the cubin's size and SHA-256
    <folder>/v1/ab/<key>.lock    empty; held while one process compiles

A damaged or half-written kernel is as good as none. A folder that cannot be written costs one warning and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from flashmoe_cupy import _env

SCHEMA = 1  # of the files and their names; others are left alone
SUFFIXES = (".cubin", ".cu", ".json", ".lock", ".tmp")  # of the files that are ours

_warned = False


class Entry(NamedTuple):
    """One kernel."""

    key: str
    cubin: bytes
    path: Path | None  # of the cubin on disk; None: it is in memory only
    info: dict[str, Any]  # what the .json file holds


class Stored:
    """One kernel on disk. `vars` has its parts by name."""

    def __init__(self, path: Path, size: int, written: float, info: dict[str, Any]) -> None:
        """path: of the cubin. size: bytes of its three files. written: seconds since the epoch.

        info: what the .json file holds, with the kernel's key, the name of its configuration and its arch. Raises
        KeyError and TypeError where it does not.
        """
        self.key: str = info["key"]
        self.name: str = info["name"]
        self.arch: str = info["arch"]
        self.path, self.size, self.written, self.info = path, size, written, info


def cache_dir() -> Path | None:
    """The folder of the kernels, made at the first write; None when no place is known (see _env.cache_dir)."""
    return _env.cache_dir()


def why_not_writable() -> str:
    """"" when kernels can be kept in the folder, else why not; tried, and what was made for it is removed again."""
    folder = cache_dir()
    if folder is None:
        return "no home and no FLASHMOE_CACHE_DIR"
    error = _env.why_not_writable(folder)
    for path in (folder / f"v{SCHEMA}", *(folder / f"v{SCHEMA}" / f"{n:02x}" for n in range(256))):
        if not error and os.path.lexists(path):  # made by someone else, perhaps
            error = _env.why_not_writable(path)
    return error


def entries() -> list[Stored]:
    """The kernels on disk, oldest first. Damaged ones are left out."""
    found = []
    for json_path in files("*.json"):
        cubin = json_path.with_suffix(".cubin")
        try:
            info = json.loads(json_path.read_bytes())
            size = sum(json_path.with_suffix(s).stat().st_size for s in (".json", ".cubin", ".cu"))
            found.append(Stored(cubin, size, cubin.stat().st_mtime, info))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return sorted(found, key=lambda stored: (stored.written, stored.key))


def files(pattern: str) -> list[Path]:
    """Files of the folder whose names match, ours and those of others."""
    folder = cache_dir()
    if folder is None:
        return []
    try:
        return sorted(folder.glob(f"v{SCHEMA}/[0-9a-f][0-9a-f]/{pattern}"))
    except OSError:
        return []


def stem(folder: Path, key: str) -> Path:
    """The path of a kernel's files without their suffix."""
    return folder / f"v{SCHEMA}" / key[:2] / key


def read(key: str, name: str) -> Entry | None:
    """The kernel of a key, checked; None when it is not there, not readable or damaged. name: for messages."""
    folder = cache_dir()
    if folder is None:
        return None
    base = stem(folder, key)
    path = base.with_suffix(".cubin")
    try:
        info = json.loads(base.with_suffix(".json").read_bytes())
        cubin = path.read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _env.log.info("cannot use the cached %s at %s: %s", name, path, error)
        return None
    if not (
        isinstance(info, dict)
        and info.get("key") == key
        and info.get("size") == len(cubin)
        and cubin.startswith(b"\x7fELF")
        and info.get("sha256") == hashlib.sha256(cubin).hexdigest()
    ):
        _env.log.info("the cached %s at %s is damaged; it is compiled again", name, path)
        return None
    _env.log.debug("%s for %s from %s", name, info.get("arch"), path)
    return Entry(key, cubin, path, info)


def write(key: str, tu: str, cubin: bytes, info: dict[str, Any]) -> Path | None:
    """Write the three files, the cubin last; returns its path, or None after one warning when that is not possible."""
    folder = cache_dir()
    if folder is None:
        _warn(why_not_writable())
        return None
    base = stem(folder, key)
    try:
        write_whole(base.with_suffix(".cu"), tu.encode())
        write_whole(base.with_suffix(".json"), json.dumps(info, indent=1).encode())
        write_whole(base.with_suffix(".cubin"), cubin)
    except OSError as error:
        _warn(f"{folder} cannot be written ({error})")
        return None
    return base.with_suffix(".cubin")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that readers see all of it or nothing; its mode follows umask, so a cache can be shared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    import secrets

    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(6)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Remove a file, if that is possible."""
    with suppress(OSError):
        path.unlink()


def _warn(why: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        _env.log.warning("compiled kernels stay in memory only: %s; FLASHMOE_CACHE_DIR names a folder for them", why)
