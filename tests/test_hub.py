"""A model by its id: what is fetched, what is proved, what is continued, and what is said when a hub does not give it.

The hub is tests/hub_server.py on loopback; the other side is the real huggingface_hub in the real child process.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, free_port
from tests.hub_server import COMMIT, Hub, Model, files_of, running_hub
from trainer import hub as hubs
from trainer.files import read_json
from trainer.hub_names import NOTE, ModelId, chosen_files
from trainer.locks import FileLock
from trainer.refusal import Refusal
from trainer.worker import Cancelled
from trainer.workspace import Workspace

ID = ModelId("org/name")
QUICK_S = (0.05, 0.05)
WEIGHTS = bytes(range(256)) * 8192  # 2 MiB
SMALL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": WEIGHTS}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No word against the network, no token and no cache of the person who runs the tests."""
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return monkeypatch


def fetched(hub: Hub, online: pytest.MonkeyPatch, models: Path, model: ModelId = ID, **options: Any) -> Path:
    """Download from `hub` into `models`."""
    online.setenv("HF_ENDPOINT", hub.url)
    return hubs.download(models, model, on_progress=options.pop("on_progress", _quiet), pauses_s=QUICK_S, **options)


def _quiet(done: int, total: int) -> None:
    """Nobody listens."""


def refusal(hub: Hub, online: pytest.MonkeyPatch, models: Path, model: ModelId = ID, **options: Any) -> str:
    """What a download that cannot be done says; nothing of it may have a name of its own then."""
    with pytest.raises(Refusal) as caught:
        fetched(hub, online, models, model, **options)
    assert not (models / model.folder).exists()
    return caught.value.message


def parts_bytes(models: Path) -> int:
    """What has arrived and waits to be continued."""
    return sum(path.stat().st_size for path in models.glob(".download-*/parts/*"))


@pytest.mark.parametrize(
    "text",
    ["", "name", "org/", "/name", "../name", "org/..", "a/b/c", "org/name/../..", "org//name", "org/na me", "org/na--me",
     "org/name@", "org/name@../x", "org/name@a/b", "https://hub/org/name", ".org/name", "org/-name", "org/n\0", "org/n\nx",
     "~/name", "org\\name", "o" * 60 + "/" + "n" * 60],
)  # fmt: skip
def test_what_is_no_model_id_is_refused_in_words(text: str) -> None:
    with pytest.raises(Refusal, match="is no model id"):
        ModelId.parse(text)


def test_an_id_becomes_one_plain_folder_and_the_folder_says_its_id() -> None:
    for text in ("Qwen/Qwen3-0.6B", "a/b", "org/name@v1.0", "org_x/a_b.c-d@main"):
        model = ModelId.parse(text)
        assert str(model) == text and "/" not in model.folder and ModelId.of_folder(model.folder) == model


def test_only_configuration_tokenizer_templates_and_safetensors_are_fetched() -> None:
    good = ["config.json", "generation_config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model",
            "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]  # fmt: skip
    bad = ["pytorch_model.bin", "modeling_x.py", "model.gguf", "x.pth", "README.md", ".gitattributes", "../config.json",
           "onnx/config.json", "/etc/config.json", "consolidated.safetensors", "model.fp16.safetensors", "training_args.bin",
           "pytorch_model.bin.index.json", "tf_model.h5", "a\\config.json", ".safetensors"]  # fmt: skip
    assert chosen_files(good + bad) == sorted(good)
    assert chosen_files(["weights.safetensors", "config.json"]) == ["config.json", "weights.safetensors"]


def test_a_model_arrives_byte_for_byte_and_is_found_by_its_id(
    online: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> None:
    there = files_of(tiny_model)
    told: list[tuple[int, int]] = []
    others = {"modeling_evil.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "README.md": b"words"}
    workspace = Workspace(tmp_path / "w").create()
    with running_hub(org__name=Model(there | others)) as hub:
        hub.token = "hf_secret"
        online.setenv("HF_TOKEN", hub.token)
        made = fetched(hub, online, workspace.models_dir, on_progress=lambda done, total: told.append((done, total)))
        asked = {path.rsplit("/", 1)[-1] for _, path, _ in hub.seen[1:]}
        assert all(headers["authorization"] == "Bearer hf_secret" for _, _, headers in hub.seen)
        # one question, then the files at the commit it named: no list of programs, no counting, nothing about this machine
        assert hub.seen[0][1] == "/api/models/org/name"
        assert all(path.startswith(f"/org/name/resolve/{COMMIT}/") for _, path, _ in hub.seen[1:])
        assert not any(
            "torch" in headers["user-agent"] or "agent/" in headers["user-agent"] for _, _, headers in hub.seen
        )
    assert asked == set(chosen_files(list(there)))
    assert {name: content for name, content in files_of(made).items() if name != NOTE} == {n: there[n] for n in asked}
    assert read_json(made / NOTE)["commit"] == COMMIT
    total = sum(len(there[name]) for name in asked)
    assert told[0] == (0, total) and told[-1] == (total, total)
    assert workspace.models() == [made] and workspace.find_model("org/name") == made
    assert not list(workspace.models_dir.glob(".download-*"))


def test_a_download_that_is_cut_goes_on_where_it_was(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running_hub(org__name=Model(SMALL, fails={"model.safetensors": [700_000, 700_000]})) as hub:
        made = fetched(hub, online, tmp_path)
        ranges = [headers.get("range") for headers in hub.asked("model.safetensors")]
    assert ranges == [None, "bytes=700000-", "bytes=1400000-"]
    assert (made / "model.safetensors").read_bytes() == WEIGHTS


def test_what_a_lost_line_left_is_continued_by_the_next_download(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Model(SMALL, fails={"model.safetensors": [600_000, 503, 503, 503, 503]})
    with running_hub(org__name=model) as hub:
        said = refusal(hub, online, tmp_path)
        assert "it answers 503. What has arrived is kept. Resume" in said
        others = len(SMALL["config.json"])  # in the order of names: the tokenizer's turn did not come
        total = sum(len(content) for content in SMALL.values())
        assert hubs.unfinished(tmp_path) == [hubs.Unfinished(ID, 600_000 + others, total)]
        model.fails.clear()
        hub.seen.clear()
        told: list[int] = []
        made = fetched(hub, online, tmp_path, on_progress=lambda done, total: told.append(done))
        assert told[0] == 600_000 + others and not hub.asked("config.json")
        assert [headers["range"] for headers in hub.asked("model.safetensors")] == ["bytes=600000-"]
    assert (made / "model.safetensors").read_bytes() == WEIGHTS and not hubs.unfinished(tmp_path)


def test_a_hub_without_ranges_starts_the_file_anew(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Model(SMALL, fails={"model.safetensors": [700_000]}, ignores_ranges=True, bytes_a_second=3e6)
    told: list[int] = []
    with running_hub(org__name=model) as hub:
        made = fetched(hub, online, tmp_path, on_progress=lambda done, total: told.append(done))
        assert hub.asked("model.safetensors")[1]["range"] == "bytes=700000-"
    assert (made / "model.safetensors").read_bytes() == WEIGHTS
    assert max(told) == told[-1] == sum(len(content) for content in SMALL.values())


def test_content_that_is_not_the_announced_one_is_thrown_away(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running_hub(org__name=Model(SMALL, wrong_digest="model.safetensors")) as hub:
        said = refusal(hub, online, tmp_path)
        assert "model.safetensors arrived with other content than the hub announces (sha256 differs)" in said
        assert not list(tmp_path.glob(".download-*/parts/model.safetensors*"))
        hub.models["org/name"].wrong_digest = ""
        made = fetched(hub, online, tmp_path)
    assert (made / "model.safetensors").read_bytes() == WEIGHTS


def test_a_part_that_was_damaged_on_this_disk_is_found(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Model(SMALL, fails={"model.safetensors": [700_000, 503, 503, 503]})
    with running_hub(org__name=model) as hub:
        refusal(hub, online, tmp_path)
        part = next(tmp_path.glob(".download-*/parts/model.safetensors*"))
        damaged = bytearray(part.read_bytes())
        damaged[1000] ^= 1
        part.write_bytes(damaged)
        model.fails.clear()
        assert "other content" in refusal(hub, online, tmp_path)


def test_more_bytes_than_announced_are_not_written(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running_hub(org__name=Model(SMALL, wrong_size="model.safetensors")) as hub:
        assert "sends more of model.safetensors than it announced" in refusal(hub, online, tmp_path)
    assert parts_bytes(tmp_path) < sum(len(content) for content in SMALL.values())


def test_a_gated_model_is_explained_and_comes_with_a_token(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running_hub(org__name=Model(SMALL, gated=True)) as hub:
        hub.token = "hf_right"
        online.setenv("HF_TOKEN", "hf_other")
        said = refusal(hub, online, tmp_path)
        assert (
            "org/name is gated" in said
            and f"{hub.url}/org/name" in said
            and "HF_TOKEN" in said
            and "hf_other" not in said
        )
        online.setenv("HF_TOKEN", "hf_right")
        assert (fetched(hub, online, tmp_path) / "config.json").is_file()


def test_the_token_stays_with_the_hub_when_its_files_lie_elsewhere(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online.setenv("HF_TOKEN", "hf_secret")
    cut = Model(SMALL, fails={"model.safetensors": [700_000]})
    with running_hub(org__name=cut) as store, running_hub(org__name=Model(SMALL, lies_at=store.url)) as hub:
        made = fetched(hub, online, tmp_path)
        assert all("authorization" in headers for _, _, headers in hub.seen)
        assert store.seen and not any("authorization" in headers for _, _, headers in store.seen)
        assert [headers.get("range") for headers in store.asked("model.safetensors")] == [None, "bytes=700000-"]
    assert (made / "model.safetensors").read_bytes() == WEIGHTS


def test_missing_models_revisions_and_weights_are_told_apart(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pickled = Model({"config.json": b"{}", "pytorch_model.bin": b"x"})
    bare = Model({"model.safetensors": WEIGHTS})
    with running_hub(org__name=Model(SMALL), org__pickled=pickled, org__bare=bare) as hub:
        assert "There is no model org/other" in refusal(hub, online, tmp_path, ModelId("org/other"))
        assert "has no branch, tag or commit 'v9'" in refusal(hub, online, tmp_path, ModelId("org/name", "v9"))
        assert "has no safetensors weights (it has .bin)" in refusal(hub, online, tmp_path, ModelId("org/pickled"))
        assert "has no config.json" in refusal(hub, online, tmp_path, ModelId("org/bare"))
        assert not list(tmp_path.glob(".download-*"))
        assert fetched(hub, online, tmp_path, ModelId("org/name", "main")).name == "org--name@main"


def test_offline_is_said_and_a_wish_to_stay_offline_is_kept(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running_hub(org__name=Model(SMALL)) as hub:
        nobody = Hub(f"http://127.0.0.1:{free_port()}", {}, [])
        assert f"Cannot reach {nobody.url.removeprefix('http://')}" in refusal(nobody, online, tmp_path)
        online.setenv("HF_HUB_OFFLINE", "1")
        assert "HF_HUB_OFFLINE is set" in refusal(hub, online, tmp_path) and not hub.seen


def test_a_slow_download_is_cancelled_within_a_second_and_goes_on_later(
    online: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = Model(SMALL, bytes_a_second=1_000_000)
    asked, at = threading.Event(), [0.0]

    def watch(done: int, total: int) -> None:
        if done >= 500_000 and not asked.is_set():
            at[0] = time.monotonic()
            asked.set()

    with running_hub(org__name=model) as hub:
        with pytest.raises(Cancelled, match="What has arrived is kept"):
            fetched(hub, online, tmp_path, on_progress=watch, cancelled=asked.is_set)
        assert time.monotonic() - at[0] < 1.0
        kept = parts_bytes(tmp_path)
        time.sleep(0.3)
        assert parts_bytes(tmp_path) == kept >= 400_000  # nobody writes on
        model.bytes_a_second = None
        hub.seen.clear()
        made = fetched(hub, online, tmp_path)
        assert "range" in hub.asked("model.safetensors")[0]
    assert (made / "model.safetensors").read_bytes() == WEIGHTS


def test_no_room_is_seen_before_a_byte_is_fetched(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online.setattr(hubs, "free_bytes", lambda path: hubs.LEFT_FREE_BYTES + 1_000_000)
    with running_hub(org__name=Model(SMALL)) as hub:
        said = refusal(hub, online, tmp_path)
        assert "There is no room for org/name: 2.1 MB are still to come, 537.9 MB are free" in said
        assert not [path for _, path, _ in hub.seen if "/resolve/" in path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_fills_up_on_the_way_is_said(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = tmp_path / f".download-{ID.folder}" / "parts"
    parts.mkdir(parents=True)
    (parts / f"model.safetensors.{hashlib.sha256(WEIGHTS).hexdigest()[:16]}").symlink_to("/dev/full")
    with running_hub(org__name=Model(SMALL)) as hub:
        assert "The disk is full. What has arrived (0.0 MB) is kept" in refusal(hub, online, tmp_path)


def test_a_second_download_of_the_same_model_is_refused_in_words(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    staging = tmp_path / f".download-{ID.folder}"
    staging.mkdir()
    lock = FileLock(staging / "lock")
    lock.acquire({"pid": 4711})
    with running_hub(org__name=Model(SMALL)) as hub:
        assert "is being downloaded already (by process 4711)" in refusal(hub, online, tmp_path)
        assert not hub.seen and not hubs.unfinished(tmp_path)
        lock.release()
        made = fetched(hub, online, tmp_path)
        with pytest.raises(Refusal, match="is here already, as org--name"):
            fetched(hub, online, tmp_path)
    assert made.is_dir()


def test_an_end_just_before_the_last_rename_costs_no_byte(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with running_hub(org__name=Model(SMALL)) as hub:
        with online.context() as broken:
            broken.setattr(hubs.os, "rename", fails)
            assert "Input/output error. What has arrived is kept" in refusal(hub, online, tmp_path)
        total = sum(len(content) for content in SMALL.values())
        assert hubs.unfinished(tmp_path)[0].done_bytes >= total
        hub.seen.clear()
        made = fetched(hub, online, tmp_path)
        assert [path for _, path, _ in hub.seen] == ["/api/models/org/name"]
    assert (made / "model.safetensors").read_bytes() == WEIGHTS


def test_what_arrived_can_be_thrown_away(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running_hub(org__name=Model(SMALL, wrong_digest="model.safetensors")) as hub:
        refusal(hub, online, tmp_path)
    assert parts_bytes(tmp_path) > 0
    hubs.discard(tmp_path, ID)
    assert not list(tmp_path.glob(".download-*"))
    with pytest.raises(Refusal, match="Nothing of org/name"):
        hubs.discard(tmp_path, ID)


def test_the_command_downloads_and_train_says_how_to(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "trainer", *arguments, "--workspace", str(tmp_path / "w")]
        return subprocess.run(line, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=60)

    config = tmp_path / "config.json"
    config.write_text('{"model_path": "org/name"}')
    for arguments in (("train", "--config", str(config)), ("smoke", "--config", str(config), "--model", "org/name")):
        done = command(*arguments)
        assert done.returncode == 2 and "python -m trainer download org/name" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    with running_hub(org__name=Model(SMALL)) as hub:
        online.setenv("HF_ENDPOINT", hub.url)
        online.setenv("HF_TOKEN", "hf_secret")
        done = command("download", "org/name")
        assert done.returncode == 0 and "org--name" in done.stdout and "hf_secret" not in done.stdout + done.stderr
    done = command("download", "org/name")  # the hub is gone, the model is not
    assert done.returncode == 0 and "is here already" in done.stderr and "org--name" in done.stdout
    done = command("train", "--config", str(config))
    assert done.returncode == 2 and "No data is chosen" in done.stderr  # the model was found
