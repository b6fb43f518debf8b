"""The kernel cache: folders that cannot be used, environment variables, upkeep."""

from __future__ import annotations

import io
import logging
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cache_kit
import pytest
from cache_kit import TU, Fake, child_env, counts, fresh, get, toy

from flashmoe_cupy import _env
from flashmoe_cupy.errors import CompileError
from flashmoe_cupy.jit import cache, disk

folder, fake = cache_kit.folder, cache_kit.fake  # pytest looks for fixtures among the names of the module


# ---- folders --------------------------------------------------------------------------------------------------------


@contextmanager
def no_rights(tree: Path) -> Iterator[None]:
    """Nobody may write below `tree`, not even root, for whom permissions are no obstacle otherwise."""
    paths = [tree, *tree.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A folder that every user can look into (pytest's own is private)."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_read_only_folder_serves_hits_and_costs_one_warning(
    fake: Fake, open_tmp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(open_tmp / "cache"))
    fresh()
    made = get()
    fresh()
    with no_rights(open_tmp / "cache"):
        assert get() == made
        assert counts() == (0, 1, 0)
        caplog.clear()
        for n in (1, 2):
            new = get(toy(n))
            assert new.path is None
            assert new.cubin.startswith(b"\x7fELF")
            assert get(toy(n)) is new
        assert cache.prune(0) == 0  # harmless where it may not delete, and it does not say otherwise
        assert cache.clear() == 0
    assert made.path is not None
    assert made.path.exists()
    assert fake.count == 3
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "memory only" in warnings[0].getMessage()


def test_a_folder_that_cannot_exist_is_survived(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    fresh()
    assert get().path is None
    assert get().path is None
    assert fake.count == 1
    assert (disk.entries(), cache.prune(0), cache.clear()) == ([], 0, 0)


def test_no_home_is_survived(fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import pwd

    def nobody(uid: int) -> object:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "FLASHMOE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    fresh()
    assert disk.cache_dir() is None
    assert get().path is None
    assert get(toy(2)).path is None
    assert (disk.entries(), cache.prune(0), cache.clear()) == ([], 0, 0)
    assert fake.count == 2
    assert caplog.text.count("memory only") == 1
    assert not Path("~").exists()


def test_the_order_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert disk.cache_dir() == folder
    monkeypatch.delenv("FLASHMOE_CACHE_DIR")
    fresh()
    assert disk.cache_dir() == tmp_path / "xdg" / "flashmoe_cupy"
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", "~/mine")
    fresh()
    assert disk.cache_dir() == tmp_path / "home" / "mine"
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", " ")
    fresh()
    assert disk.cache_dir() == tmp_path / "xdg" / "flashmoe_cupy"
    if sys.platform == "linux":
        for relative in ("", "not/absolute"):
            monkeypatch.setenv("XDG_CACHE_HOME", relative)
            found = disk.cache_dir()
            assert found is not None
            assert found.is_absolute()
            assert "not" not in found.parts
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert disk.cache_dir() == tmp_path / "home" / ".cache" / "flashmoe_cupy"


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
@pytest.mark.usefixtures("fake")
def test_modes_follow_umask(folder: Path, umask: int, file_mode: int, folder_mode: int) -> None:
    before = os.umask(umask)
    try:
        made = get()
    finally:
        os.umask(before)
    assert made.path is not None
    for suffix in (".cubin", ".cu", ".json", ".lock"):
        assert stat.S_IMODE(made.path.with_suffix(suffix).stat().st_mode) == file_mode, suffix
    for place in (folder, folder / "v1", made.path.parent):
        assert stat.S_IMODE(place.stat().st_mode) == folder_mode, place


# ---- variables ------------------------------------------------------------------------------------------------------


def test_jit_0_loads_and_never_compiles(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = get()
    monkeypatch.setenv("FLASHMOE_JIT", "0")
    fresh()
    assert get() == made
    with pytest.raises(CompileError) as caught:
        get(toy(2), arch="sm_90a", name="toy d2")
    text = str(caught.value)
    assert "FLASHMOE_JIT=1 python -m flashmoe_cupy warmup --arch sm_90a" in text
    assert "toy d2 for sm_90a" in text
    assert str(folder) in text
    assert fake.count == 1


def test_dump_gets_every_compile(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_DUMP", str(tmp_path / "dump"))
    fresh()
    made = get(name="toy d/64 <x>")
    stem = tmp_path / "dump" / f"toy_d_64_x_.sm_80.{made.key[:12]}"
    assert stem.with_name(stem.name + ".cu").read_text() == TU
    assert stem.with_name(stem.name + ".ptx").read_text() == "the ptx"
    assert stem.with_name(stem.name + ".cubin").read_bytes() == made.cubin
    assert stem.with_name(stem.name + ".log").read_text() == "the log"
    assert len(list((tmp_path / "dump").iterdir())) == 4
    fake.log = "line 1: error"
    with pytest.raises(CompileError) as caught:
        get(toy(2))
    assert caught.value.log == "line 1: error"
    assert caught.value.source_path is not None
    assert Path(caught.value.source_path).read_text() == toy(2)
    assert Path(caught.value.source_path).with_suffix(".log").read_text() == "line 1: error"


def test_a_dump_folder_that_cannot_be_written_is_survived(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    del fake
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHMOE_DUMP", str(tmp_path / "file" / "dump"))
    fresh()
    assert get().path is not None
    assert "cannot be written" in caplog.text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_slow_compile_tells_a_terminal(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "NOTICE_AFTER", 0.05)
    terminal, file = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    get(toy(1))
    assert terminal.getvalue() == ""
    fake.seconds = 0.2
    get(toy(2), name="toy d2")
    assert terminal.getvalue() == "flashmoe_cupy: compiling toy d2 for sm_80 ... (cached for next time)\n"
    for stream in (file, None):
        monkeypatch.setattr(sys, "stderr", stream)
        get(toy(3 if stream else 4))
    assert file.getvalue() == ""


def test_log_lines(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    del fake
    caplog.set_level(logging.DEBUG, "flashmoe_cupy")
    get()
    fresh()
    get()
    levels = [(record.name, record.levelname) for record in caplog.records]
    assert levels == [("flashmoe_cupy", "INFO"), ("flashmoe_cupy", "DEBUG")]
    assert "compiled toy for sm_80 in 2 ms: 32 registers, 0 bytes spilled" in caplog.text


def test_variables_are_parsed_with_clear_errors() -> None:
    assert _env.parse({}) == _env.Env()
    assert _env.parse({"FLASHMOE_JIT": "off", "FLASHMOE_CHECK": " Yes ", "FLASHMOE_LOG": "DEBUG"}) == _env.Env(
        jit=False, check=True, log="debug"
    )
    assert _env.parse({"FLASHMOE_ARCH": "SM_90a", "FLASHMOE_DUMP": "/t"}) == _env.Env(
        arch="sm_90a", dump=Path("/t")
    )
    for name, value in (("JIT", "2"), ("LOG", "loud"), ("ARCH", "hopper"), ("LINEINFO", "maybe")):
        with pytest.raises(ValueError, match=f"FLASHMOE_{name}="):
            _env.parse({f"FLASHMOE_{name}": value})
    assert len(_env.VARIABLES) == len(_env.Env._fields)
    assert [name.removeprefix("FLASHMOE_").lower() for name in _env.VARIABLES] == list(_env.Env._fields)
    for name in _env.VARIABLES:
        assert f"| {name} " in (_env.__doc__ or "")


@pytest.mark.parametrize(("level", "shown"), [("warning", 1), ("info", 2), ("debug", 3)])
def test_the_log_variable_shows_lines_on_stderr(level: str, shown: int, tmp_path: Path) -> None:
    code = "from flashmoe_cupy import _env; _env.get(); _env.log.warning('w'); _env.log.info('i'); _env.log.debug('d')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**child_env(tmp_path), "FLASHMOE_LOG": level},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stderr.splitlines()) == shown


# ---- upkeep ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
def test_entries_prune_and_clear(folder: Path) -> None:
    made = [get(toy(n), name=f"toy {n}") for n in range(4)]
    for age, entry in zip((40, 10, 30, 20), made, strict=True):
        assert entry.path is not None
        os.utime(entry.path, (time.time() - age,) * 2)
    stored = disk.entries()
    assert [entry.name for entry in stored] == ["toy 0", "toy 2", "toy 3", "toy 1"]
    one = stored[0]
    assert one.size == sum(one.path.with_suffix(suffix).stat().st_size for suffix in (".cubin", ".cu", ".json"))
    assert (one.key, one.arch, one.info) == (made[0].key, "sm_80", made[0].info)

    total = sum(entry.size for entry in stored)
    assert cache.prune(total) == 0
    assert cache.prune(total - 1) == 1
    assert [entry.name for entry in disk.entries()] == ["toy 2", "toy 3", "toy 1"]
    assert not list(folder.rglob(f"{made[0].key}.*"))
    assert cache.prune(stored[3].size) == 2
    assert [entry.name for entry in disk.entries()] == ["toy 1"]
    with pytest.raises(ValueError, match="max_bytes"):
        cache.prune(-1)

    strangers = [folder / "notes.txt", folder / "v1" / "mine.cubin", (made[1].path or folder).parent / "readme"]
    for path in strangers:
        path.write_text("")
    assert cache.clear() == 1
    assert disk.entries() == []
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(strangers)
    get(toy(1))
    assert cache.stats().compiled == 5  # memory was forgotten too


@pytest.mark.usefixtures("fake")
def test_prune_removes_what_a_killed_process_left() -> None:
    made = get()
    assert made.path is not None
    old, new = made.path.with_name(f"{made.key}.0123.tmp"), made.path.with_name(f"{made.key}.4567.tmp")
    orphan = made.path.with_name("0" * 64 + ".cu")
    for path in (old, new, orphan):
        path.write_text("half")
    for path in (old, orphan, made.path.with_suffix(".lock")):
        os.utime(path, (time.time() - 7200,) * 2)
    assert cache.prune(10**9) == 0
    assert not old.exists()
    assert not orphan.exists()
    assert new.exists()  # perhaps being written right now
    assert made.path.with_suffix(".lock").exists()
    assert len(disk.entries()) == 1


@pytest.mark.usefixtures("fake")
def test_damaged_kernels_are_not_listed() -> None:
    for n in range(3):
        get(toy(n))
    paths = [stored.path for stored in disk.entries()]
    paths[0].with_suffix(".json").write_text("{")
    paths[1].unlink()
    assert [stored.path for stored in disk.entries()] == [paths[2]]
    assert cache.clear() == 2
