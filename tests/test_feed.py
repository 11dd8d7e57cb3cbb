"""The feed: only what is new, small, whole after a reset, honest about NaN, and the same for every reader."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import ui.feed
from tests.made_runs import SPIKE_LOSS, MadeRun, write_long_run
from trainer import control
from trainer.engine import Engine
from trainer.events import read_events
from trainer.worker import Worker
from trainer.workspace import Workspace
from ui.guard import Guard, Rules
from ui.site import Site

UPDATE_BYTES = 512
LONG = 100_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    workspace = Workspace(tmp_path_factory.mktemp("feed") / "workspace").create()
    engine = Engine(workspace, Worker())
    yield Site(workspace, engine, engine.worker, None, None, Path("config.json"))  # type: ignore[arg-type]
    engine.shutdown(5)


@pytest.fixture(scope="module")
def client(site: Site) -> TestClient:
    return TestClient(Guard(Starlette(routes=ui.feed.routes(site)), Rules()), base_url="http://localhost")


@pytest.fixture(scope="module")
def viewer(site: Site) -> TestClient:
    """Somebody on the share socket; the test client says it is port 80."""
    guard = Guard(Starlette(routes=ui.feed.routes(site)), Rules(share_port=80))
    return TestClient(guard, base_url="http://localhost")


@pytest.fixture
def made(site: Site) -> Iterator[MadeRun]:
    run = MadeRun(site.workspace.runs).start()
    yield run
    run.lock.release()


def update(client: TestClient, run_id: str, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The next update after `before`, as live.js asks for it."""
    ask = "" if before is None else f"?gen={before['gen']}&since={before['next']}&h={before['h']}"
    reply = client.get(f"/api/runs/{run_id}/feed{ask}")
    assert reply.status_code == 200, reply.text
    return {"h": (before or {}).get("h"), "bytes": len(reply.content)} | reply.json()


def test_the_first_answer_holds_everything_and_the_next_only_what_is_new(client: TestClient, made: MadeRun) -> None:
    for _ in range(5):
        made.step()
    first = update(client, made.run_id)
    assert first["reset"] and first["state"] == "running" and first["step"] == 5 and first["total"] == 200
    assert first["history"]["m"]["loss"][0] == [1, 2, 3, 4, 5]
    made.step()
    second = update(client, made.run_id, first)
    assert not second["reset"] and second["m"]["step"] == [6] and "e" not in second and "s" not in second
    third = update(client, made.run_id, second)
    assert "m" not in third and "t" not in third and third["next"] == second["next"]


@pytest.mark.parametrize("gpu", [False, True])
def test_an_update_with_one_step_and_one_sample_is_half_a_kibibyte(client: TestClient, site: Site, gpu: bool) -> None:
    made = MadeRun(site.workspace.runs, gpu=gpu).start(2_000_000)
    made.step(step=1_234_566)
    before = update(client, made.run_id)
    made.step(loss=1.23456789, seconds=0.3612345)
    after = update(client, made.run_id, before)
    made.lock.release()
    assert after["m"]["step"] == [1_234_567] and len(after["t"]["t"]) == 1
    assert after["bytes"] <= UPDATE_BYTES


def test_a_hundred_thousand_steps_open_thinned_with_spike_and_nan_and_update_as_small(
    client: TestClient, site: Site
) -> None:
    sizes, updates = {}, {}
    for steps in (10_000, LONG):
        made = MadeRun(site.workspace.runs).start(LONG)
        write_long_run(made, steps, spike_at=steps // 3, nan_at=steps // 2)
        first = update(client, made.run_id)
        x, y = first["history"]["m"]["loss"]
        assert len(x) == len(y) <= 2000 and x == sorted(x) and x[0] <= 64 and x[-1] >= steps - 64
        assert y[x.index(steps // 3)] == SPIKE_LOSS and y[x.index(steps // 2)] == "nan"
        for name, (steps_of, values) in first["history"]["m"].items():
            assert len(steps_of) == len(values) <= 2000, name
        assert all(len(values) <= 2000 for _, values in first["history"]["t"].values())
        made.step()
        began = time.perf_counter()
        updates[steps] = update(client, made.run_id, first)["bytes"]
        assert time.perf_counter() - began < 0.2
        sizes[steps] = first["bytes"]
        made.lock.release()
    assert updates[LONG] <= UPDATE_BYTES and abs(updates[LONG] - updates[10_000]) < 20
    assert sizes[LONG] < 1.5 * sizes[10_000]


def test_the_smoothed_line_is_made_of_means_not_of_extremes(client: TestClient, site: Site) -> None:
    made = MadeRun(site.workspace.runs).start(LONG)
    write_long_run(made, 20_000, spike_at=7, nan_at=9)
    steps, means = update(client, made.run_id)["history"]["m"]["mean"]
    made.lock.release()
    assert all(abs(mean - 1.5) < 0.3 for mean in means[1:]) and steps[-1] == 20_000


def test_bins_stay_where_they_are_while_points_arrive(client: TestClient, site: Site) -> None:
    made = MadeRun(site.workspace.runs).start(LONG)
    write_long_run(made, 9_000, spike_at=10, nan_at=20)
    before = update(client, made.run_id)["history"]["m"]["loss"][0]
    for _ in range(40):
        made.step()
    after = update(client, made.run_id)["history"]["m"]["loss"][0]
    made.lock.release()
    assert after[: len(before) - 4] == before[: len(before) - 4]


def test_nan_and_infinity_travel_as_words_and_never_as_zero(client: TestClient, made: MadeRun) -> None:
    first = update(client, made.run_id)
    for loss in (float("nan"), float("inf"), float("-inf"), 1.5):
        made.step(loss=loss)
    second = update(client, made.run_id, first)
    assert second["m"]["loss"] == ["nan", "inf", "-inf", 1.5]
    assert "allocated_gib" not in second["t"]  # not measurable here: absent, not null and not 0


def test_a_resume_and_a_rewind_raise_gen_and_replaced_points_come_anew(client: TestClient, made: MadeRun) -> None:
    for _ in range(10):
        made.step(loss=9.0)
    before = update(client, made.run_id)
    for event in ({"kind": "rewind", "step": 5}, {"kind": "resumed", "owner": "x"}):
        made.events.append(event["kind"], **{k: v for k, v in event.items() if k != "kind"})
        made.step(loss=1.0, step=6)
        after = update(client, made.run_id, before)
        assert after["reset"] and after["gen"] == before["gen"] + 1
        assert after["history"]["m"]["loss"] == [[1, 2, 3, 4, 5, 6], [9, 9, 9, 9, 9, 1]]
        before = after


@pytest.mark.parametrize(
    "since", ["", "x", "1-2", "-1-0-0", "999999-0-0", "0-0-99999999", "9" * 40, "1-1-1", "../..", "٣-0-0"]
)
def test_a_cursor_that_does_not_fit_gets_the_whole_history(client: TestClient, made: MadeRun, since: str) -> None:
    made.step()
    reply = client.get(f"/api/runs/{made.run_id}/feed", params={"gen": "1", "since": since, "h": "z" * 3000})
    assert reply.status_code == 200 and reply.json()["reset"] is True


def test_a_reader_far_behind_gets_the_thinned_history_instead_of_every_point(client: TestClient, site: Site) -> None:
    made = MadeRun(site.workspace.runs).start(LONG)
    first = update(client, made.run_id)
    write_long_run(made, 5_000, spike_at=10, nan_at=20)
    late = update(client, made.run_id, first)
    made.lock.release()
    assert late["reset"] and len(late["history"]["m"]["loss"][0]) <= 2000


def test_two_readers_in_turn_both_get_every_point(client: TestClient, made: MadeRun) -> None:
    one, two, seen = update(client, made.run_id), update(client, made.run_id), {1: [], 2: []}
    for number in range(1, 31):
        made.step()
        one = update(client, made.run_id, one)
        seen[1] += one.get("m", {}).get("step", [])
        if number % 7 == 0:
            two = update(client, made.run_id, two)
            seen[2] += two.get("m", {}).get("step", [])
    assert seen == {1: list(range(1, 31)), 2: list(range(1, 29))}


def test_events_come_once_and_long_histories_keep_the_newest_of_each_kind(client: TestClient, made: MadeRun) -> None:
    for step in range(700):
        made.events.append("log", text=f"line {step}")
    made.events.append("alert", code="spike", step=3, text="x" * 50_000)
    first = update(client, made.run_id)
    logs = [event["text"] for event in first["e"] if event["kind"] == "log"]
    assert logs[-1] == "line 699" and len(logs) == 300
    assert len(next(event["text"] for event in first["e"] if event["kind"] == "alert")) < 21_000
    made.events.append("eval", step=4, loss=1.5, rows=4, best=True)
    second = update(client, made.run_id, first)
    assert [event["kind"] for event in second["e"]] == ["eval"] and second["s"]["held_out"] == 1.5
    assert "e" not in update(client, made.run_id, second)


def test_hostile_text_in_events_is_delivered_as_text_and_half_characters_do_not_break_it(
    client: TestClient, made: MadeRun
) -> None:
    first = update(client, made.run_id)
    made.events.append("log", text="<img src=x onerror=alert(1)> \ud800 ok")
    with open(made.run.events, "ab") as file:
        file.write(b'{"n":99,"t":1,"kind":"log","text":"\\ud800 half"}\n')
    texts = [event["text"] for event in update(client, made.run_id, first)["e"]]
    assert texts[0].startswith("<img src=x onerror=alert(1)>") and texts[1].endswith("half")


def test_a_viewer_gets_curves_but_no_logs_samples_tracebacks_or_commands(viewer: TestClient, site: Site) -> None:
    made = MadeRun(site.workspace.runs).start()
    made.step()
    made.events.append("sample", step=1, prompt="secret row", text="secret", base=None)
    made.end("failed", cause="ValueError: bad", detail="Traceback: /secret/place")
    answer = update(viewer, made.run_id)
    assert answer["history"]["m"]["loss"][0] == [1] and answer["s"]["allowed"] == []
    assert "secret" not in json.dumps(answer)
    for path in ("rows?step=1", "row?row=7"):
        assert viewer.get(f"/api/runs/{made.run_id}/{path}").status_code == 403
    assert viewer.post(f"/api/runs/{made.run_id}/command", json={"command": "stop"}).status_code == 403
    assert "/secret/place" not in viewer.get(f"/api/runs/{made.run_id}/settings").text
    assert "/secret/place" not in viewer.get(f"/api/runs/{made.run_id}/checkpoints").text


def test_an_unknown_run_is_404_with_a_sentence_on_every_route(client: TestClient) -> None:
    for path in ("feed", "metrics.csv", "settings", "checkpoints", "rows?step=1", "row?row=1"):
        reply = client.get(f"/api/runs/20260101-000000-dead/{path}")
        assert reply.status_code == 404 and "There is no run '20260101-000000-dead'" in reply.json()["error"], path
    for path in ("command", "notes", "delete", "verify"):
        assert client.post(f"/api/runs/20260101-000000-dead/{path}", json={}).status_code == 404, path
    assert client.get("/api/runs/..%2f..%2fetc/feed").status_code == 404


@pytest.mark.parametrize("command", ["stop", "stop-now", "pause", "checkpoint"])
def test_a_command_is_left_for_the_trainer_with_the_role_of_who_gave_it(
    client: TestClient, made: MadeRun, command: str
) -> None:
    assert client.post(f"/api/runs/{made.run_id}/command", json={"command": command}).status_code == 202
    assert [(order.command, order.by) for order in control.take(made.run.control)] == [(command, "owner")]


def test_a_command_that_means_nothing_now_is_refused_in_words(client: TestClient, site: Site) -> None:
    made = MadeRun(site.workspace.runs).start()
    made.step()
    made.end("finished", step=1)
    reply = client.post(f"/api/runs/{made.run_id}/command", json={"command": "pause"})
    assert reply.status_code == 409
    assert reply.json()["error"] == "The run is finished, so it cannot be paused. Nothing was changed."
    for body in ({"command": "rm"}, {}, [], "stop", {"command": ["stop"]}):
        assert client.post(f"/api/runs/{made.run_id}/command", json=body).status_code == 400, body
    assert not list(made.run.control.iterdir())


def test_csv_holds_every_column_of_every_step_and_nan_as_nan(client: TestClient, made: MadeRun) -> None:
    made.step(loss=1.23456789012345)
    made.step(loss=float("nan"))
    reply = client.get(f"/api/runs/{made.run_id}/metrics.csv")
    rows = list(csv.DictReader(io.StringIO(reply.text)))
    assert [row["step"] for row in rows] == ["1", "2"] and float(rows[0]["loss"]) == 1.23456789012345
    assert rows[1]["loss"] == "nan" and rows[0]["tokens"] == "1843"
    assert reply.headers["content-disposition"] == f'attachment; filename="{made.run_id}.csv"'


def test_rows_of_a_step_come_with_their_own_loss(client: TestClient, made: MadeRun) -> None:
    made.step(loss=2.0)
    answer = client.get(f"/api/runs/{made.run_id}/rows?step=1").json()
    assert [(row["row"], row["loss"], row["labels"]) for row in answer["rows"]] == [(7, 2.0, 300), (3, 2.0, 200)]
    assert client.get(f"/api/runs/{made.run_id}/rows?step=99").json()["rows"] == []
    assert client.get(f"/api/runs/{made.run_id}/rows?step=x").status_code == 400


def test_the_header_names_the_running_run_and_else_the_machine(client: TestClient, site: Site, made: MadeRun) -> None:
    made.step()
    time.sleep(1.1)
    state = client.get("/api/state").json()
    assert state["run"]["run_id"] == made.run_id and state["run"]["step"] == 1 and state["run"]["total_steps"] == 200
    made.end("stopped", step=1, by="owner")
    time.sleep(1.1)
    state = client.get("/api/state").json()
    assert state["run"] is None and state["last"]["state"] == "stopped" and "GiB free" in state["machine"]


def test_alerts_somebody_has_seen_are_remembered_for_every_tab(client: TestClient, made: MadeRun) -> None:
    number = made.events.append("alert", code="spike", step=3, text="Loss 3.4 at step 3.")
    before = update(client, made.run_id)
    assert client.post(f"/api/runs/{made.run_id}/notes", json={"seen": [number]}).json()["seen"] == [number]
    assert update(client, made.run_id, before)["s"]["seen"] == [number]
    assert made.run.read_notes()["name"] == "made"  # the notes keep what else is in them
    for wrong in ({"seen": "all"}, {"seen": [True]}, {"name": 3}, {"why": "x" * 501}):
        assert client.post(f"/api/runs/{made.run_id}/notes", json=wrong).status_code == 400, wrong


def test_polling_writes_nothing_into_the_run(client: TestClient, made: MadeRun) -> None:
    made.step()
    before = {path: path.stat().st_mtime_ns for path in made.run.path.rglob("*")}
    update(client, made.run_id, update(client, made.run_id))
    assert {path: path.stat().st_mtime_ns for path in made.run.path.rglob("*")} == before
    assert len(read_events(made.run.events)[0]) == 6
