"""Drafts of the form: they survive, two tabs share one, nothing typed is lost, nobody reads another's."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.refusal import Refusal
from ui.drafts import Draft, Drafts

SESSION = "a1b2c3d4e5f6a1b2c3d4e5f6"
RATE = "hyperparams.learning_rate"


@pytest.fixture
def drafts(tmp_path: Path) -> Drafts:
    return Drafts(tmp_path / "drafts")


def test_a_draft_is_there_again_after_a_restart(tmp_path: Path, drafts: Drafts) -> None:
    drafts.change(SESSION, lambda d: d.with_value(RATE, "2e-").with_value("model_path", "/m"))
    again = Drafts(tmp_path / "drafts").read(SESSION)
    assert again.values == {RATE: "2e-", "model_path": "/m"}, "text that cannot be used yet is kept too"
    assert again.revision == 1


def test_a_session_sees_its_own_draft_only(drafts: Drafts) -> None:
    drafts.change(SESSION, lambda d: replace(d, name="mine"))
    assert drafts.read("f" * 24) == Draft()


def test_two_tabs_change_one_draft_key_by_key(drafts: Drafts) -> None:
    keys = ["model_path", RATE, "lora.r", "data.seed", "eval.eval_steps", "output.save_steps"]

    def tab(key: str) -> None:
        for number in range(20):
            drafts.change(SESSION, lambda d, n=number: d.with_value(key, str(n)))

    threads = [threading.Thread(target=tab, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    draft = drafts.read(SESSION)
    assert draft.values == dict.fromkeys(keys, "19")
    assert draft.revision == 20 * len(keys)


def test_a_change_that_changes_nothing_writes_nothing(tmp_path: Path, drafts: Drafts) -> None:
    drafts.change(SESSION, lambda d: d)
    assert not (tmp_path / "drafts").exists()


def test_revert_and_undo_bring_the_changes_back(drafts: Drafts) -> None:
    drafts.change(SESSION, lambda d: d.with_value(RATE, "1e-3", reason="with the method"))
    reverted = drafts.change(SESSION, Draft.reverted)
    assert reverted.values == {} and reverted.automatic == {}
    newer = drafts.change(SESSION, lambda d: d.with_value("lora.r", "8"))
    restored = drafts.change(SESSION, Draft.restored)
    assert newer.values == {"lora.r": "8"} and restored.values == {RATE: "1e-3", "lora.r": "8"}


def test_a_value_set_by_hand_is_no_longer_automatic() -> None:
    draft = Draft().with_value(RATE, "1e-5", reason="method")
    assert draft.with_value(RATE, "2e-5").automatic == {} and draft.without(RATE) == Draft()


def test_a_draft_that_cannot_be_read_is_kept_aside(tmp_path: Path, drafts: Drafts) -> None:
    drafts.change(SESSION, lambda d: d.with_value(RATE, "1e-3"))
    path = tmp_path / "drafts" / f"{SESSION}.json"
    for broken in (b"{", b"[]", b'{"values": 3}', b'{"revision": "x"}', b"\xff"):
        path.write_bytes(broken)
        assert drafts.read(SESSION) == Draft()
        assert path.with_suffix(".unreadable").read_bytes() == broken


def test_keys_that_settings_no_longer_have_are_left_out(tmp_path: Path, drafts: Drafts) -> None:
    drafts.change(SESSION, lambda d: replace(d, values={RATE: "1", "gone.key": "2"}))
    assert drafts.read(SESSION).values == {RATE: "1"}


@pytest.mark.parametrize("session", ["", "../x", "a/b", "short", "x" * 100, "a" * 23 + "."])
def test_only_a_session_names_a_file(drafts: Drafts, session: str) -> None:
    with pytest.raises(Refusal):
        drafts.read(session)


def test_a_draft_has_a_limit(drafts: Drafts) -> None:
    with pytest.raises(Refusal, match="200,000"):
        drafts.change(SESSION, lambda d: d.with_value("model_name", "x" * 200_001))
    assert drafts.read(SESSION) == Draft()
