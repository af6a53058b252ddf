"""Result files: whole or not there, once for each content, whoever stores them when."""

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


def files_in(store: DirectoryStore) -> list[Path]:
    return sorted(path for path in store.root.rglob("*") if path.is_file())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_what_is_stored_is_found_under_its_digest(store: DirectoryStore, content: bytes) -> None:
    stored = store.put_bytes(content)
    assert stored == (sha256(content), len(content))
    assert store.path(stored.sha256).read_bytes() == content


def test_the_same_content_is_stored_once(store: DirectoryStore, tmp_path: Path) -> None:
    first = store.put_bytes(b"hello")
    before = store.path(first.sha256).stat()
    other = tmp_path / "other"
    other.write_bytes(b"hello")
    assert store.put_bytes(b"hello") == store.put_file(other) == first
    assert files_in(store) == [store.path(first.sha256)]
    after = store.path(first.sha256).stat()
    assert after.st_ino == before.st_ino
    assert after.st_mtime_ns >= before.st_mtime_ns, "saving renews the time: see DirectoryStore.set_aside"


def test_a_file_is_taken_over(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_bytes(b"# A talk")
    stored = store.put_file(path)
    assert not path.exists()
    assert store.path(stored.sha256).read_bytes() == b"# A talk"


def test_everybody_may_read_a_stored_file_and_nobody_finds_it_writable(store: DirectoryStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"1")
    secret.chmod(0o600)
    for stored in (store.put_file(secret), store.put_bytes(b"2")):
        assert stat.S_IMODE(store.path(stored.sha256).stat().st_mode) == 0o600


def test_putting_in_what_lies_in_the_store_already_keeps_it(store: DirectoryStore) -> None:
    stored = store.put_bytes(b"hello")
    assert store.put_file(store.path(stored.sha256)) == stored
    assert store.path(stored.sha256).read_bytes() == b"hello"


def test_a_link_is_stored_as_the_content_it_leads_to(store: DirectoryStore, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"hello")
    link.symlink_to(target)
    stored = store.put_file(link)
    target.write_bytes(b"changed")
    assert store.path(stored.sha256).read_bytes() == b"hello"
    assert not store.path(stored.sha256).is_symlink()


def test_many_at_once_store_each_content_once_and_whole(store: DirectoryStore) -> None:
    contents = [bytes([number % 5]) * 100_000 for number in range(60)]
    with ThreadPoolExecutor(12) as pool:
        stored = list(pool.map(store.put_bytes, contents))
    assert [it.sha256 for it in stored] == [sha256(content) for content in contents]
    assert len(files_in(store)) == 5
    assert all(sha256(path.read_bytes()) == path.name for path in files_in(store))


def from_another_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every move into the store fail as between file systems."""
    real = Path.replace

    def replace(self: Path, target: Any) -> Path:
        if self.parent not in (Path(target).parent, Path(target).parent.parent):  # the store, where copies are made
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)


def test_a_file_on_another_file_system_is_copied_and_then_removed(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_another_file_system(monkeypatch)
    path = tmp_path / "big"
    path.write_bytes(b"x" * 3_000_000)
    stored = store.put_file(path)
    assert not path.exists()
    assert store.path(stored.sha256).read_bytes() == b"x" * 3_000_000
    assert files_in(store) == [store.path(stored.sha256)]
    assert stat.S_IMODE(store.path(stored.sha256).stat().st_mode) == 0o600


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="optional lane: no second file system here")
def test_a_file_really_on_another_file_system_is_taken_over(store: DirectoryStore) -> None:
    path = Path("/dev/shm") / f"jobledger-{os.getpid()}"
    path.write_bytes(b"elsewhere")
    try:
        stored = store.put_file(path)
        assert not path.exists()
        assert store.path(stored.sha256).read_bytes() == b"elsewhere"
    finally:
        path.unlink(missing_ok=True)


class PowerCut(BaseException):
    """Ends the process as far as the code under test is concerned."""


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same file system", "another file system"])
@pytest.mark.parametrize("moment", range(12))
def test_whenever_it_is_cut_off_a_name_leads_to_the_whole_content_or_nowhere(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool, moment: int
) -> None:
    if elsewhere:
        from_another_file_system(monkeypatch)
    content = b"y" * 2_500_000
    path = tmp_path / "file"
    path.write_bytes(content)
    steps = iter(range(100))

    def cut(real: Any) -> Any:
        def step(*args: Any, **named: Any) -> Any:
            if next(steps) == moment:
                raise PowerCut
            return real(*args, **named)

        return step

    with monkeypatch.context() as cutting:
        cutting.setattr(os, "fsync", cut(os.fsync))
        for name in ("replace", "chmod", "mkdir", "unlink"):
            cutting.setattr(Path, name, cut(getattr(Path, name)))
        with suppress(PowerCut):
            store.put_file(path)
    named = store.path(sha256(content))
    assert not named.exists() or named.read_bytes() == content
    assert named.exists() or path.exists()
    again = tmp_path / "again"
    again.write_bytes(content)
    store.put_file(again)
    assert named.read_bytes() == content
    assert stat.S_IMODE(named.stat().st_mode) == 0o600


def test_when_the_disk_is_full_nothing_is_left_lying_about(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    from_another_file_system(monkeypatch)
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    with pytest.raises(OSError, match="No space"):
        store.put_file(path)
    with pytest.raises(OSError, match="No space"):
        store.put_bytes(b"hello")
    assert files_in(store) == []
    assert path.read_bytes() == b"hello"


def test_a_file_and_every_directory_on_the_way_to_it_are_on_disk_before_it_is_called_stored(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fsync, list[str]()

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    named = store.path(store.put_bytes(b"hello").sha256)
    content, *directories = synced
    assert Path(content).parent == store.root
    assert set(directories) == {str(store.root), str(named.parent)}
    assert directories[-1] == str(named.parent)


@pytest.mark.parametrize("name", ["", "abc", "../" * 21 + "x", "A" * 64, "0" * 63 + "\n", "0" * 65])
def test_only_a_digest_leads_into_the_store(store: DirectoryStore, name: str) -> None:
    with pytest.raises(ValueError, match="not a SHA-256"):
        store.path(name)


def test_a_directory_that_cannot_be_made_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"results\.store: .*file"):
        DirectoryStore(tmp_path / "file" / "store").prepare()
    with pytest.raises(ConfigurationError, match=r"results\.store"):
        DirectoryStore(Path("/proc/store")).prepare()


def test_preparing_twice_keeps_what_is_there(store: DirectoryStore) -> None:
    stored = store.put_bytes(b"hello")
    store.prepare()
    assert files_in(store) == [store.path(stored.sha256)]


def test_a_link_in_the_place_of_a_file_is_replaced_by_the_file(store: DirectoryStore, tmp_path: Path) -> None:
    named = store.path(sha256(b"hello"))
    named.parent.mkdir()
    (tmp_path / "elsewhere").write_bytes(b"something else")
    named.symlink_to(tmp_path / "elsewhere")
    store.put_bytes(b"hello")
    assert not named.is_symlink()
    assert named.read_bytes() == b"hello"
    assert (tmp_path / "elsewhere").read_bytes() == b"something else"


async def test_a_part_of_a_file_is_read_piece_by_piece(store: DirectoryStore) -> None:
    content = os.urandom(3 * READ_CHUNK_BYTES + 5)
    file = await store.open(*store.put_bytes(content))
    pieces = [piece async for piece in file.read(7, file.size - 1)]
    await file.close()
    assert b"".join(pieces) == content[7:-1]
    assert max(map(len, pieces)) == READ_CHUNK_BYTES


async def test_what_is_not_in_the_store_cannot_be_opened(store: DirectoryStore) -> None:
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
    link.symlink_to(store.path(kept.sha256))
    long_ago = time.time() - ORPHAN_AGE_SECONDS - 60
    for path in (old, foreign, directory, store.path(kept.sha256)):
        os.utime(path, (long_ago, long_ago))
    assert await store.remove_orphans() == 1
    assert not old.exists()
    assert all(path.exists() for path in (fresh, foreign, directory, link, store.path(kept.sha256)))
