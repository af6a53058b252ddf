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
from jobledger.workers.directory_removal import ENTRIES_PER_TURN, remove_tree
from jobledger.workers.machine_health import MachineFailure
from jobledger.workers.scratch import ScratchDirectory

HOLD = """
import sys, time
from pathlib import Path
from jobledger.workers.scratch import ScratchDirectory
scratch = ScratchDirectory(Path(sys.argv[1]))
scratch.prepare()
place = scratch.new_attempt_path("job-1", 1)
place.mkdir()
(place / "video").write_bytes(bytes(1000))
print(scratch.path, flush=True)
time.sleep(1000)
"""


def test_scratch_of_a_killed_process_is_removed_and_of_a_living_one_kept(tmp_path: Path) -> None:
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    places = []
    for holder in holders:
        assert holder.stdout is not None
        places.append(Path(holder.stdout.readline().strip()))
    killed, living = holders
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    scratch = ScratchDirectory(tmp_path)
    scratch.check()
    run_to_completion(scratch.remove_stale())
    assert not places[0].exists()
    assert (next(places[1].iterdir()) / "video").exists()
    assert sorted(places[1].parent.iterdir()) == sorted([places[1], scratch.path or places[0]])
    living.kill()
    living.wait()
    scratch.close()
    third = ScratchDirectory(tmp_path)
    third.prepare()
    run_to_completion(third.remove_stale())
    assert not places[1].exists()
    for holder in holders:
        assert holder.stdout is not None
        holder.stdout.close()


def test_scratch_follows_no_links_and_uses_no_foreign_directory(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    root = tmp_path / "root"
    root.mkdir()
    name = f"jobledger-{os.getuid()}"
    (root / name).symlink_to(precious)  # planted where the directory should be
    first = ScratchDirectory(root)
    first.check()
    assert first.path is not None
    base = first.path.parent
    assert base.name.startswith(f"{name}-")
    (base / "planted").symlink_to(precious)
    dead = base / "dead-worker"
    dead.mkdir()
    (dead / "link").symlink_to(precious)
    (dead / "inner").mkdir()
    second = ScratchDirectory(root)
    second.check()
    run_to_completion(second.remove_stale())
    assert second.path is not None
    assert second.path.parent == base, "the same place is found again"
    assert not dead.exists()
    assert first.path.exists()
    assert (precious / "file").read_text() == "kept"
    assert oct(base.stat().st_mode & 0o777) == "0o700"
    assert oct(second.path.stat().st_mode & 0o777) == "0o700"


def test_scratch_with_too_little_space_is_trouble_of_the_machine(tmp_path: Path) -> None:
    with pytest.raises(MachineFailure, match="scratch_min_free_mb requires"):
        ScratchDirectory(tmp_path, min_free_mb=1e9).check()


@pytest.mark.parametrize("place", ["file/below", "nowhere/at/all"])
def test_scratch_that_cannot_be_created_is_trouble_of_the_machine(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    scratch = ScratchDirectory(tmp_path / place)
    with pytest.raises(MachineFailure, match=r"event_worker\.scratch_dir"):
        scratch.check()


def test_scratch_that_vanished_is_created_again(tmp_path: Path) -> None:
    scratch = ScratchDirectory(tmp_path)
    scratch.check()
    assert scratch.path is not None
    scratch.path.rmdir()
    with pytest.raises(MachineFailure):
        scratch.check_quickly()
    scratch.check()
    scratch.check_quickly()


def test_scratch_prepared_by_many_threads_closes_no_descriptor_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = os.close

    def slow(descriptor: int) -> None:
        time.sleep(0.02)
        close(descriptor)

    scratch = ScratchDirectory(tmp_path / "root")
    scratch.prepare()
    (tmp_path / "root").rename(tmp_path / "away")
    (tmp_path / "root").write_text("a file where the directory was")
    monkeypatch.setattr("jobledger.workers.scratch.os.close", slow)
    with ThreadPoolExecutor(8) as threads:
        errors = [checking.exception() for checking in [threads.submit(scratch.check) for _ in range(8)]]
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


def test_deep_directories_of_a_dead_worker_are_removed(tmp_path: Path) -> None:
    base = tmp_path / f"jobledger-{os.getuid()}"
    dead = base / "host-1-abcdef"
    dead.mkdir(parents=True, mode=0o700)
    nest(dead, 1100)
    scratch = ScratchDirectory(tmp_path)

    scratch.prepare()
    run_to_completion(scratch.remove_stale())
    scratch.close()

    assert list(base.iterdir()) == []


def wide(tree: Path) -> None:
    for number in range(1000):
        (tree / f"{number:0200}").touch()


def wide_of_directories(tree: Path) -> None:
    for number in range(500):
        (tree / f"{number:0200}").mkdir()


def wide_at_each_level(tree: Path) -> None:
    for level in range(10):
        tree = tree / f"{level:0100}"
        tree.mkdir()
        for number in range(50):
            (tree / f"{number:0200}").mkdir(mode=0)


def deep(tree: Path) -> None:
    nest(tree, 500)


@pytest.mark.parametrize("fill", [wide, wide_of_directories, wide_at_each_level, deep])
def test_directory_of_any_shape_is_removed_in_turns_and_without_memory(
    tmp_path: Path, fill: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.workers.directory_removal.ENTRIES_PER_TURN", 40)
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


def test_checks_do_not_wait_for_directories_of_dead_workers(tmp_path: Path) -> None:
    dead = tmp_path / f"jobledger-{os.getuid()}" / "host-1-abcdef"
    dead.mkdir(parents=True, mode=0o700)
    wide(dead)
    scratch = ScratchDirectory(tmp_path)
    scratch.check()
    assert len(list(dead.iterdir())) == 1000
    removing = scratch.remove_stale()
    next(removing)
    removing.close()  # a worker that ends meanwhile
    other = ScratchDirectory(tmp_path)
    other.prepare()
    run_to_completion(other.remove_stale())
    assert set(dead.parent.iterdir()) == {scratch.path, other.path}


def test_end_of_a_worker_does_not_wait_for_its_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobledger.workers.scratch._CLOSE_SECONDS", 0)
    scratch = ScratchDirectory(tmp_path)
    scratch.prepare()
    assert scratch.path is not None
    wide(scratch.path)
    left = scratch.path
    scratch.close()
    assert len(list(left.iterdir())) >= 1000 - ENTRIES_PER_TURN
    after = ScratchDirectory(tmp_path)
    after.prepare()
    run_to_completion(after.remove_stale())
    assert not left.exists()


@pytest.mark.parametrize("check", ["create_directories", "check_quickly", "check"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_scratch_whose_mode_was_changed_gets_it_back(tmp_path: Path, level: int, check: str) -> None:
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
