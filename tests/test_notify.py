"""The webhook: what is told to whom, over a real socket; the address in no file of a run and in no answer of any route."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from tests import runs
from tests.made_runs import MadeRun
from tests.tiny import tiny_model_dir
from trainer import config as c
from trainer import control, notify, stall
from trainer.config import ConfigError, as_text
from trainer.events import all_events
from trainer.notify import Message, Notifier, last_result, message_of, payload, post, service_of
from trainer.refusal import Refusal
from trainer.run import Status, status
from trainer.stall import StallWatch, limit_s
from trainer.telemetry import Telemetry
from ui.form_state import form_state
from ui.guard import Caller, Guard, Rules
from ui.server import our_routes
from ui.site import Site
from ui.train_actions import Act, apply, check_rights

SECRET = "T0KEN-that-nobody-may-see"
KEY = "notify.webhook_url"
SLACK = f"https://hooks.slack.com/services/T1/B2/{SECRET}"
DISCORD = f"https://discord.com/api/webhooks/12/{SECRET}"
MESSAGE = Message(
    "failed", "run <!channel> @everyone *x*", "Cause & effect <script>", "20261123-1", "failed", 7, 10, 1.0
)


@dataclass
class Hook:
    """A real HTTP server that keeps what it is sent and answers as it is told."""

    answers: list[int] = field(default_factory=lambda: [200])
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    waits: threading.Event | None = None
    location: str = ""
    url: str = ""


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.got.append((self.path, dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            if found.waits is not None:
                found.waits.wait(30)
            self.send_response(found.answers[min(len(found.got), len(found.answers)) - 1])
            if found.location:
                self.send_header("Location", found.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *given: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}/{SECRET}"
    yield found
    if found.waits is not None:
        found.waits.set()
    server.shutdown()
    server.server_close()


# -- pure: services and payloads


@pytest.mark.parametrize(
    ("url", "service"),
    [
        (SLACK, "slack"),
        (DISCORD, "discord"),
        (f"{DISCORD}/slack", "slack"),
        ("https://ntfy.sh/my-topic", "ntfy"),
        ("https://ntfy.example.org/topic", "ntfy"),
        ("https://example.org/hooks.slack.com", "json"),
        ("https://hooks.slack.com.evil.org/x", "json"),
        ("https://evil-discord.com/api/webhooks/1", "json"),
    ],
)
def test_the_service_follows_from_the_host(url: str, service: str) -> None:
    assert service_of(url) == service


def test_no_name_or_cause_can_call_people_or_become_markup() -> None:
    slack = json.loads(payload("slack", MESSAGE)[0])["text"]
    assert "<" not in slack and "&lt;!channel&gt;" in slack and "Cause &amp; effect" in slack
    discord = json.loads(payload("discord", replace(MESSAGE, text="x" * 5000))[0])
    assert discord["allowed_mentions"] == {"parse": []} and len(discord["content"]) == 2000
    assert "\\*x\\*" in discord["content"]
    body, headers = payload("ntfy", replace(MESSAGE, title="läuft\r\nX-Evil: 1"))
    assert body == MESSAGE.text.encode() and all("\n" not in value and value.isascii() for value in headers.values())
    plain = json.loads(payload("json", MESSAGE)[0])
    assert plain["source"] == "signalbox" and plain["run_id"] == "20261123-1" and plain["step"] == 7


@pytest.mark.parametrize(
    ("state", "kind", "says"),
    [
        ("finished", "ended", "support has finished"),
        ("stopped", "ended", "support is stopped"),
        ("paused", "ended", "support is paused"),
        ("failed", "failed", "support has failed"),
        ("diverged", "failed", "support diverged"),
        ("interrupted", "failed", "support was cut off"),
    ],
)
def test_each_end_is_told_with_what_is_safe(state: Any, kind: str, says: str) -> None:
    now = Status("id", state, current_step=1312, total_steps=2000, loss=1.25, name="support", last_checkpoint_step=1300)
    told = message_of(replace(now, cause="out of memory"))
    assert told is not None and (told.kind, told.title) == (kind, says)
    assert "Step 1,312 of 2,000." in told.text and "Out of memory." in told.text and "Safe: step 1,300." in told.text
    for quiet in ("running", "preparing", "queued", "stopping"):
        assert message_of(replace(now, state=quiet)) is None


# -- sending


@pytest.mark.parametrize(
    ("answers", "tries", "ok"),
    [([200], 1, True), ([204], 1, True), ([404], 1, False), ([500, 503, 200], 3, True), ([429, 429, 429], 3, False)],
)
def test_faults_of_the_other_side_are_tried_again_twice(
    tmp_path: Path, hook: Hook, answers: list[int], tries: int, ok: bool
) -> None:
    hook.answers, waits = answers, []
    notify.keep_webhook(tmp_path, "r", hook.url)
    notifier = Notifier(tmp_path, sleep=waits.append)
    notifier.tell("r", MESSAGE)
    assert notifier.wait(10)
    result = last_result(tmp_path)
    assert result is not None and (len(hook.got), result.ok, result.host) == (tries, ok, "127.0.0.1")
    assert waits == list(notify.RETRY_AFTER_S[: tries - 1]) and SECRET not in (tmp_path / "notify.json").read_text()
    assert hook.got[0][0] == f"/{SECRET}" and json.loads(hook.got[0][2])["title"] == MESSAGE.title


def test_a_redirect_is_an_answer_and_is_not_followed(hook: Hook) -> None:
    hook.answers, hook.location = [302], hook.url + "/elsewhere"
    arrived, again, text = post(hook.url, b"{}", {})
    assert (arrived, again, len(hook.got)) == (False, False, 1) and "302" in text and SECRET not in text


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "gopher://h", "http://", "x", "https://a:0/b"])
def test_only_web_addresses_are_used(url: str) -> None:
    assert post(url, b"", {}) == (False, False, "The webhook is no http or https address.")


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid", "127.0.0.1:99999"])
def test_a_host_that_cannot_be_reached_is_said_without_the_address(host: str) -> None:
    arrived, _, text = post(f"http://{host}/{SECRET}", b"{}", {}, timeout_s=2)
    assert not arrived and SECRET not in text and text


def test_a_webhook_that_never_answers_holds_up_nobody(tmp_path: Path, hook: Hook) -> None:
    hook.waits = threading.Event()
    assert post(hook.url, b"{}", {}, timeout_s=0.3) == (False, True, "127.0.0.1 did not answer within 0.3 s.")
    notify.keep_webhook(tmp_path, "r", hook.url)
    notifier = Notifier(tmp_path, sleep=lambda seconds: None)
    began = time.monotonic()
    for _ in range(200):
        notifier.tell("r", MESSAGE)
    assert time.monotonic() - began < 1 and not notifier.wait(0.1)


# -- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("notify")
    return tiny_model_dir(root / "model"), runs.write_rows(root / "rows.jsonl")


def with_hook(config: Any, url: str) -> Any:
    return c.resolve(config.model_dump(), {"notify": {"webhook_url": url}})


def answers_of(site: Site, run_id: str, role: str) -> dict[str, str]:
    """What every GET route of ours and the run's commands answer to `role`, by address."""
    rules = Rules(share_port=80, viewers_see_rows=True) if role == "viewer" else Rules()
    client = TestClient(Guard(Starlette(routes=our_routes(site)), rules), base_url="http://localhost")
    answers = {}
    for route in our_routes(site):
        path = route.path.replace("{run_id}", run_id).replace("{version}", "x").replace("{name}", "live.js")
        for suffix in ("", "?step=1", "?row=0", "?n=1"):
            reply = client.get(path + suffix) if "GET" in (route.methods or ()) else None
            if reply is not None and "{" not in path:
                answers[path + suffix] = reply.text + str(dict(reply.headers))
    return answers


def test_a_run_tells_its_end_and_its_address_is_in_no_file_of_it_and_in_no_answer(
    site: Site, hook: Hook, place: tuple[Path, Path], tmp_path: Path
) -> None:
    config_path = tmp_path / "config.json"
    config_path.write_text(json.dumps({"notify": {"webhook_url": hook.url}}))
    site = replace(site, config_path=config_path)
    run_id = site.engine.start_run(with_hook(runs.settings(*place, max_steps=4), hook.url), "me", name="told")
    run = site.workspace.run(run_id)
    runs.wait_for(lambda: hook.got and last_result(site.workspace.root), 60)
    told = json.loads(hook.got[0][2])
    assert (told["kind"], told["state"], told["step"], told["run_id"]) == ("ended", "finished", 4, run_id)
    for file in run.path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    kept = site.workspace.root / "notify" / f"{run_id}.json"
    assert SECRET in kept.read_text() and kept.stat().st_mode & 0o77 == 0
    for role in ("owner", "viewer"):
        answers = answers_of(site, run_id, role)
        assert len(answers) > 40 and any("told" in text for text in answers.values())
        assert [path for path, text in answers.items() if SECRET in text] == [], role
    owner = answers_of(site, run_id, "owner")
    assert '"host":"127.0.0.1"' in owner["/api/notify"]
    assert "needs the owner" in answers_of(site, run_id, "viewer")["/api/notify"]


def test_a_resumed_run_still_has_its_webhook_and_a_broken_one_costs_nothing(
    site: Site, hook: Hook, place: tuple[Path, Path]
) -> None:
    hook.answers = [404]
    config = with_hook(runs.settings(*place, max_steps=5000, eval={"eval_strategy": "no"}), hook.url)
    run_id = site.engine.start_run(config, "me")
    run = site.workspace.run(run_id)
    runs.wait_for(lambda: status(run).current_step > 1)
    control.drop(run.control, "pause", "me")
    runs.wait_for(lambda: len(hook.got) == 1 and site.engine.holder() is None)
    site.engine.resume_run(run_id, "me")
    runs.wait_for(lambda: status(run).state == "running")
    control.drop(run.control, "stop", "me")
    runs.wait_for(lambda: len(hook.got) == 2, 60)
    assert [json.loads(body)["state"] for _, _, body in hook.got] == ["paused", "stopped"]
    assert status(run).state == "stopped"
    assert site.engine.notifier.wait(10)
    result = last_result(site.workspace.root)
    assert result is not None and not result.ok and "404 (Not Found)" in result.text


def test_a_run_that_was_cut_off_is_told_by_the_next_server(site: Site, hook: Hook) -> None:
    made = MadeRun(site.workspace.runs, "cut").start()
    made.step()
    made.close()
    notify.keep_webhook(site.workspace.root, made.run_id, hook.url)
    site.engine.recover([])
    runs.wait_for(lambda: hook.got)
    told = json.loads(hook.got[0][2])
    assert (told["kind"], told["title"]) == ("failed", "cut was cut off") and "waits for you" in told["text"]
    site.engine.recover([])
    assert site.engine.notifier.wait(10) and len(hook.got) == 1, "told once"


# -- standing still


class Clock:
    """A clock that tests set."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[MadeRun, StallWatch, Clock, list[Message]]]:
    made, clock, told = MadeRun(tmp_path, "still", gpu=True).start(), Clock(), []
    for _ in range(5):
        made.step(seconds=2.0)
    telemetry = Telemetry(tmp_path / "t.bin", None, None)
    telemetry.latest |= {"utilisation": 0.0, "temperature_c": 41.0, "device_gib": 19.2, "limit_gib": 24.0}
    yield made, StallWatch(made.run, made.events, telemetry, told.append, clock_s=clock), clock, told
    made.close()


def test_no_step_for_five_minutes_is_told_once_and_going_on_too(watched: Any) -> None:
    made, watch, clock, told = watched
    for clock.now_s in (0, 100, stall.LEAST_S - 1):
        watch.look()
    assert told == []
    for clock.now_s in (stall.LEAST_S + 1, stall.LEAST_S + 200):
        watch.look()
    assert len(told) == 1 and told[0].kind == "stalled" and told[0].step == 5
    assert "No step for 5 min, in phase train, after step 5. GPU at 0 %, 41 °C, 19.2 of 24.0 GiB in use" in told[0].text
    alert = all_events(made.run.events)[-1]
    assert (alert["kind"], alert["code"], alert["step"]) == ("alert", "stalled", 5)
    made.step()
    watch.look()
    assert "It goes on" in all_events(made.run.events)[-1]["text"]
    clock.now_s += stall.LEAST_S + 1
    watch.look()
    assert len(told) == 2


def test_the_limit_follows_the_steps_and_what_is_no_step_has_longer(watched: Any) -> None:
    assert limit_s("train", 2.0) == 300 and limit_s("train", 60.0) == 600
    assert limit_s("eval", 2.0) == 1800 and limit_s("save", 600.0) == 6000 and limit_s("load", 1.0) == float("inf")
    made, watch, clock, told = watched
    made.events.append("phase", name="eval")
    clock.now_s = 1700
    watch.look()
    assert told == []
    clock.now_s = 1801
    watch.look()
    assert len(told) == 1 and "in phase eval" in told[0].text


# -- the secret in form, refusals and comparisons


def owner(role: Any = "owner") -> Caller:
    return Caller(role, "a" * 43, True)


def test_the_form_shows_the_host_alone_and_the_mask_changes_nothing(site: Site, tmp_path: Path) -> None:
    config_path = tmp_path / "config.json"
    config_path.write_text(json.dumps({"notify": {"webhook_url": SLACK}}))
    site = replace(site, config_path=config_path)

    def state() -> Any:
        return form_state(site.workspace, config_path, site.drafts.read("a" * 43))

    def type_in(text: str) -> None:
        site.drafts.change("a" * 43, lambda draft: apply(site, draft, Act("set", values={KEY: text})))

    shown = "https://hooks.slack.com/…"
    assert state().texts[KEY] == shown and state().config.notify.webhook_url == SLACK
    type_in(shown)
    assert state().config.notify.webhook_url == SLACK and not state().changes
    type_in(DISCORD)
    assert state().texts[KEY] == "https://discord.com/…" and state().config.notify.webhook_url == DISCORD
    type_in("https://discord.com/…")
    assert state().config.notify.webhook_url == DISCORD
    type_in("")
    assert state().config.notify.webhook_url == "" and state().texts[KEY] == ""
    type_in(f"ftp://h/{SECRET}")
    assert SECRET not in str(state().problems) and "https://" in state().problems[KEY]


def test_only_the_owner_sets_it_and_sends_the_test(site: Site, hook: Hook) -> None:
    with pytest.raises(Refusal, match="Only the owner"):
        check_rights(site, owner("operator"), {KEY: SLACK})
    check_rights(site, owner(), {KEY: SLACK})
    client = TestClient(Guard(Starlette(routes=our_routes(site)), Rules()), base_url="http://localhost")
    refused = client.post("/api/notify/test", json={})
    assert refused.status_code == 400 and "no webhook yet" in refused.json()["error"]
    assert client.post("/api/train/fields", json={"values": {KEY: hook.url}}).status_code == 200
    told = client.post("/api/notify/test", json={}).json()["last"]
    assert told["ok"] and told["text"] == "127.0.0.1 answered 200." and json.loads(hook.got[0][2])["kind"] == "test"
    assert client.get("/api/notify").json()["last"] == told


@pytest.mark.parametrize(
    "content",
    [
        {"notify": {"webhook_url": f"ftp://h/{SECRET}"}},
        {"notify": {"webhook_url": f"https://h/ {SECRET}"}},
        {"notify": {"webhook_url": f"https://h/\0{SECRET}"}},
        {"notify": {"webhook_url": [SLACK]}},
        {"notify": SLACK},
        {"notify": [SLACK]},
    ],
)
def test_a_refused_address_is_not_repeated(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "my.json"
    path.write_text(json.dumps(content))
    for attempt in (lambda: c.ConfigLoader.load(path), lambda: c.resolve(content)):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert SECRET not in caught.value.message and "notify" in caught.value.message


def test_settings_as_text_and_in_print_hold_no_secret() -> None:
    config = c.resolve({"notify": {"webhook_url": SLACK}})
    assert SECRET not in repr(config) and SECRET not in str(config)
    assert as_text(c.field(KEY), SLACK) == "https://hooks.slack.com/…" and as_text(c.field(KEY), "") == ""
    user = "https://name:" + SECRET + "@example.org:8443/x?token=" + SECRET
    assert SECRET not in as_text(c.field(KEY), user)
