"""Compiled kernels in memory and on disk: each one is compiled once per machine, whoever asks first.

What `get` does: dict -> file, checked -> lock between processes -> file once more -> compile -> write -> dict.
The key is a hash of everything that decides the cubin, and of nothing else: no path, no time, no package version.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flashmoe_cupy import _env
from flashmoe_cupy.errors import CompileError
from flashmoe_cupy.jit import compiler, disk, source
from flashmoe_cupy.jit.disk import Entry as Entry  # what `get` returns

LOCK_TIMEOUT = 120.0  # seconds that a process waits for another one's compile before it compiles for itself
LEFT_BEHIND_AFTER = 3600  # seconds after which a file that belongs to no kernel is a killed process's
NOTICE_AFTER = 0.5  # seconds of compiling before a terminal gets one line
WARMUP = "FLASHMOE_JIT=1 python -m flashmoe_cupy warmup --arch {arch}"

_log = _env.log


class Stats:
    """Counts of this process: kernels found in memory, found on disk, compiled; milliseconds in the compiler."""

    def __init__(
        self, hits_memory: int = 0, hits_disk: int = 0, compiled: int = 0, milliseconds: float = 0.0
    ) -> None:  # fmt: skip
        self.hits_memory, self.hits_disk = hits_memory, hits_disk
        self.compiled, self.milliseconds = compiled, milliseconds


_guard = threading.Lock()  # for the four names below
_memory: dict[str, Entry] = {}  # by key
_keys: dict[tuple[str, str, tuple[str, ...]], str] = {}  # by (tu, arch, options): no header is hashed again
_busy: dict[str, threading.Lock] = {}  # by key: held by the thread that looks on the disk or compiles
_stats = Stats()


def cache_key(tu: str, headers: Mapping[str, str], arch: str, options: Sequence[str], nvrtc: tuple[int, int]) -> str:
    """SHA-256 (hex) over length-prefixed parts: schema, NVRTC version, arch, ordered options, TU, sorted headers."""
    parts = [str(disk.SCHEMA), f"{nvrtc[0]}.{nvrtc[1]}", arch, str(len(options)), *options, tu]
    for name in sorted(headers):
        parts += [name, headers[name]]
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def options() -> tuple[str, ...]:
    """The compiler's options in this process: compiler.OPTIONS, and -lineinfo under FLASHMOE_LINEINFO=1."""
    return (*compiler.OPTIONS, "-lineinfo") if _env.get().lineinfo else compiler.OPTIONS


def get(tu: str, name: str, arch: str, headers: Mapping[str, str] | None = None) -> Entry:
    """The kernel of one TU for one arch, from memory, from disk or from the compiler.

    name: the configuration's name, for messages and the sidecar; not part of the key.
    headers: include name -> text; None = from `cuda_src` (source.headers_for).
    Threads and processes that ask for the same key at the same time compile it once.
    Raises CompileError (does not compile, or FLASHMOE_JIT=0 and not in the cache) and DependencyError.
    """
    chosen = options()
    known = (tu, arch, chosen)
    if headers is None:
        entry = _memory.get(_keys.get(known, ""))
        if entry is not None:
            _count(hits_memory=1)
            return entry
    texts = source.headers_for(tu) if headers is None else headers
    key = cache_key(tu, texts, arch, chosen, compiler.nvrtc_version())
    with _guard:
        busy = _busy.setdefault(key, threading.Lock())
    with busy:
        entry = _memory.get(key)
        if entry is not None:
            _count(hits_memory=1)
        else:
            entry = _from_disk(key, name) or _make(key, tu, texts, name, arch, chosen)
            with _guard:
                _memory[key] = entry
        if headers is None:
            with _guard:
                _keys[known] = key
    return entry


def stats() -> Stats:
    """Counts of this process since it started."""
    return _stats


def clear() -> int:
    """Forget every kernel, in memory and on disk; returns how many went from the disk. Loaded kernels keep running."""
    _forget()
    count = len(disk.files("*.cubin"))
    for path in disk.files("*"):
        if path.suffix in disk.SUFFIXES:
            disk.remove(path)
    return count - len(disk.files("*.cubin"))


def prune(max_bytes: int) -> int:
    """Remove the oldest kernels on disk until the rest takes at most `max_bytes`; returns how many went.

    Also removes what a killed process left behind: temporary files and sources without a kernel, older than an hour.
    """
    if max_bytes < 0:
        raise ValueError(f"max_bytes must be 0 or more, got {max_bytes}")
    kept = disk.entries()
    whole = {stored.key for stored in kept}
    for path in disk.files("*"):
        with suppress(OSError):
            alone = path.suffix in disk.SUFFIXES and path.stem not in whole
            if alone and time.time() - path.stat().st_mtime > LEFT_BEHIND_AFTER:
                path.unlink()
    total = sum(stored.size for stored in kept)
    removed = 0
    for stored in kept:
        if total <= max_bytes:
            break
        for suffix in (".cubin", ".json", ".cu", ".lock"):
            disk.remove(stored.path.with_suffix(suffix))
        if os.path.lexists(stored.path):  # someone else's
            continue
        with _guard:
            _memory.pop(stored.key, None)
        total -= stored.size
        removed += 1
    return removed


# ---- compiling ------------------------------------------------------------------------------------------------------


def _from_disk(key: str, name: str) -> Entry | None:
    """The kernel of a key from the disk, counted as a hit; None where there is no sound one."""
    entry = disk.read(key, name)
    if entry is not None:
        _count(hits_disk=1)
    return entry


def _make(key: str, tu: str, headers: Mapping[str, str], name: str, arch: str, chosen: tuple[str, ...]) -> Entry:
    if not _env.get().jit:
        raise CompileError(
            f"{name} for {arch} is not in the kernel cache ({disk.cache_dir() or 'no folder'}) and FLASHMOE_JIT=0 "
            f"forbids compiling; run `{WARMUP.format(arch=arch)}` with the same FLASHMOE_CACHE_DIR first"
        )
    with _between_processes(key, name) as made:
        return made or _compile(key, tu, headers, name, arch, chosen)


@contextmanager
def _between_processes(key: str, name: str) -> Iterator[Entry | None]:
    """Hold the key's lock file; yields what another process has written meanwhile, else None = compile now.

    No lock to be had (read-only folder, file system without locks, timeout) also means compile now: the work may be
    done twice, the result is the same.
    """
    folder = disk.cache_dir()
    if folder is None:
        yield None
        return
    import filelock  # 30 ms; only a process that compiles needs it

    path = disk.stem(folder, key).with_suffix(".lock")
    lock = filelock.FileLock(path)
    made: Entry | None = None
    held = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))  # made here, so that its mode follows umask
        deadline = time.monotonic() + LOCK_TIMEOUT
        while not held and made is None and (left := deadline - time.monotonic()) > 0:
            # The file is looked for between two tries: a lock can stay held after the kernel was written.
            with suppress(filelock.Timeout):
                lock.acquire(timeout=min(2.0, left), poll_interval=0.02)
                held = True
            made = _from_disk(key, name)
        if not held and made is None:
            _log.warning("waited %.0f s for %s; compiling %s without it", LOCK_TIMEOUT, path, name)
    except (OSError, RuntimeError) as error:
        _log.debug("no lock at %s: %s", path, error)
    try:
        yield made
    finally:
        if held:
            with suppress(OSError):
                lock.release()


def _compile(key: str, tu: str, headers: Mapping[str, str], name: str, arch: str, chosen: tuple[str, ...]) -> Entry:
    with _notice(name, arch):
        try:
            made = compiler.compile_cubin(tu, headers, arch, chosen, name)
        except CompileError as error:
            path = _dump(key, name, arch, {"cu": tu.encode(), "log": error.log.encode()})
            hint = "" if path else "; set FLASHMOE_DUMP to a folder to keep its source"
            raise CompileError(error.message + hint, error.log, str(path) if path else None) from None
    _count(compiled=1, milliseconds=made.milliseconds)
    _log.info(
        "compiled %s for %s in %.0f ms: %d registers, %d bytes spilled",
        name, arch, made.milliseconds, made.registers, made.spill_stores + made.spill_loads,
    )  # fmt: skip
    _dump(key, name, arch, {"cu": tu.encode(), "ptx": made.ptx.encode(), "cubin": made.cubin, "log": made.log.encode()})
    info: dict[str, Any] = {
        "key": key,
        "name": name,
        "arch": arch,
        "nvrtc": ".".join(map(str, compiler.nvrtc_version())),
        "options": list(chosen),
        "size": len(made.cubin),
        "sha256": hashlib.sha256(made.cubin).hexdigest(),
        "registers": made.registers,
        "spill_stores": made.spill_stores,
        "spill_loads": made.spill_loads,
        "stack": made.stack,
        "static_smem": made.static_smem,
        "milliseconds": round(made.milliseconds, 1),
        "remarks": list(made.remarks),
        "log": made.log,
    }
    return Entry(key, made.cubin, disk.write(key, tu, made.cubin, info), info)


@contextmanager
def _notice(name: str, arch: str) -> Iterator[None]:
    """After half a second, one line for a person who waits at a terminal."""
    stream = sys.stderr
    if stream is None or not stream.isatty():
        yield
        return

    def tell() -> None:
        with suppress(OSError, ValueError):
            stream.write(f"flashmoe_cupy: compiling {name} for {arch} ... (cached for next time)\n")
            stream.flush()

    timer = threading.Timer(NOTICE_AFTER, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _dump(key: str, name: str, arch: str, files: Mapping[str, bytes]) -> Path | None:
    """Write a compile's files into FLASHMOE_DUMP; returns the source's path. Never stops the compile."""
    folder = _env.get().dump
    if folder is None:
        return None
    stem = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:80]}.{arch}.{key[:12]}"
    try:
        for suffix, data in files.items():
            disk.write_whole(folder.absolute() / f"{stem}.{suffix}", data)
    except OSError as error:
        _log.warning("FLASHMOE_DUMP=%s cannot be written: %s", folder, error)
        return None
    return folder.absolute() / f"{stem}.cu"


def _count(hits_memory: int = 0, hits_disk: int = 0, compiled: int = 0, milliseconds: float = 0.0) -> None:
    global _stats
    with _guard:
        a = _stats
        _stats = Stats(
            a.hits_memory + hits_memory, a.hits_disk + hits_disk, a.compiled + compiled, a.milliseconds + milliseconds
        )


def _forget() -> None:
    """Drop what this process remembers, so that the next `get` looks at the disk."""
    with _guard:
        _memory.clear()
        _keys.clear()
