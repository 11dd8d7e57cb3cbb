"""The routes behind the live board: what is new in a run, commands to it, its steps as CSV, the machine.

Every tab polls `api/runs/ID/feed` once a second; an update costs what is new, whatever the length of the run.
`ui.server` mounts `routes(site)`; `assets/live.js` and `assets/frame.js` are the readers.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, get_args

from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from trainer import control, locks, metrics
from trainer.refusal import Refusal
from trainer.run import RunDir, Status, only_by_torchrun
from trainer.states import LIVE_STATES, Settling, State, allowed
from ui.follow import Cursor, Follower, Reader
from ui.guard import caller_of, guarded
from ui.process import owned_by_terminal
from ui.replies import find_run, json_reply, no_run
from ui.runs_api import RunsApi
from ui.site import Site

FOLLOWERS = 32
STATE_AGE_S = 1.0
CSV_ROWS = 4000
# command of the page -> action of the guard's table
COMMANDS = {
    "stop": "stop",
    "stop-now": "stop",
    "pause": "pause",
    "checkpoint": "checkpoint",
    "resume": "resume",
    "resume-around": "resume",
    "leave": "stop",
    "discard": "stop",
}
_CANNOT = {
    "stop": "be stopped",
    "stop-now": "be stopped",
    "pause": "be paused",
    "checkpoint": "save a checkpoint",
    "resume": "be resumed",
    "resume-around": "go on around its rows",
    "leave": "be left",
    "discard": "be ended",
}


class Feed:
    """Answers the pages of one server; keeps a Follower for each run that is being looked at."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._lock = threading.Lock()
        self._followers: OrderedDict[str, Follower] = OrderedDict()
        self._state: tuple[float, dict[str, Any]] | None = None

    def follower(self, run: RunDir) -> Follower:
        """The Follower of `run`; the one unused for longest goes when there are too many."""
        with self._lock:
            if run.run_id not in self._followers:
                self._followers[run.run_id] = Follower(run)
            self._followers.move_to_end(run.run_id)
            while len(self._followers) > FOLLOWERS:
                self._followers.popitem(last=False)
            return self._followers[run.run_id]

    async def feed(self, request: Request) -> Response:
        """`GET api/runs/ID/feed?gen=G&since=M-T-E&h=HASH`: see Follower.reply."""
        run = find_run(self._site.workspace, request)
        if run is None:
            return no_run(request)
        query = request.query_params
        gen = int(query["gen"]) if re.fullmatch(r"[0-9]{1,9}", query.get("gen", "")) else -1
        cursor = Cursor.parse(query.get("since", ""))
        caller = caller_of(request)
        reader = Reader(caller.may("see_rows"), caller.may("stop"), caller.may("note"))
        follower = await run_in_threadpool(self.follower, run)
        return json_reply(await run_in_threadpool(follower.reply, cursor, gen, query.get("h", ""), reader))

    async def command(self, request: Request) -> Response:
        """`POST api/runs/ID/command {"command": …}`: left for the trainer, or a resume; refused in words."""
        run = find_run(self._site.workspace, request)
        if run is None:
            return no_run(request)
        try:
            command = (await request.json())["command"]
            action = COMMANDS[command]
        except (ValueError, KeyError, TypeError):
            return json_reply({"error": f"That is no command. Known: {', '.join(COMMANDS)}."}, 400)
        caller = caller_of(request)
        assert caller.may(action), "the guard let operators in, and they may do all of these"
        status = await run_in_threadpool(lambda: self.follower(run).status())
        if command not in status.allowed:
            return json_reply({"error": _refused(command, status)}, 409)
        if command in ("resume", "resume-around"):
            around = command == "resume-around"
            await run_in_threadpool(lambda: self._site.engine.resume_run(run.run_id, caller.role, around_rows=around))
        elif command in get_args(Settling):
            await run_in_threadpool(self._site.engine.settle, run.run_id, command, caller.role)
        else:
            await run_in_threadpool(control.drop, run.control, command, caller.role)
        return json_reply({"ok": True}, 202)

    async def csv(self, request: Request) -> Response:
        """`GET api/runs/ID/metrics.csv`: the whole curve, one row a step, every column."""
        run = find_run(self._site.workspace, request)
        if run is None:
            return no_run(request)
        headers = {"content-disposition": f'attachment; filename="{run.run_id}.csv"'}
        return StreamingResponse(_csv(run), media_type="text/csv", headers=headers)

    async def state(self, request: Request) -> Response:
        """`GET api/state`: the run that is being trained, the last one that ended, and the machine."""
        return json_reply(await run_in_threadpool(self.current_state))

    def current_state(self) -> dict[str, Any]:
        """What the header says; read at most once a second however many tabs ask."""
        with self._lock:
            if self._state is not None and time.monotonic() - self._state[0] < STATE_AGE_S:
                return self._state[1]
        found = self._read_state()
        with self._lock:
            self._state = time.monotonic(), found
        return found

    def _read_state(self) -> dict[str, Any]:
        here = self._site.engine.machine()
        runs = self._site.workspace.list_runs()
        live = [run for run in runs if locks.is_held(run.lock)]
        answer: dict[str, Any] = {"run": None, "last": None, "machine": here.summary, "advice": here.advice}
        answer["terminal"] = owned_by_terminal()
        for run in live:
            status = self.follower(run).status()
            if status.state in LIVE_STATES:
                answer["run"] = _line(status)
                break
        if answer["run"] is None and runs:
            # by its last sign, not by its id: a run of last week may have been resumed this morning
            latest = max(runs, key=lambda run: run.events.stat().st_mtime if run.events.exists() else 0.0)
            answer["last"] = _line(self.follower(latest).status())
        if answer["run"] is None:
            answer["next"] = self._next()
        return answer

    def _next(self) -> dict[str, Any] | None:
        """The first of the queue, and whether the queue is held back; None where nothing waits."""
        try:
            waiting = self._site.workspace.queue.read()
            run = self._site.workspace.run(waiting.entries[0].run_id)
        except (Refusal, IndexError):
            return None
        return {"name": self.follower(run).status().name or run.run_id, "held": bool(waiting.held_by)}


def _line(status: Status) -> dict[str, Any]:
    eta_s = None if status.eta_s is None else round(status.eta_s)
    keys = ("run_id", "state", "phase", "phase_done", "phase_total", "total_steps", "ended_at", "last_sign")
    return {key: getattr(status, key) for key in keys} | {
        "step": status.current_step,
        "eta_s": eta_s,
        "name": status.name or status.model_display_name or status.run_id,
    }


def _refused(command: str, status: Status) -> str:
    state: State = status.state
    can = [word for word in status.allowed if word in COMMANDS]
    if command.startswith("resume") and command in allowed(state):
        return f"{only_by_torchrun(status.processes)} Nothing was changed."
    rest = f" Possible now: {', '.join(can)}." if can else ""
    return f"The run is {state}, so it cannot {_CANNOT[command]}. Nothing was changed.{rest}"


def _csv(run: RunDir) -> Iterator[str]:
    yield ",".join(metrics.COLUMNS) + "\n"
    records = metrics.read_metrics(run.metrics)
    for start in range(0, len(records), CSV_ROWS):
        lines = []
        for record in records[start : start + CSV_ROWS].tolist():
            cells = [str(int(value)) if value == value // 1 else repr(value) for value in record]
            lines.append(",".join(cells))
        yield "\n".join(lines) + "\n"


def routes(site: Site) -> list[Route]:
    """All routes under `api/runs` and `api/state`, each with the action its caller must be allowed."""
    feed = Feed(site)
    squeezed = [Middleware(GZipMiddleware, minimum_size=2048, compresslevel=5)]
    run = "/api/runs/{run_id}"
    return [
        Route("/api/state", guarded("see", feed.state)),
        Route(run + "/feed", guarded("see", feed.feed), middleware=squeezed),
        Route(run + "/metrics.csv", guarded("see", feed.csv), middleware=squeezed),
        Route(run + "/command", guarded("stop", feed.command), methods=["POST"]),
        *RunsApi(site).routes(),
    ]
