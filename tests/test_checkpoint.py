"""The checkpoint directory: whole or absent, every damage found, the newest whole one taken, the best never pruned."""

from __future__ import annotations

import errno
import json
import os

import pytest

from trainer import checkpoint
from trainer.files import write_json
from trainer.refusal import Refusal


def make(root, step, content=b"weights" * 50):
    staging = checkpoint.new_staging(root, step)
    (staging / "model").mkdir()
    (staging / "model" / "model.safetensors").write_bytes(content)
    (staging / "optimizer.safetensors").write_bytes(b"moments" * 30)
    write_json(staging / "state.json", {"format": 1, "step": step})
    checkpoint.seal(staging, step)
    return checkpoint.directory_of(root, step)


FILES = ("model/model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
        return
    path.write_bytes(
        {
            "empty": b"",
            "half": content[: len(content) // 2],
            "zeros": bytes(len(content)),
            "flipped": bytes([content[0] ^ 1]) + content[1:],
        }[how]
    )


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "half", "zeros", "flipped"])
def test_any_damage_to_any_file_falls_back_to_the_one_before_and_says_why(tmp_path, file, how):
    make(tmp_path, 10)
    newest = make(tmp_path, 20)
    damage(newest / file, how)
    found = checkpoint.newest_verified(tmp_path)
    assert found.step == 10
    assert found.passed_over[0][0] == newest.name and found.passed_over[0][1]
    assert newest.exists(), "nothing is deleted"


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (900, 1000, 99):
        make(tmp_path, step)
    assert [step for step, _ in checkpoint.listed(tmp_path)] == [1000, 900, 99]
    assert checkpoint.newest_verified(tmp_path).step == 1000


def test_a_save_cut_off_before_its_name_is_never_seen_and_swept_by_the_next(tmp_path):
    make(tmp_path, 1)
    staging = checkpoint.new_staging(tmp_path, 2)
    (staging / "state.json").write_text("{}")
    assert checkpoint.newest_verified(tmp_path).step == 1
    make(tmp_path, 3)
    assert not staging.exists()


def test_when_none_is_whole_the_refusal_names_each_and_deletes_nothing(tmp_path):
    for step in (1, 2):
        damage(make(tmp_path, step) / "state.json", "half")
    with pytest.raises(Refusal, match="step_00000002.*step_00000001"):
        checkpoint.newest_verified(tmp_path)
    assert len(checkpoint.listed(tmp_path)) == 2
    with pytest.raises(Refusal, match="no checkpoint"):
        checkpoint.newest_verified(tmp_path / "none")


def test_pruning_keeps_the_newest_and_the_pinned(tmp_path):
    for step in range(1, 8):
        make(tmp_path, step)
    gone = checkpoint.prune(tmp_path, keep=2, pinned={3})
    assert sorted(gone) == [1, 2, 4, 5]
    assert [step for step, _ in checkpoint.listed(tmp_path)] == [7, 6, 3]
    assert not list(tmp_path.glob(".removed*"))


def test_the_same_step_saved_again_replaces_the_old_one_whole(tmp_path):
    make(tmp_path, 5, b"old" * 100)
    make(tmp_path, 5, b"new" * 100)
    found = checkpoint.newest_verified(tmp_path)
    assert (found.path / "model" / "model.safetensors").read_bytes().startswith(b"new")


def killed_at(call, name, n=1):
    """Run `call` and stop it as a kill would, before the `n`-th call of os.`name`: nothing of ours runs afterwards."""
    pid = os.fork()
    if pid == 0:
        real, seen = getattr(os, name), [0]

        def dying(*args, **kwargs):
            seen[0] += 1
            if seen[0] == n:
                os._exit(9)
            return real(*args, **kwargs)

        setattr(os, name, dying)
        call()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, "the kill must fall into the call"


def test_a_kill_while_a_step_is_saved_again_loses_neither_the_old_nor_the_new(tmp_path):
    make(tmp_path, 5, b"old" * 100)
    # manifest's own replace apart, the renames are: the old one aside, the new one in
    killed_at(lambda: make(tmp_path, 5, b"new" * 100), "rename", 2)
    assert checkpoint.listed(tmp_path) == [], "the old one stands aside, the new one is not in place"
    assert checkpoint.put_back(tmp_path) == ["step_00000005"]
    found = checkpoint.newest_verified(tmp_path)
    assert (found.path / "model" / "model.safetensors").read_bytes().startswith(b"old")
    killed_at(lambda: make(tmp_path, 5, b"new" * 100), "rmdir", 3)  # two of the staging that the first kill left
    assert checkpoint.put_back(tmp_path) == []
    found = checkpoint.newest_verified(tmp_path)
    assert (found.path / "model" / "model.safetensors").read_bytes().startswith(b"new")
    make(tmp_path, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005", "step_00000006"]


def test_the_next_save_gives_back_what_stands_aside_before_it_sweeps(tmp_path):
    make(tmp_path, 5)
    killed_at(lambda: make(tmp_path, 5), "rename", 2)
    make(tmp_path, 6)
    assert [step for step, _ in checkpoint.listed(tmp_path)] == [6, 5]


def test_what_a_killed_removal_left_is_swept_by_the_next_save(tmp_path):
    for step in (1, 2):
        make(tmp_path, step)
    killed_at(lambda: checkpoint.prune(tmp_path, 1, set()), "rmdir")
    make(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("how", ["missing", "empty", "half"])
@pytest.mark.parametrize("file", FILES)
def test_pruning_counts_no_damaged_one_among_those_it_keeps(tmp_path, file, how):
    for step in range(1, 7):
        make(tmp_path, step)
    for step in (4, 6):
        damage(checkpoint.directory_of(tmp_path, step) / file, how)
    assert checkpoint.prune(tmp_path, keep=3, pinned=set()) == [1]
    assert [step for step, path in checkpoint.listed(tmp_path) if not checkpoint.verify(path)] == [5, 3, 2]
    assert checkpoint.prune(tmp_path, keep=1, pinned=set()) == [4, 3, 2], "of its age, a damaged one goes with the rest"


def test_pruning_counts_none_that_the_resume_found_damaged_though_its_sizes_are_right(tmp_path):
    for step in range(1, 6):
        make(tmp_path, step)
    for step in (4, 5):
        damage(checkpoint.directory_of(tmp_path, step) / "optimizer.safetensors", "flipped")
    found = checkpoint.newest_verified(tmp_path)
    assert found.damaged_steps == {4, 5}
    checkpoint.prune(tmp_path, keep=2, pinned={3}, damaged=found.damaged_steps)
    assert [step for step, _ in checkpoint.listed(tmp_path)] == [5, 4, 3, 2]


def test_a_manifest_that_seals_nothing_is_damaged(tmp_path):
    directory = make(tmp_path, 1)
    for files in ({}, {"state.json": {}}, {"state.json": 1, "optimizer.safetensors": 2}, [1], None):
        write_json(directory / "MANIFEST.json", {"format": 1, "step": 1, "files": files})
        assert checkpoint.verify(directory) == ["MANIFEST.json is damaged"]


def test_a_bit_flipped_in_any_byte_of_the_manifest_is_found_or_changes_nothing_it_says(tmp_path):
    directory = make(tmp_path, 1)
    path = directory / "MANIFEST.json"
    whole = path.read_bytes()
    said = json.loads(whole)["files"]
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        if not checkpoint.verify(directory):
            assert json.loads(bytes(content))["files"] == said


def test_a_file_that_cannot_be_read_is_passed_over_like_a_damaged_one(tmp_path, monkeypatch):
    make(tmp_path, 1)
    newest = make(tmp_path, 2)
    real = checkpoint._sha256

    def bad_sector(path):
        if newest in path.parents:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "_sha256", bad_sector)
    found = checkpoint.newest_verified(tmp_path)
    assert found.step == 1 and "cannot be read: Input/output error" in found.passed_over[0][1]


def test_a_left_over_that_cannot_be_removed_stands_in_the_way_of_no_save(tmp_path, monkeypatch):
    """As on NFS, where a file that somebody has open comes back under another name."""
    make(tmp_path, 1)
    left = tmp_path / ".removed_step_00000009"
    left.mkdir()
    (left / ".nfs0001").write_bytes(b"")
    unlink = os.unlink

    def busy(path, *args, **kwargs):
        if str(path).endswith(".nfs0001"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", busy)
    make(tmp_path, 2)
    make(tmp_path, 3)
    assert [step for step, _ in checkpoint.listed(tmp_path)] == [3, 2, 1]
