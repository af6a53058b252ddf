"""The directory store: each content is stored once, completely or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobledger.ledger.domain.errors import ConfigurationError, FileLost
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.file_store import ORPHAN_AGE_SECONDS
from jobledger.ledger.files.local_files import READ_CHUNK_BYTES


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    store = DirectoryStore(tmp_path / "deep" / "store")
    store.prepare()
    return store


def list_files(store: DirectoryStore) -> list[Path]:
    return sorted(path for path in store.root.rglob("*") if path.is_file())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_put_bytes_stores_content_under_digest(store: DirectoryStore, content: bytes) -> None:
    stored = store.put_bytes(content)
    assert stored == (sha256(content), len(content))
    assert store.get_path(stored.sha256).read_bytes() == content


def test_same_content_is_stored_once(store: DirectoryStore, tmp_path: Path) -> None:
    first = store.put_bytes(b"hello")
    before = store.get_path(first.sha256).stat()
    other = tmp_path / "other"
    other.write_bytes(b"hello")
    assert store.put_bytes(b"hello") == store.put_file(other) == first
    assert list_files(store) == [store.get_path(first.sha256)]
    after = store.get_path(first.sha256).stat()
    assert after.st_ino == before.st_ino
    assert after.st_mtime_ns >= before.st_mtime_ns, "a save updates the time: see FileStore.begin_removal"


def test_put_file_moves_file_into_store(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_bytes(b"# A talk")
    stored = store.put_file(path)
    assert not path.exists()
    assert store.get_path(stored.sha256).read_bytes() == b"# A talk"


def test_stored_file_has_mode_0600(store: DirectoryStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"1")
    secret.chmod(0o600)
    for stored in (store.put_file(secret), store.put_bytes(b"2")):
        assert stat.S_IMODE(store.get_path(stored.sha256).stat().st_mode) == 0o600


def test_put_file_of_stored_file_keeps_it(store: DirectoryStore) -> None:
    stored = store.put_bytes(b"hello")
    assert store.put_file(store.get_path(stored.sha256)) == stored
    assert store.get_path(stored.sha256).read_bytes() == b"hello"


def test_put_file_of_link_stores_target_content(store: DirectoryStore, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"hello")
    link.symlink_to(target)
    stored = store.put_file(link)
    target.write_bytes(b"changed")
    assert store.get_path(stored.sha256).read_bytes() == b"hello"
    assert not store.get_path(stored.sha256).is_symlink()


def test_concurrent_puts_store_each_content_once(store: DirectoryStore) -> None:
    contents = [bytes([number % 5]) * 100_000 for number in range(60)]
    with ThreadPoolExecutor(12) as pool:
        stored = list(pool.map(store.put_bytes, contents))
    assert [stored_file.sha256 for stored_file in stored] == [sha256(content) for content in contents]
    assert len(list_files(store)) == 5
    assert all(sha256(path.read_bytes()) == path.name for path in list_files(store))


def fail_moves_across_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every move into the store fail as it does between file systems."""
    real = Path.replace

    def replace(self: Path, target: Any) -> Path:
        if self.parent not in (Path(target).parent, Path(target).parent.parent):  # the store may move its own copies
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)


def test_put_file_across_file_systems_copies_and_removes(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_moves_across_file_systems(monkeypatch)
    path = tmp_path / "big"
    path.write_bytes(b"x" * 3_000_000)
    stored = store.put_file(path)
    assert not path.exists()
    assert store.get_path(stored.sha256).read_bytes() == b"x" * 3_000_000
    assert list_files(store) == [store.get_path(stored.sha256)]
    assert stat.S_IMODE(store.get_path(stored.sha256).stat().st_mode) == 0o600


@pytest.mark.skipif(
    not os.access("/dev/shm", os.W_OK), reason="needs a second file system: mount -t tmpfs tmpfs /dev/shm"
)
def test_put_file_from_dev_shm_moves_file(store: DirectoryStore) -> None:
    path = Path("/dev/shm") / f"jobledger-{os.getpid()}"
    path.write_bytes(b"elsewhere")
    try:
        stored = store.put_file(path)
        assert not path.exists()
        assert store.get_path(stored.sha256).read_bytes() == b"elsewhere"
    finally:
        path.unlink(missing_ok=True)


class PowerCut(BaseException):
    """Stands for the end of the process. The code under test cannot catch it as an `Exception`."""


@pytest.mark.parametrize("across_file_systems", [False, True], ids=["same file system", "another file system"])
@pytest.mark.parametrize("cut_step", range(12))
def test_power_cut_leaves_complete_file_or_none(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, across_file_systems: bool, cut_step: int
) -> None:
    if across_file_systems:
        fail_moves_across_file_systems(monkeypatch)
    content = b"y" * 2_500_000
    path = tmp_path / "file"
    path.write_bytes(content)
    steps = iter(range(100))

    def wrap_with_power_cut(real: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == cut_step:
                raise PowerCut
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", wrap_with_power_cut(os.fsync))
        for name in ("replace", "chmod", "mkdir", "unlink"):
            patched.setattr(Path, name, wrap_with_power_cut(getattr(Path, name)))
        with suppress(PowerCut):
            store.put_file(path)
    stored_path = store.get_path(sha256(content))
    assert not stored_path.exists() or stored_path.read_bytes() == content
    assert stored_path.exists() or path.exists()
    second_path = tmp_path / "again"
    second_path.write_bytes(content)
    store.put_file(second_path)
    assert stored_path.read_bytes() == content
    assert stat.S_IMODE(stored_path.stat().st_mode) == 0o600


def test_full_disk_leaves_no_file(store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_disk_full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", raise_disk_full)
    fail_moves_across_file_systems(monkeypatch)
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    with pytest.raises(OSError, match="No space"):
        store.put_file(path)
    with pytest.raises(OSError, match="No space"):
        store.put_bytes(b"hello")
    assert list_files(store) == []
    assert path.read_bytes() == b"hello"


def test_put_bytes_syncs_file_and_directories(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, list[str]()

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    stored_path = store.get_path(store.put_bytes(b"hello").sha256)
    content, *directories = synced
    assert Path(content).parent == store.root
    assert set(directories) == {str(store.root), str(stored_path.parent)}
    assert directories[-1] == str(stored_path.parent)


@pytest.mark.parametrize("name", ["", "abc", "../" * 21 + "x", "A" * 64, "0" * 63 + "\n", "0" * 65])
def test_path_of_invalid_digest_raises(store: DirectoryStore, name: str) -> None:
    with pytest.raises(ValueError, match="not a SHA-256"):
        store.get_path(name)


def test_prepare_error_names_path_and_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ConfigurationError, match=r"results\.store: .*file"):
        DirectoryStore(tmp_path / "file" / "store").prepare()
    with pytest.raises(ConfigurationError, match=r"results\.store"):
        DirectoryStore(Path("/proc/store")).prepare()


def test_second_prepare_keeps_files(store: DirectoryStore) -> None:
    stored = store.put_bytes(b"hello")
    store.prepare()
    assert list_files(store) == [store.get_path(stored.sha256)]


def test_put_bytes_replaces_link_at_path(store: DirectoryStore, tmp_path: Path) -> None:
    stored_path = store.get_path(sha256(b"hello"))
    stored_path.parent.mkdir()
    (tmp_path / "elsewhere").write_bytes(b"something else")
    stored_path.symlink_to(tmp_path / "elsewhere")
    store.put_bytes(b"hello")
    assert not stored_path.is_symlink()
    assert stored_path.read_bytes() == b"hello"
    assert (tmp_path / "elsewhere").read_bytes() == b"something else"


async def test_read_returns_range_in_chunks(store: DirectoryStore) -> None:
    content = os.urandom(3 * READ_CHUNK_BYTES + 5)
    file = await store.open(*store.put_bytes(content))
    chunks = [chunk async for chunk in file.read(7, file.size - 1)]
    await file.close()
    assert b"".join(chunks) == content[7:-1]
    assert max(map(len, chunks)) == READ_CHUNK_BYTES


async def test_open_missing_file_raises_file_lost(store: DirectoryStore) -> None:
    with pytest.raises(FileLost):
        await store.open("0" * 64, 1)
    with pytest.raises(ValueError, match="not a SHA-256"):
        await store.open("../../etc/passwd", 1)


async def test_remove_orphans_removes_old_temporary_files_only(store: DirectoryStore) -> None:
    kept = store.put_bytes(b"kept")
    names = ("tmpabcd_123", "tmpabcd_124", "tmp-notes", "tmpdir_0000")
    old, fresh, foreign, directory = (store.root / name for name in names)
    for path in (old, fresh, foreign):
        path.write_bytes(b"unfinished")
    directory.mkdir()
    link = store.root / "tmplink_000"
    link.symlink_to(store.get_path(kept.sha256))
    long_ago = time.time() - ORPHAN_AGE_SECONDS - 60
    for path in (old, foreign, directory, store.get_path(kept.sha256)):
        os.utime(path, (long_ago, long_ago))
    assert await store.remove_orphans() == 1
    assert not old.exists()
    assert all(path.exists() for path in (fresh, foreign, directory, link, store.get_path(kept.sha256)))
