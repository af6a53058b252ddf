"""Tests of scratch directories and of their removal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog

from jobledger.ledger.system.cooperative_threads import run_to_completion
from jobledger.workers.machine.directory_removal import ENTRIES_PER_CHUNK, remove_tree
from jobledger.workers.machine.health import MachineFailure
from jobledger.workers.machine.scratch import ScratchDirectory

HOLD_SCRATCH = """
import sys, time
from pathlib import Path
from jobledger.workers.machine.scratch import ScratchDirectory
scratch = ScratchDirectory(Path(sys.argv[1]))
scratch.prepare()
attempt = scratch.new_attempt_path("job-1", 1)
attempt.mkdir()
(attempt / "video").write_bytes(bytes(1000))
print(scratch.path, flush=True)
time.sleep(1000)
"""


def test_remove_stale_removes_scratch_of_ended_processes_only(tmp_path: Path) -> None:
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD_SCRATCH, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = []
    for holder in holders:
        assert holder.stdout is not None
        paths.append(Path(holder.stdout.readline().strip()))
    killed, live = holders
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    scratch = ScratchDirectory(tmp_path)
    scratch.check()
    run_to_completion(scratch.remove_stale())
    assert not paths[0].exists()
    assert (next(paths[1].iterdir()) / "video").exists()
    assert sorted(paths[1].parent.iterdir()) == sorted([paths[1], scratch.path or paths[0]])
    live.kill()
    live.wait()
    scratch.close()
    third = ScratchDirectory(tmp_path)
    third.prepare()
    run_to_completion(third.remove_stale())
    assert not paths[1].exists()
    for holder in holders:
        assert holder.stdout is not None
        holder.stdout.close()


def test_scratch_follows_no_links_and_uses_only_directories_of_own_user(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "file").write_text("kept")
    root = tmp_path / "root"
    root.mkdir()
    name = f"jobledger-{os.getuid()}"
    (root / name).symlink_to(foreign)  # an attacker put a link in place of the directory
    first = ScratchDirectory(root)
    first.check()
    assert first.path is not None
    base = first.path.parent
    assert base.name.startswith(f"{name}-")
    (base / "planted").symlink_to(foreign)
    dead = base / "dead-worker"
    dead.mkdir()
    (dead / "link").symlink_to(foreign)
    (dead / "inner").mkdir()
    second = ScratchDirectory(root)
    second.check()
    run_to_completion(second.remove_stale())
    assert second.path is not None
    assert second.path.parent == base, "the same directory is used again"
    assert not dead.exists()
    assert first.path.exists()
    assert (foreign / "file").read_text() == "kept"
    assert oct(base.stat().st_mode & 0o777) == "0o700"
    assert oct(second.path.stat().st_mode & 0o777) == "0o700"


def test_scratch_with_too_little_space_is_a_machine_failure(tmp_path: Path) -> None:
    with pytest.raises(MachineFailure, match="scratch_min_free_mb requires"):
        ScratchDirectory(tmp_path, min_free_mb=1e9).check()


@pytest.mark.parametrize("place", ["file/below", "nowhere/at/all"])
def test_scratch_that_cannot_be_created_is_a_machine_failure(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    scratch = ScratchDirectory(tmp_path / place)
    with pytest.raises(MachineFailure, match=r"event_worker\.scratch_dir"):
        scratch.check()


def test_missing_scratch_is_created_again(tmp_path: Path) -> None:
    scratch = ScratchDirectory(tmp_path)
    scratch.check()
    assert scratch.path is not None
    scratch.path.rmdir()
    with pytest.raises(MachineFailure):
        scratch.check_quickly()
    scratch.check()
    scratch.check_quickly()


def test_concurrent_scratch_checks_close_no_descriptor_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = os.close

    def close_slowly(descriptor: int) -> None:
        time.sleep(0.02)
        close(descriptor)

    scratch = ScratchDirectory(tmp_path / "root")
    scratch.prepare()
    (tmp_path / "root").rename(tmp_path / "away")
    (tmp_path / "root").write_text("a file where the directory was")
    monkeypatch.setattr("jobledger.workers.machine.scratch.os.close", close_slowly)
    with ThreadPoolExecutor(8) as threads:
        errors = [check.exception() for check in [threads.submit(scratch.check) for _ in range(8)]]
    assert [type(error) for error in errors] == [MachineFailure] * 8
    assert all(str(error).startswith("No scratch directory can be created") for error in errors)


def nest(directory: Path, depth: int) -> None:
    """Create directories inside each other, deeper than a path can name, each with a file."""
    parent = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.close(os.open("file", os.O_CREAT, dir_fd=parent))
        os.mkdir("d", dir_fd=parent)
        inner = os.open("d", os.O_RDONLY, dir_fd=parent)
        os.close(parent)
        parent = inner
    os.close(parent)


def test_remove_tree_removes_unreadable_directories_and_follows_no_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    outside.chmod(0o755)
    (outside / "file").write_text("kept")
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    for directory in (tree, tree / "a", tree / "a" / "b"):
        (directory / "link").symlink_to(outside)
        (directory / "file-link").symlink_to(outside / "file")
    (tree / "a" / "b").chmod(0)
    (tree / "a").chmod(0)

    run_to_completion(remove_tree(tree))

    assert list(tmp_path.iterdir()) == [outside]
    assert (outside / "file").read_text() == "kept"
    assert outside.stat().st_mode & 0o777 == 0o755


def test_deep_directories_of_killed_worker_are_removed(tmp_path: Path) -> None:
    base = tmp_path / f"jobledger-{os.getuid()}"
    dead = base / "host-1-abcdef"
    dead.mkdir(parents=True, mode=0o700)
    nest(dead, 1100)
    scratch = ScratchDirectory(tmp_path)

    scratch.prepare()
    run_to_completion(scratch.remove_stale())
    scratch.close()

    assert list(base.iterdir()) == []


def fill_with_files(tree: Path) -> None:
    for number in range(1000):
        (tree / f"{number:0200}").touch()


def fill_with_directories(tree: Path) -> None:
    for number in range(500):
        (tree / f"{number:0200}").mkdir()


def fill_each_level(tree: Path) -> None:
    for level in range(10):
        tree = tree / f"{level:0100}"
        tree.mkdir()
        for number in range(50):
            (tree / f"{number:0200}").mkdir(mode=0)


def fill_deeply(tree: Path) -> None:
    nest(tree, 500)


@pytest.mark.parametrize("fill", [fill_with_files, fill_with_directories, fill_each_level, fill_deeply])
def test_remove_tree_works_in_turns_with_constant_memory(
    tmp_path: Path, fill: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.workers.machine.directory_removal.ENTRIES_PER_CHUNK", 40)
    tree = tmp_path / "tree"
    tree.mkdir()
    fill(tree)
    tracemalloc.start()
    try:
        turns = sum(1 for _ in remove_tree(tree))
        memory = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert list(tmp_path.iterdir()) == []
    assert turns >= 10
    assert memory < 50_000


def test_check_does_not_wait_for_the_removal_of_stale_directories(tmp_path: Path) -> None:
    dead = tmp_path / f"jobledger-{os.getuid()}" / "host-1-abcdef"
    dead.mkdir(parents=True, mode=0o700)
    fill_with_files(dead)
    scratch = ScratchDirectory(tmp_path)
    scratch.check()
    assert len(list(dead.iterdir())) == 1000
    removal = scratch.remove_stale()
    next(removal)
    removal.close()  # the worker ends meanwhile
    second = ScratchDirectory(tmp_path)
    second.prepare()
    run_to_completion(second.remove_stale())
    assert set(dead.parent.iterdir()) == {scratch.path, second.path}


def test_close_does_not_wait_for_the_removal_of_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobledger.workers.machine.scratch._CLOSE_SECONDS", 0)
    scratch = ScratchDirectory(tmp_path)
    scratch.prepare()
    assert scratch.path is not None
    fill_with_files(scratch.path)
    path = scratch.path
    scratch.close()
    assert len(list(path.iterdir())) >= 1000 - ENTRIES_PER_CHUNK
    second = ScratchDirectory(tmp_path)
    second.prepare()
    run_to_completion(second.remove_stale())
    assert not path.exists()


@pytest.mark.parametrize("check", ["create_directories", "check_quickly", "check"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_changed_mode_of_scratch_is_restored(tmp_path: Path, level: int, check: str) -> None:
    scratch = ScratchDirectory(tmp_path / "root")
    scratch.prepare()
    assert scratch.path is not None
    path = [scratch.path, *scratch.path.parents][level]
    mode = path.stat().st_mode
    try:
        path.chmod(0)
        with structlog.testing.capture_logs() as lines:
            getattr(scratch, check)()
        assert path.stat().st_mode == mode
        assert [line["directory"] for line in lines] == [str(path)]
        assert scratch.repair_count == 1
    finally:
        path.chmod(0o700)
