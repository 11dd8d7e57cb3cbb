"""The checkpoint directory: whole or absent, every damage found, the newest whole one taken, the best never pruned."""

from __future__ import annotations

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
