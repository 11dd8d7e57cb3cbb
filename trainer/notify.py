"""One webhook: who is told what when a run ends, fails or stands still while nobody looks.

Messages and payloads are pure; `Notifier` sends them on a thread of its own, so that no run ever waits for a network or
fails with it. The address is a secret: it lies in `notify/RUN_ID.json` of the workspace, readable by its owner alone, never
in a run's folder, an event, a log or an error; only its host is shown. Torch-free.
"""

from __future__ import annotations

import base64
import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from trainer import clock
from trainer.files import make_private_dir, read_json, write_json
from trainer.refusal import Refusal
from trainer.run import Status
from trainer.setting import host_of

Kind = Literal["ended", "failed", "stalled", "unsaved", "link", "test"]
Service = Literal["slack", "discord", "ntfy", "json"]
TIMEOUT_S = 10.0
RETRY_AFTER_S = (2.0, 10.0)
"""Waits before the second and the third try."""
WAITING = 50
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("finished", "stopped", "paused"), "ended"),
    **dict.fromkeys(("failed", "diverged", "interrupted"), "failed"),
}
_TAGS: dict[Kind, tuple[str, str]] = {  # ntfy: an emoji's short name, and a priority of 1 to 5
    "ended": ("white_check_mark", "3"),
    "failed": ("x", "4"),
    "stalled": ("warning", "4"),
    "unsaved": ("floppy_disk", "4"),
    "link": ("link", "3"),
    "test": ("bell", "3"),
}


@dataclass(frozen=True)
class Message:
    """What is told: a title of a few words, one or two sentences, and figures for programs that read JSON."""

    kind: Kind
    title: str
    text: str
    run_id: str = ""
    state: str = ""
    step: int | None = None
    total_steps: int | None = None
    at: float = 0.0


@dataclass(frozen=True)
class Result:
    """How the last sending went, for the page: no address, only its host."""

    at: float
    host: str
    kind: str
    ok: bool
    text: str


# -- messages


def message_of(now: Status, detail: str = "") -> Message | None:
    """What to say of a run in the state it is in; None for a state that nobody waits for. `detail` ends the text."""
    kind = _KINDS.get(now.state)
    if kind is None:
        return None
    name = now.name or now.model_display_name or now.run_id
    word = (
        "was cut off"
        if now.state == "interrupted"
        else {"failed": "has failed", "diverged": "diverged"}.get(
            now.state, f"is {now.state}" if now.state != "finished" else "has finished"
        )
    )
    of = f" of {now.total_steps:,}" if now.total_steps else ""
    parts = [f"Step {now.current_step:,}{of}."]
    if now.cause:
        parts.append(now.cause[:1].upper() + now.cause[1:].rstrip(".") + ".")
    if kind == "ended" and now.loss is not None:
        parts.append(f"Loss {now.loss:.3f}.")
    if now.best_held_out is not None:
        parts.append(f"Best held-out loss {now.best_held_out:.3f} at step {now.best_step:,}.")
    if now.rows_left_out:
        parts.append(f"{now.rows_left_out:,} bad row{' was' if now.rows_left_out == 1 else 's were'} left out.")
    safe = now.last_checkpoint_step
    parts.append(f"Safe: step {safe:,}." if safe is not None else "Nothing was saved.")
    text = " ".join([*parts, detail]).strip()
    return Message(kind, f"{name} {word}", text, now.run_id, now.state, now.current_step, now.total_steps, clock.now())


def stalled_message(now: Status, sentence: str) -> Message:
    """A run makes no step any more; `sentence` holds since when and what the machine does meanwhile."""
    name = now.name or now.run_id
    title = f"{name} stands still"
    return Message("stalled", title, sentence, now.run_id, now.state, now.current_step, now.total_steps, clock.now())


def unsaved_message(now: Status, sentence: str) -> Message:
    """A run goes on and cannot be saved; `sentence` holds why and what is safe."""
    title = f"{now.name or now.run_id} cannot be saved"
    return Message("unsaved", title, sentence, now.run_id, now.state, now.current_step, now.total_steps, clock.now())


def link_message(link: str, why: str) -> Message:
    """The share link is another one now; `why` is a sentence."""
    return Message("link", "The share link changed", f"{why} Now: {link}", at=clock.now())


def sample_message() -> Message:
    """What the Send test button sends."""
    return Message(
        "test", "Signalbox can reach you", "This is a test. Runs that end or fail are told here.", at=clock.now()
    )


# -- payloads


def service_of(url: str) -> Service:
    """Which service an address belongs to, by its host and path; plain JSON for any other."""
    host, path = host_of(url), urlsplit(url).path
    if host == "hooks.slack.com" or (host.endswith(("discord.com", "discordapp.com")) and path.endswith("/slack")):
        return "slack"
    if host in ("discord.com", "discordapp.com", "ptb.discord.com", "canary.discord.com") and "/webhooks/" in path:
        return "discord"
    return "ntfy" if host == "ntfy.sh" or host.startswith("ntfy.") else "json"


def payload(service: Service, message: Message) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the POST. Nothing in a name or a cause can address people or become markup."""
    if service == "slack":
        title, text = (_for_slack(part) for part in (message.title, message.text))
        return _json({"text": f"*{title}*\n{text}"})
    if service == "discord":
        content = f"**{_plain(message.title)}**\n{_plain(message.text)}"[:2000]
        return _json({"content": content, "allowed_mentions": {"parse": []}, "flags": 4})
    if service == "ntfy":
        tag, priority = _TAGS[message.kind]
        title = base64.b64encode(message.title[:200].encode()).decode()  # headers are ASCII: RFC 2047
        headers = {"Title": f"=?UTF-8?B?{title}?=", "Tags": tag, "Priority": priority}
        return message.text[:4000].encode(), headers | {"Content-Type": "text/plain; charset=utf-8"}
    return _json({"source": "signalbox", **asdict(message)})


def _json(content: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    return json.dumps(content).encode(), {"Content-Type": "application/json"}


def _for_slack(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("*", "∗")


def _plain(text: str) -> str:
    return "".join(f"\\{c}" if c in "*_`~|>[]()#-\\" else c for c in text)


# -- sending


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An address that sends elsewhere is an answer, not a way: the secret goes to its own host alone."""

    def redirect_request(self, *given: Any) -> None:
        return None


def post(url: str, body: bytes, headers: dict[str, str], timeout_s: float = TIMEOUT_S) -> tuple[bool, bool, str]:
    """Send once: (arrived, worth another try, what was answered, without the address)."""
    host = host_of(url)
    if urlsplit(url).scheme not in ("http", "https") or not host:
        return False, False, "The webhook is no http or https address."
    request = urllib.request.Request(url, body, {"User-Agent": "signalbox", **headers}, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_s) as reply:
            return True, False, f"{host} answered {reply.status}."
    except urllib.error.HTTPError as error:
        error.close()
        word = http.client.responses.get(error.code, "")
        if 300 <= error.code < 400:
            return False, False, f"{host} sends elsewhere ({error.code}), which is not followed. Check the address."
        again = error.code == 429 or error.code >= 500
        advice = "Trying again may help." if again else "Check the address."
        return False, again, f"{host} answered {error.code} ({word}). {advice}"
    except TimeoutError:
        return False, True, f"{host} did not answer within {timeout_s:g} s."
    except (OSError, http.client.HTTPException, ValueError) as error:
        # the error's own text may hold the address: only what the system says of the connection is told
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            return False, True, f"{host} did not answer within {timeout_s:g} s."
        said = cause.strerror if isinstance(cause, OSError) and cause.strerror else type(cause).__name__
        return False, True, f"{host} cannot be reached: {said}."


class Notifier:
    """Sends messages one after the other on its own thread. Any thread may call it; nothing here raises or waits."""

    def __init__(self, workspace: Path, sleep: Callable[[float], Any] = time.sleep) -> None:
        self._workspace = workspace
        self._sleep = sleep
        self._waiting: queue.Queue[tuple[str, Message]] = queue.Queue(WAITING)
        self._open = 0
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="notify", daemon=True)
        self._thread.start()

    def tell(self, run_id: str, message: Message | None) -> None:
        """Send `message` to the webhook of the run, if it has one."""
        url = webhook_of(self._workspace, run_id)
        if not url or message is None:
            return
        with self._change:
            try:
                self._waiting.put_nowait((url, message))
            except queue.Full:  # a webhook that has not answered for hours
                return
            self._open += 1

    def send_now(self, url: str, message: Message) -> Result:
        """Send once and wait for the answer, at most ten seconds; for the Send test button."""
        body, headers = payload(service_of(url), message)
        ok, _, text = post(url, body, headers)
        return self._note(url, message, ok, text)

    def wait(self, timeout_s: float) -> bool:
        """Until everything is sent or given up; False when that took too long."""
        with self._change:
            return self._change.wait_for(lambda: self._open == 0, timeout_s)

    def _loop(self) -> None:
        while True:
            url, message = self._waiting.get()
            try:
                self._deliver(url, message)
            except Exception as error:  # the thread's edge: a message that cannot be told must not silence the next
                self._note(url, message, False, f"It could not be sent ({type(error).__name__}).")
            finally:
                with self._change:
                    self._open -= 1
                    self._change.notify_all()

    def _deliver(self, url: str, message: Message) -> None:
        body, headers = payload(service_of(url), message)
        ok, again, text = post(url, body, headers)
        for wait_s in RETRY_AFTER_S:
            if not again:
                break
            self._sleep(wait_s)
            ok, again, text = post(url, body, headers)
        self._note(url, message, ok, text)

    def _note(self, url: str, message: Message, ok: bool, text: str) -> Result:
        result = Result(clock.now(), host_of(url), message.kind, ok, text)
        try:
            write_json(self._workspace / "notify.json", asdict(result))
        except OSError:
            pass  # a full disk: the sending counts, not the note of it
        return result


def last_result(workspace: Path) -> Result | None:
    """How the last sending went, by whichever process; None before the first."""
    try:
        return Result(**read_json(workspace / "notify.json"))
    except (OSError, ValueError, TypeError):
        return None


# -- where the secret lies


def keep_webhook(workspace: Path, run_id: str, url: str) -> None:
    """Keep the webhook of a run, outside its folder; Refusal when it cannot be written."""
    if not url:
        return
    try:
        write_json(make_private_dir(workspace / "notify") / f"{run_id}.json", {"url": url})
    except OSError as error:
        raise Refusal(f"The webhook of the run cannot be kept: {error.strerror or error}.") from None


def webhook_of(workspace: Path, run_id: str) -> str:
    """The webhook of a run; "" where it has none."""
    try:
        return str(read_json(workspace / "notify" / f"{run_id}.json")["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def forget_webhook(workspace: Path, run_id: str) -> None:
    """Remove the webhook of a run that is deleted."""
    (workspace / "notify" / f"{run_id}.json").unlink(missing_ok=True)
