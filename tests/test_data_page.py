"""The Data page: uploads that are whole or not there, reports in words, rows as tokens, nothing foreign run as markup."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningApp
from trainer.data.conversation import PROBLEM_NAMES
from trainer.data.doctor import check_data
from ui.report import FIXES, LINES_SHOWN, data_view

XSS = "<img src=x onerror='window.__x=1'><script>window.__x=1</script>"


def row(answer: str = "four", **more: Any) -> str:
    """One good line."""
    messages = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, **more})


def upload(app: RunningApp, content: bytes, name: str, declared: int | None = None) -> tuple[int, dict[str, Any]]:
    """Send a file as the page does; `declared` lies about its size."""
    connection = http.client.HTTPConnection(app.url.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", f"/api/data/upload?name={urllib.parse.quote(name)}")
    connection.putheader("content-length", str(len(content) if declared is None else declared))
    connection.endheaders()
    connection.send(content)
    if declared is not None and declared > len(content):
        connection.sock.shutdown(1)  # the browser went away in the middle
    reply = connection.getresponse()
    answer = json.loads(reply.read() or b"{}")
    connection.close()
    return reply.status, answer


def report(app: RunningApp, item: str) -> dict[str, Any]:
    """The report on a dataset, once its check has ended."""
    deadline = time.monotonic() + 60
    while (found := app.get(f"api/data/{item}"))["state"] in ("running", "not-run"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_every_kind_of_problem_has_words_for_what_to_do() -> None:
    assert set(FIXES) == set(PROBLEM_NAMES)


def test_a_report_names_kinds_lines_and_fixes(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    bad = ['{"messages": [', json.dumps({"messages": [{"role": "user", "content": "hello"}]})]
    path.write_text("\n".join([row(), row("4"), bad[0], *[bad[1]] * 30]) + "\n")
    view = data_view(check_data(path))
    assert view["status"] == "warning" and view["word"] == "31 with problems"
    assert view["headline"].startswith("2 of 33 rows are usable. 31 have problems: 30 no answer")
    first = view["groups"][0]
    assert first["title"] == "30 no answer" and first["fix"] == FIXES["no_answer"]
    assert len(first["lines"]) == LINES_SHOWN and first["more"] == 30 - LINES_SHOWN
    assert first["lines"][0].startswith("Line 4:")
    assert ["Rows", "33, usable 2"] in view["facts"]


def test_a_good_file_is_good_and_one_without_a_usable_row_is_a_problem(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(row() + "\n")
    bad.write_text("{}\n")
    assert (data_view(check_data(good))["status"], data_view(check_data(bad))["status"]) == ("pass", "problem")


def test_an_upload_is_stored_checked_and_reported(app: RunningApp) -> None:
    content = "\n".join([row(f"{n}") for n in range(12)] + ["nonsense"]).encode()
    status, answer = upload(app, content, "support chats.jsonl")
    assert status == 201
    found = report(app, answer["id"])
    assert found["view"]["headline"] == "12 of 13 rows are usable. 1 has a problem: 1 bad JSON."
    assert Path(found["path"]).read_bytes() == content
    listed = {item["id"]: item for item in app.get("api/data")["items"]}
    assert listed[answer["id"]]["cells"][0] == "13", "the list says how many rows the doctor counted"
    assert list((app.workspace / "uploads").iterdir()) == []


def test_a_file_without_a_manifest_shows_its_count_once_it_is_checked(app: RunningApp) -> None:
    (app.workspace / "datasets" / "laid-there.jsonl").write_text(row("by hand") + "\n" + row("as well") + "\n")

    def listed() -> dict[str, Any]:
        return next(item for item in app.get("api/data")["items"] if item["name"] == "laid-there.jsonl")

    assert listed()["cells"][0] == "–"
    assert post(app, f"api/data/{listed()['id']}/check", {})["job"]
    report(app, listed()["id"])
    assert listed()["cells"][0] == "2"


@pytest.mark.parametrize(
    "name",
    ["../../escape.jsonl", "/etc/cron.d/x.jsonl", "..\\..\\x.jsonl", "a\x00b.jsonl", "\u202egpj.jsonl", "x" * 300 + ".jsonl",
     "CON.jsonl", ".bashrc.jsonl", XSS + ".jsonl", "manifest.json", "   .jsonl", "a\nb.jsonl", "日本語.jsonl"],
)  # fmt: skip
def test_a_name_never_leaves_the_datasets_own_folder(app: RunningApp, name: str) -> None:
    before = {path for path in app.workspace.rglob("*") if "datasets" not in path.parts and "cache" not in path.parts}
    content = row(f"for {name!r}").encode()
    status, answer = upload(app, content, name)
    if status == 400:
        assert answer["error"]
        return
    path = Path(app.get(f"api/data/{answer['id']}")["path"])
    assert path.parent == app.workspace / "datasets" / answer["id"]
    assert path.read_bytes() == content
    after = {path for path in app.workspace.rglob("*") if "datasets" not in path.parts and "cache" not in path.parts}
    assert {path for path in after - before if "jobs" not in path.parts} == set()


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [(b"", "empty.jsonl", "empty"), (b"a,b\n1,2\n", "table.xlsx", "JSON Lines"), (b"PAR1", "x.zip", "JSON Lines"),
     (b"x", "model.pkl", "JSON Lines"), (b"x", "", "JSON Lines")],
)  # fmt: skip
def test_what_is_no_data_is_refused_before_it_is_stored(app: RunningApp, content: bytes, name: str, words: str) -> None:
    before = len(app.get("api/data")["items"])
    status, answer = upload(app, content, name)
    assert status == 400 and words in answer["error"] and "Nothing was stored" in answer["error"]
    assert len(app.get("api/data")["items"]) == before


def test_an_upload_over_the_limit_is_refused_by_its_declared_size(app: RunningApp) -> None:
    status, answer = upload(app, b"", "big.jsonl", declared=2_000_000_001)
    assert status == 413 and "2 GB" in answer["error"]


def test_an_upload_that_breaks_off_leaves_nothing(app: RunningApp) -> None:
    before = len(app.get("api/data")["items"])
    try:
        status, _ = upload(app, row("broken off").encode(), "half.jsonl", declared=10_000)
        assert status == 400
    except (http.client.RemoteDisconnected, ConnectionError):
        pass  # the server may as well just hang up on a client that left
    deadline = time.monotonic() + 10
    while list((app.workspace / "uploads").iterdir()):
        assert time.monotonic() < deadline, "the part that came is still there"
        time.sleep(0.05)
    assert len(app.get("api/data")["items"]) == before


def test_an_upload_that_would_fill_the_disk_is_refused_with_figures(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from trainer.refusal import Refusal
    from ui import data_api

    monkeypatch.setattr(data_api.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(Refusal, match=r"needs 1\.3 GB of free disk for a moment; 1\.0 GB is free"):
        data_api._check_upload(site, "a.jsonl", 400 * 10**6)
    data_api._check_upload(site, "a.jsonl", 200 * 10**6)


def test_the_same_file_twice_is_one_dataset(app: RunningApp) -> None:
    content = row("twice").encode()
    first, second = upload(app, content, "one.jsonl")[1], upload(app, content, "two.jsonl")[1]
    assert first["id"] == second["id"]


@pytest.mark.parametrize("path", ["api/data/none", "api/data/..%2f..%2fetc", "api/data/none/row?model=x"])
def test_a_dataset_that_is_not_there_is_said(app: RunningApp, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        app.get(path)
    with refused.value as reply:
        assert reply.code in (400, 404)


@pytest.mark.parametrize(
    "body", [b"[]", b"{", b'"x"', b"[" * 100_000, b'{"model": 7}', b'{"model": {"a": 1}}', b'{"model": "none"}']
)
def test_a_check_asked_for_with_nonsense_is_refused_and_changes_nothing(app: RunningApp, body: bytes) -> None:
    item = upload(app, row("nonsense").encode(), "nonsense.jsonl")[1]["id"]
    before = report(app, item)
    request = urllib.request.Request(f"{app.url}/api/data/{item}/check", body, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    with refused.value as reply:
        assert reply.code == 400 and json.load(reply)["error"]
    assert report(app, item) == before


def test_a_report_counts_as_none_when_the_file_has_changed(site: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    from trainer.workspace import Workspace
    from ui.data_api import data_shelf

    root = tmp_path / "root"
    root.mkdir()
    (root / "mine.jsonl").write_text(row() + "\n")
    here = replace(site, workspace=Workspace(site.workspace.root, data_roots=(root,)))
    shelf = data_shelf(here)
    item = shelf._items()[0]
    assert shelf.standing(item).state == "not-run"
    shelf.start(item, {})
    deadline = time.monotonic() + 60
    while shelf.standing(item).state == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert shelf.standing(item).view["status"] == "pass"  # type: ignore[index]
    (root / "mine.jsonl").write_text(row() + "\nnonsense\n")
    assert shelf.standing(shelf._items()[0]).state == "not-run"


@pytest.fixture(scope="module")
def model_in(app: RunningApp, tiny_model: Path) -> str:
    """The tiny model inside the server's workspace."""
    import shutil

    shutil.copytree(tiny_model, app.workspace / "models" / "tiny", dirs_exist_ok=True)
    return "tiny"


def test_a_row_is_shown_as_tokens_with_the_answer_marked(app: RunningApp, model_in: str) -> None:
    item = upload(app, (row("The answer is four.") + "\n").encode(), "tokens.jsonl")[1]["id"]
    shown = app.get(f"api/data/{item}/row?row=1&model={model_in}&profile=plain")
    learned = "".join(text for text, kind in shown["tokens"] if kind == "label")
    assert learned.startswith("The answer is four.")
    assert "two and two?" in "".join(text for text, kind in shown["tokens"] if kind == "context")
    assert shown["counts"]["label"] == sum(kind == "label" for _, kind in shown["tokens"])


def test_lengths_are_measured_with_the_chosen_model(app: RunningApp, model_in: str) -> None:
    item = upload(app, "\n".join(row("word " * n) for n in range(1, 30)).encode(), "lengths.jsonl")[1]["id"]
    report(app, item)
    body = json.dumps({"model": model_in, "profile": "plain", "max_length": 64}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{app.url}/api/data/{item}/check", body, method="POST"), timeout=20)
    view = report(app, item)["view"]
    facts = dict(view["facts"])
    assert "all 29 rows measured" in facts["Length"] and "over 64 tokens" in facts["Too long"]
    assert sum(view["bars"]["counts"]) == 29 and view["bars"]["limit"] == 64


@pytest.mark.browser
def test_a_person_adds_a_file_and_reads_what_is_wrong_with_it(
    app: RunningApp, page: Any, tmp_path: Path, model_in: str
) -> None:
    path = tmp_path / "by hand.jsonl"
    path.write_text("\n".join([row("by hand"), "nonsense"]))
    page.goto(f"{app.url}/data")
    page.wait_for_selector(".sb-upload")
    assert "Up to 2.0 GB" in page.inner_text(".sb-upload")
    page.set_input_files("#sb-upload", str(path))
    page.wait_for_function("document.querySelector('.sb-shelf-report')?.innerText.includes('1 of 2 rows are usable')")
    assert page.inner_text(".sb-shelf-report h2") == "by hand.jsonl"
    assert page.url.startswith(f"{app.url}/data#"), "the address leads back to this dataset"
    assert "Line 2:" in page.inner_text(".sb-lines")
    page.wait_for_selector(".sb-tok-label")
    assert page.inner_text(".sb-tok-label >> nth=0")
    assert "by hand" in "".join(page.locator(".sb-tokens .sb-tok-label").all_inner_texts())


@pytest.mark.browser
def test_a_file_over_the_limit_is_refused_before_it_is_sent(app: RunningApp, page: Any, tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    with open(path, "wb") as file:
        file.truncate(2_000_000_001)  # sparse: takes no disk
    sent: list[str] = []
    page.on("request", lambda request: "upload" in request.url and sent.append(request.url))
    page.goto(f"{app.url}/data")
    page.wait_for_selector(".sb-upload")
    page.set_input_files("#sb-upload", str(path))
    page.wait_for_function("document.querySelector('.sb-upload-said').innerText.includes('--data-root')")
    assert sent == []


@pytest.mark.browser
def test_markup_in_names_rows_and_messages_is_shown_and_never_run(
    app: RunningApp, page: Any, tmp_path: Path, model_in: str
) -> None:
    hostile = json.dumps({"messages": [{"role": XSS, "content": XSS}, {"role": "assistant", "content": XSS}]})
    content = "\n".join([row(XSS), hostile, XSS])
    item = upload(app, content.encode(), f"{XSS}.jsonl")[1]["id"]
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message) or dialog.dismiss())
    page.goto(f"{app.url}/data#{item}")
    page.wait_for_function("document.querySelector('.sb-shelf-report')?.innerText.includes('1 of 3 rows')")
    page.evaluate("document.querySelectorAll('.sb-checks details').forEach((details) => (details.open = true))")
    page.wait_for_selector(".sb-tok-label")
    assert "<img" in page.inner_text(".sb-tokens") and "<img" in page.inner_text(".sb-checks")
    page.wait_for_timeout(300)
    assert page.evaluate("window.__x") is None and dialogs == []
    assert page.locator(".sb-shelf img, .sb-shelf script").count() == 0


# ---- formats, mapping, repaired copies


def post(app: RunningApp, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a POST answers; a refusal's sentence under "error"."""
    request = urllib.request.Request(f"{app.url}/{path}", json.dumps(body).encode(), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as refused:
        with refused as reply:
            return json.load(reply)


def test_columns_are_previewed_saved_with_the_data_and_read_from_then_on(app: RunningApp, model_in: str) -> None:
    item = upload(app, b"question,answer\nwhat is it?,a lever\nwho?,the signalman\n", "pairs.csv")[1]["id"]
    view = report(app, item)["view"]
    assert view["status"] == "problem" and view["suggested"] == ["user=question", "assistant=answer"]
    shown = post(app, f"api/data/{item}/preview", {"columns": ["user=answer", "assistant=question"]})
    assert [turn["content"] for turn in shown["rows"][0]["messages"]] == ["a lever", "what is it?"]
    assert "no part of a row" in post(app, f"api/data/{item}/columns", {"columns": ["role=answer"]})["error"]
    assert post(app, f"api/data/{item}/columns", {"columns": view["suggested"]}) == {"columns": view["suggested"]}
    view = report(app, item)["view"]
    assert view["status"] == "pass" and dict(view["facts"])["Format"].startswith("Mapped columns: user from 'question'")
    tokens = app.get(f"api/data/{item}/row?row=1&model={model_in}&profile=plain")["tokens"]
    assert "".join(text for text, kind in tokens if kind == "label").startswith("a lever")


def test_a_repaired_copy_is_a_version_with_its_rejects_and_the_original_stays(app: RunningApp) -> None:
    lines = [row("kept"), row("kept"), "nonsense", json.dumps({"messages": [{"role": "user", "content": "q"}]})]
    item = upload(app, "\n".join(lines).encode(), "broken.jsonl")[1]["id"]
    original = report(app, item)
    assert original["view"]["repairable"]
    job = post(app, f"api/data/{item}/repair", {})["job"]
    deadline = time.monotonic() + 60
    while (found := app.get(f"api/data-jobs/{job}"))["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    made = found["result"]
    assert made["name"] == "broken-repaired.jsonl" and made["summary"].startswith("Kept 1 of 4 rows.")
    assert report(app, made["id"])["view"]["status"] == "pass"
    about = app.get(f"api/data/{made['id']}/about")
    assert about["parent"] == {"id": item, "name": "broken.jsonl"} and about["rejects"] and about["runs"] == 0
    assert app.get(f"api/data/{item}/about")["versions"] == [{"id": made["id"], "name": made["name"]}]
    with urllib.request.urlopen(f"{app.url}/api/data/{made['id']}/rejects", timeout=20) as reply:
        left = [json.loads(line) for line in reply.read().splitlines()]
        assert "broken-repaired-left-out.jsonl" in reply.headers["content-disposition"]
    assert [(each["line"], each["code"]) for each in left] == [(2, "duplicate"), (3, "bad_json"), (4, "no_answer")]
    assert Path(report(app, item)["path"]).read_text() == "\n".join(lines)
    again = post(app, f"api/data/{made['id']}/repair", {})["job"]
    while (found := app.get(f"api/data-jobs/{again}"))["state"] == "running":
        time.sleep(0.1)
    assert "nothing to repair" in found["error"]


def test_data_is_deleted_by_its_name_and_not_while_a_run_needs_it(site: Any, tmp_path: Path) -> None:
    from trainer import datasets
    from trainer.refusal import Refusal
    from trainer.run import create_run

    file = tmp_path / "d.jsonl"
    file.write_text(row())
    info = site.workspace.add_dataset(file, "mine.jsonl")
    config = {"data": {"dataset_path": "other.jsonl", "dataset_paths": [{"path": str(info.path), "weight": 1}]}}
    run = create_run(site.workspace.runs, {"config": config}, None, {"name": "night"})
    (use,) = datasets.used_by(site.workspace, info)
    assert (use.run_id, use.name) == (run.run_id, "night")
    with pytest.raises(Refusal, match="type: mine.jsonl"):
        datasets.delete_dataset(site.workspace, info, "theirs")
    if use.is_live:  # a run that was never started waits for its turn
        with pytest.raises(Refusal, match="The run night needs this data"):
            datasets.delete_dataset(site.workspace, info, "mine.jsonl")
    import shutil

    shutil.rmtree(run.path)
    assert datasets.delete_dataset(site.workspace, info, "mine.jsonl") == [] and not info.path.exists()
    (tmp_path / "root").mkdir()
    loose = tmp_path / "root" / "loose.jsonl"
    loose.write_text(row())
    from trainer.workspace import Workspace

    rooted = Workspace(site.workspace.root, data_roots=(tmp_path / "root",))
    (own,) = [each for each in rooted.datasets() if each.path == loose]
    for act in (
        lambda: datasets.delete_dataset(rooted, own, "loose.jsonl"),
        lambda: datasets.save_columns(own, ["text=a"]),
    ):
        with pytest.raises(Refusal, match="data root"):
            act()
    assert loose.exists()


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.parquet", "d.json.gz", "d.jsonl.gz"])
def test_every_format_that_is_read_can_be_uploaded(app: RunningApp, name: str) -> None:
    assert upload(app, b"prompt,completion\nq,a\n" + name.encode(), name)[0] == 201


def test_held_out_rows_and_exact_lengths_are_asked_for_on_the_page(app: RunningApp, model_in: str) -> None:
    same = row("a shared answer")
    item = upload(app, "\n".join([same, *(row("w " * n) for n in range(2, 9))]).encode(), "train.jsonl")[1]["id"]
    held = upload(app, "\n".join([same, row("held out")]).encode(), "held.jsonl")[1]["id"]
    report(app, item)
    post(app, f"api/data/{item}/check", {"model": model_in, "profile": "plain", "held_out": held, "exact": True})
    view = report(app, item)["view"]
    assert any(group["title"].startswith("1 of 2 held-out rows") for group in view["groups"])
    assert "all 8 rows measured" in dict(view["facts"])["Length"]
    assert list((app.workspace / "cache" / "tokens").glob("*/cache.json"))
    refused = post(app, f"api/data/{item}/check", {"held_out": "/etc/passwd"})
    assert "no longer there" in refused["error"]


@pytest.mark.browser
def test_a_person_maps_columns_and_uses_the_repaired_copy(app: RunningApp, page: Any, model_in: str) -> None:
    csv = (
        "question,answer\n"
        + "".join(f"what is {n}?,lever {n}\n" for n in range(5))
        + "no answer here,\nwhat is 1?,lever 1\n"
    )
    item = upload(app, csv.encode(), "by-hand.csv")[1]["id"]
    report(app, item)
    page.goto(f"{app.url}/data#{item}")
    page.wait_for_selector(".sb-preview-row")
    assert page.input_value("#sb-map-user") == "question" and page.input_value("#sb-map-assistant") == "answer"
    page.select_option("#sb-map-user", "answer")
    page.select_option("#sb-map-assistant", "question")
    page.wait_for_function("/lever 0/.test(document.querySelector('.sb-preview-turn').innerText)")
    page.select_option("#sb-map-assistant", "")
    page.wait_for_function("/names user and assistant/.test(document.querySelector('.sb-mapping').innerText)")
    assert page.get_by_role("button", name="Use these columns").is_disabled()
    page.select_option("#sb-map-user", "question")
    page.select_option("#sb-map-assistant", "answer")
    page.wait_for_function("document.querySelectorAll('.sb-preview-row').length === 3")
    page.get_by_role("button", name="Use these columns").click()
    page.wait_for_function("/6 of 7 rows are usable/.test(document.querySelector('.sb-shelf-report').innerText)")
    page.wait_for_selector(".sb-tok-label")
    page.get_by_role("button", name="Text", exact=True).click()
    assert "lever 0" in page.inner_text(".sb-row-said >> nth=-1")
    page.get_by_role("button", name="Use the repaired copy").click()
    page.wait_for_function("document.querySelector('.sb-shelf-report h2')?.innerText === 'by-hand-repaired.jsonl'")
    page.wait_for_function("/Kept 5 of 7 rows/.test(document.querySelector('.sb-shelf-more').innerText)")
    with page.expect_download() as download:
        page.get_by_text("Download the rows left out").click()
    left = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [each["code"] for each in left] == ["empty_answer", "duplicate"]
    page.get_by_text("Delete this data…").click()
    page.fill("#sb-delete-name", "by-hand-repaired.jsonl")
    page.get_by_role("button", name="Delete for good").click()
    page.wait_for_function("!document.querySelector('.sb-shelf-list').innerText.includes('by-hand-repaired')")
