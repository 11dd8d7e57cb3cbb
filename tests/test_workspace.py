"""The workspace: its layout, what it finds by name, and datasets that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.refusal import Refusal
from trainer.workspace import Workspace, safe_name


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "w").create()


def test_a_new_workspace_is_closed_to_other_users(tmp_path: Path) -> None:
    os.umask(0o022)
    workspace = Workspace(tmp_path / "deep" / "w").create()
    for folder in (
        workspace.root,
        workspace.runs,
        workspace.datasets_dir,
        workspace.models_dir,
        workspace.drafts,
    ):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    workspace.create()  # a second start finds it there


def test_a_place_that_cannot_be_a_workspace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refusal, match="--workspace"):
        Workspace(tmp_path / "file").create()


def test_models_are_the_direct_children_that_hold_a_model(tmp_path: Path, workspace: Workspace) -> None:
    root = tmp_path / "more"
    for folder, name in (
        (workspace.models_dir / "b", "config.json"),
        (workspace.models_dir / "a", "adapter_config.json"),
        (workspace.models_dir / "deep" / "hidden", "config.json"),
        (workspace.models_dir / "empty", "readme.md"),
        (workspace.models_dir / ".half", "config.json"),
        (root / "b", "config.json"),
        (root / "q", "model.gguf"),
    ):
        folder.mkdir(parents=True)
        (folder / name).write_text("{}")
    both = Workspace(workspace.root, model_roots=(root, tmp_path / "missing"))
    own, more = both.models_dir, root
    assert both.models() == [own / "a", own / "b", more / "b", more / "q"]
    assert both.find_model("q") == more / "q"
    assert both.find_model("b") == own / "b", "the workspace comes before other roots"
    assert both.find_model(str(more / "b")) == more / "b"
    with pytest.raises(Refusal, match="Closest: q"):
        both.find_model("qq")
    for bad in ("", "a\0b"):
        with pytest.raises(Refusal):
            both.find_model(bad)


def test_an_added_dataset_is_a_copy_named_by_its_content(tmp_path: Path, workspace: Workspace) -> None:
    upload = tmp_path / "up"
    upload.write_bytes(b'{"messages": []}\n' * 3)
    info = workspace.add_dataset(upload, "../../my rows.jsonl")
    digest = hashlib.sha256(upload.read_bytes()).hexdigest()
    assert (info.id, info.name, info.bytes, info.rows) == (digest[:16], "my rows.jsonl", 51, None)
    assert info.path == workspace.datasets_dir / info.id / "my rows.jsonl"
    assert info.path.read_bytes() == upload.read_bytes() and upload.exists()
    assert json.loads((info.path.parent / "manifest.json").read_text())["sha256"] == digest
    assert workspace.find_dataset(info.id) == info.path
    workspace.note_rows(info.id, 3)
    assert workspace.datasets()[0].rows == 3
    assert [p.name for p in workspace.datasets_dir.iterdir()] == [info.id], "a staging folder was left behind"


def test_the_same_content_twice_is_one_dataset_even_at_the_same_time(tmp_path: Path, workspace: Workspace) -> None:
    upload = tmp_path / "up"
    upload.write_bytes(b"x" * 3_000_000)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(workspace.add_dataset(upload, f"{n}.jsonl").id))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(workspace.datasets()) == 1
    assert len(list(workspace.datasets_dir.iterdir())) == 1


def test_an_empty_or_missing_upload_leaves_nothing_behind(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(Refusal, match="is empty"):
        workspace.add_dataset(tmp_path / "empty", "a.jsonl")
    with pytest.raises(Refusal, match="Cannot add a.jsonl"):
        workspace.add_dataset(tmp_path / "none", "a.jsonl")
    assert list(workspace.datasets_dir.iterdir()) == []


def test_an_add_that_dies_halfway_shows_no_dataset(tmp_path: Path, workspace: Workspace, monkeypatch) -> None:
    (tmp_path / "up").write_text("x")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.workspace.os.rename", die)
        with pytest.raises(KeyboardInterrupt):
            workspace.add_dataset(tmp_path / "up", "a.jsonl")
    assert workspace.datasets() == []


def test_files_in_a_data_root_are_used_in_place(tmp_path: Path, workspace: Workspace) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "rows.jsonl").write_text("{}")
    (root / "notes.md").write_text("x")
    there = Workspace(workspace.root, data_roots=(root,))
    (info,) = there.datasets()
    assert info.path == root / "rows.jsonl" and info.folder is None
    assert there.find_dataset(info.id) == info.path
    assert there.knows(info.path) and not there.knows(tmp_path / "elsewhere")


def test_a_link_out_of_a_root_is_not_known(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "secret").write_text("x")
    link = workspace.datasets_dir / "link"
    link.symlink_to(tmp_path / "secret")
    assert not workspace.knows(link)


def test_a_dataset_that_is_not_there_is_refused(workspace: Workspace) -> None:
    for bad in ("0123456789abcdef", "nothing.jsonl", "", "a\0b", "at-000"):
        with pytest.raises(Refusal):
            workspace.find_dataset(bad)


def test_a_damaged_dataset_folder_is_passed_over(workspace: Workspace) -> None:
    for name, text in (("0123456789abcdef", "{"), ("0123456789abcdee", "[]"), ("0123456789abcded", "{}")):
        (workspace.datasets_dir / name).mkdir()
        (workspace.datasets_dir / name / "manifest.json").write_text(text)
    assert workspace.datasets() == []


def test_runs_are_found_by_id_and_listed_newest_first(workspace: Workspace) -> None:
    for name in ("20250101-000000-aaaa", "20260101-000000-bbbb", "not-yet"):
        (workspace.runs / name).mkdir()
        if name != "not-yet":
            (workspace.runs / name / "config.json").write_text("{}")
    assert [run.run_id for run in workspace.list_runs()] == ["20260101-000000-bbbb", "20250101-000000-aaaa"]
    assert workspace.run("20250101-000000-aaaa").path.parent == workspace.runs
    for bad in ("../x", "not-yet", "", "a/b", ".."):
        with pytest.raises(Refusal):
            workspace.run(bad)


@given(st.text(max_size=300))
def test_any_name_becomes_one_plain_file_name(text: str) -> None:
    name = safe_name(text)
    assert name and name not in (".", "..") and not name.startswith((".", " "))
    assert not set(name) & set('/\\\0\n\r\t<>&"') and len(name) <= 80
    assert len(name.encode("utf-8", "replace")) <= 255 and name != "manifest.json"


def test_the_suffix_of_a_long_name_is_kept() -> None:
    assert safe_name("x" * 300 + ".jsonl").endswith("x.jsonl")
    assert safe_name("C:\\data\\rows.jsonl") == "rows.jsonl"
    assert safe_name("manifest.json") == "data-manifest.json"


def test_what_a_killed_addition_left_is_removed_a_day_later(workspace: Workspace, tmp_path: Path) -> None:
    old, young = (workspace.datasets_dir / f".staging-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir()
        (folder / "half.jsonl").write_text("{")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    (tmp_path / "rows.jsonl").write_text("{}")
    workspace.add_dataset(tmp_path / "rows.jsonl", "rows.jsonl")
    assert not old.exists() and young.exists()
