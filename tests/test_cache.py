"""The kernel cache: what the key covers, one compile for many askers, damaged files."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cache_kit
import pytest
from cache_kit import HEADERS, TU, Fake, child_env, counts, fresh, get, key, toy

from flashmoe_cupy import _env
from flashmoe_cupy.errors import CompileError
from flashmoe_cupy.jit import cache, compiler, disk, source

folder, fake = cache_kit.folder, cache_kit.fake  # pytest looks for fixtures among the names of the module


# ---- the key --------------------------------------------------------------------------------------------------------


def test_each_input_changes_the_key() -> None:
    last = HEADERS["toy/params.cuh"]
    changed = [
        key(),
        key(tu=TU + " "),
        key(tu=toy(65)),
        key(headers={**HEADERS, "toy/params.cuh": last[:-2] + ";" + last[-1:]}),  # one byte of one header
        key(headers={**HEADERS, "toy/params.cuh": last + "\n"}),
        key(headers={**HEADERS, "more.cuh": ""}),
        key(headers={"toy/kernel.cuh": HEADERS["toy/kernel.cuh"], "toy/param.cuh": last}),
        key(arch="sm_90"),
        key(arch="sm_90a"),
        key(nvrtc=(12, 8)),
        key(nvrtc=(13, 9)),
        key(options=(*compiler.OPTIONS, "-lineinfo")),
        key(options=tuple(reversed(compiler.OPTIONS))),
        *(key(options=compiler.OPTIONS[:i] + compiler.OPTIONS[i + 1 :]) for i in range(len(compiler.OPTIONS))),
    ]
    assert len(set(changed)) == len(changed)


def test_bytes_cannot_move_between_parts() -> None:
    pairs = [
        (key(headers={"ab": "c"}), key(headers={"a": "bc"})),
        (key(headers={"a": "b", "c": "d"}), key(headers={"a": "bcd"})),
        (key(options=("-a", "-b")), key(options=("-a-b",))),
        (key(options=("-a",), headers={"x": "y"}), key(options=("-a", "x", "y"), headers={})),
        (key(arch="sm_80", tu="x"), key(arch="sm_8", tu="0x")),
        (key(nvrtc=(1, 21)), key(nvrtc=(12, 1))),
    ]
    for one, other in pairs:
        assert one != other


def test_the_key_is_written_down() -> None:
    # Changing it throws away every user's cache: raise SCHEMA and this number together, and on purpose.
    assert disk.SCHEMA == 1
    expected = hashlib.sha256()
    for part in ("1", "12.9", "sm_80", "2", "-x", "-y", "source", "a.cuh", "A", "b.cuh", "B"):
        expected.update(len(part).to_bytes(8, "little") + part.encode())
    assert key("source", {"b.cuh": "B", "a.cuh": "A"}, options=("-x", "-y")) == expected.hexdigest()


def test_the_key_is_the_same_in_other_processes_and_folders(tmp_path: Path) -> None:
    code = (
        "from flashmoe_cupy.jit import cache, compiler\n"
        f"print(cache.cache_key({TU!r}, {dict(reversed(HEADERS.items()))!r}, 'sm_80', compiler.OPTIONS, (12, 9)))"
    )
    for seed, place in (("1", tmp_path), ("2", Path.cwd())):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**child_env(tmp_path), "PYTHONHASHSEED": seed},
            cwd=place,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == key()


def test_lineinfo_is_part_of_the_key(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = get()
    monkeypatch.setenv("FLASHMOE_LINEINFO", "1")
    _env.reload()
    assert "-lineinfo" in cache.options()
    assert get().key != plain.key
    assert fake.count == 2


# ---- memory, disk, compiler -----------------------------------------------------------------------------------------


def test_memory_then_disk_then_compiler(fake: Fake, folder: Path) -> None:
    made = get()
    assert made.path is not None
    assert made.path == folder / "v1" / made.key[:2] / f"{made.key}.cubin"
    assert made.path.read_bytes() == made.cubin
    assert made.path.with_suffix(".cu").read_text() == TU
    assert json.loads(made.path.with_suffix(".json").read_text()) == made.info
    assert made.info["name"] == "toy"
    assert made.info["arch"] == "sm_80"
    assert made.info["registers"] == 32
    assert counts() == (0, 0, 1)
    assert get() is made
    assert counts() == (1, 0, 1)
    fresh()
    assert get() == made
    assert counts() == (0, 1, 0)
    assert get(arch="sm_90a").key != made.key
    assert fake.count == 2
    assert not list(folder.rglob("*.tmp"))


def test_headers_come_from_cuda_src_unless_given(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    del fake
    asked = []

    def headers_for(tu: str) -> dict[str, str]:
        asked.append(tu)
        return HEADERS

    monkeypatch.setattr(source, "headers_for", headers_for)
    first = cache.get(TU, "toy", "sm_80")
    assert first == get()
    assert cache.get(TU, "toy", "sm_80") is first
    assert asked == [TU]  # the third call hashed no header
    assert counts() == (2, 0, 1)


def test_nothing_is_made_before_the_first_write(fake: Fake, folder: Path) -> None:
    assert (disk.entries(), cache.clear(), cache.prune(0)) == ([], 0, 0)
    assert disk.cache_dir() == folder
    assert not folder.exists()
    fake.log = "no"
    with pytest.raises(CompileError):
        get()
    fake.log = ""
    get()
    assert folder.exists()


@pytest.mark.usefixtures("fake")
@pytest.mark.alone
def test_a_disk_hit_is_fast() -> None:
    kernels = [toy(n) for n in range(20)]
    for tu in kernels:
        get(tu)
    fresh()
    times = []
    for tu in kernels:
        start = time.perf_counter()
        get(tu)
        times.append(time.perf_counter() - start)
    assert counts() == (0, 20, 0)
    assert statistics.median(times) < 0.030


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cubin truncated": lambda cubin: os.truncate(cubin, cubin.stat().st_size // 2),
    "cubin empty": lambda cubin: os.truncate(cubin, 0),
    "cubin one byte wrong": lambda cubin: cubin.write_bytes(cubin.read_bytes()[:-1] + b"!"),
    "cubin longer": lambda cubin: cubin.write_bytes(cubin.read_bytes() + b"!"),
    "cubin gone": lambda cubin: cubin.unlink(),
    "cubin is a folder": lambda cubin: folder_instead(cubin),
    "json truncated": lambda cubin: os.truncate(cubin.with_suffix(".json"), 40),
    "json empty": lambda cubin: os.truncate(cubin.with_suffix(".json"), 0),
    "json a list": lambda cubin: cubin.with_suffix(".json").write_text("[]"),
    "json not text": lambda cubin: cubin.with_suffix(".json").write_bytes(b"\xff\xfe\x00"),
    "json gone": lambda cubin: cubin.with_suffix(".json").unlink(),
    "json of another key": lambda cubin: rewrite(cubin, cubin.read_bytes(), key="0" * 64),
    "not ELF, with matching json": lambda cubin: rewrite(cubin, b"<html>" + cubin.read_bytes()[6:]),
    "empty, with matching json": lambda cubin: rewrite(cubin, b""),
}


def folder_instead(cubin: Path) -> None:
    cubin.unlink()
    cubin.mkdir()


def rewrite(cubin: Path, data: bytes, **changed: object) -> None:
    info = json.loads(cubin.with_suffix(".json").read_text())
    info.update(size=len(data), sha256=hashlib.sha256(data).hexdigest(), **changed)
    cubin.write_bytes(data)
    cubin.with_suffix(".json").write_text(json.dumps(info))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_kernel_is_a_miss_and_is_repaired(fake: Fake, damage: str) -> None:
    made = get()
    assert made.path is not None
    DAMAGE[damage](made.path)
    fresh()
    again = get()
    assert again.cubin == made.cubin
    assert (fake.count, counts()) == (2, (0, 0, 1))
    if damage == "cubin is a folder":
        assert again.path is None  # the file cannot be written; the kernel is there all the same
        return
    fresh()
    assert get() == again
    assert counts() == (0, 1, 0)


# ---- many askers ----------------------------------------------------------------------------------------------------


def test_eight_threads_compile_once(fake: Fake) -> None:
    fake.seconds = 0.2
    gate = threading.Barrier(8)
    got: list[cache.Entry] = []

    def ask() -> None:
        gate.wait()
        got.append(get())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.count == 1
    assert len(got) == 8
    assert all(entry is got[0] for entry in got)
    assert counts() == (7, 0, 1)


@pytest.mark.alone
def test_different_kernels_do_not_wait_for_each_other(fake: Fake) -> None:
    fake.seconds = 0.3
    threads = [threading.Thread(target=get, args=(toy(n),)) for n in range(4)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.count == 4
    assert time.perf_counter() - start < 0.9  # 1.2 s one after the other


def test_a_failed_compile_is_tried_again(fake: Fake) -> None:
    fake.log = "error"
    for _ in range(2):
        with pytest.raises(CompileError, match="FLASHMOE_DUMP"):
            get()
    fake.log = ""
    get()
    assert fake.count == 3


RACE = f"""
import json, os, sys, time
from flashmoe_cupy.jit import cache, compiler
compiler.nvrtc_version()
open(sys.argv[1] + f"/ready.{{os.getpid()}}", "w").close()
while not os.path.exists(sys.argv[1] + "/go"):
    time.sleep(0.01)
entry = cache.get({TU!r}, "toy", "sm_90a", {HEADERS!r})
print(json.dumps([entry.key, str(entry.path), *list(vars(cache.stats()).values())[:3]]))
"""


@pytest.mark.compile
def test_eight_processes_compile_once(folder: Path, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    starts.mkdir()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(starts)],
            env=child_env(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    end = time.monotonic() + 100
    while len(list(starts.iterdir())) < 8 and time.monotonic() < end and all(c.poll() is None for c in children):
        time.sleep(0.05)
    (starts / "go").touch()
    results = []
    for child in children:
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        results.append(json.loads(out))
    assert len({result[0] for result in results}) == 1
    assert sum(result[4] for result in results) == 1, results
    assert sum(result[3] for result in results) == 7, results
    (stored,) = disk.entries()
    assert str(stored.path) == results[0][1]
    assert stored.info["nvrtc"] == ".".join(map(str, compiler.nvrtc_version()))
    # this process is the ninth: the real bytes, from disk, equal to what it would compile itself
    assert cache.get(TU, "toy", "sm_90a", HEADERS).cubin == compiler.compile_cubin(TU, HEADERS, "sm_90a").cubin
    assert counts() == (0, 1, 0)


@contextmanager
def lock_held_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    code = (
        "import filelock, sys, time\n"
        "lock = filelock.FileLock(sys.argv[1]); lock.acquire()\n"
        "print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def lock_path(folder: Path) -> Path:
    return disk.stem(folder, key(options=cache.options())).with_suffix(".lock")


@pytest.mark.alone
def test_a_dead_process_does_not_keep_the_lock(fake: Fake, folder: Path) -> None:
    path = lock_path(folder)
    with lock_held_elsewhere(path) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert path.exists()
    start = time.perf_counter()
    assert get().path is not None
    assert time.perf_counter() - start < 5
    assert fake.count == 1


def test_a_lock_that_stays_held_costs_a_timeout_only(
    fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "LOCK_TIMEOUT", 0.3)
    with lock_held_elsewhere(lock_path(folder)):
        made = get()
    assert made.path is not None
    assert made.path.exists()
    assert fake.count == 1
    assert "compiling toy without it" in caplog.text


def test_what_the_lock_holder_wrote_is_used(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lock_path(folder)
    made = get()
    assert lock_path(folder) == path == (made.path or Path()).with_suffix(".lock")
    real, looks = cache._from_disk, []

    def late(key: str, name: str) -> cache.Entry | None:
        looks.append(key)
        return real(key, name) if len(looks) > 1 else None  # the other process finishes after our first look

    fresh()
    monkeypatch.setattr(cache, "_from_disk", late)
    assert get() == made
    assert (fake.count, counts()) == (1, (0, 1, 0))
