"""Routes of the Train page: its state as JSON for `assets/train.js`, and what its buttons ask for.

Every route is guarded by the action it needs. Work that may take longer than a moment is a job or the engine's;
a route answers at once. Called by `ui/server.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trainer.refusal import Refusal
from ui import train_batch, train_do, train_row, train_state, train_try
from ui.guard import Caller, caller_of, guarded
from ui.replies import json_reply
from ui.site import Site

_BODY_BYTES = 64 * 1024


def routes(site: Site) -> list[Route]:
    """The routes of this module; every one names the action that its caller must be allowed."""
    reads = {
        "state": ("check", lambda caller, _: train_state.state_of(site, caller)),
        "suggest": ("check", lambda caller, _: train_state.suggestions_of(site, caller)),
        "row": ("see_rows", lambda caller, query: train_row.row_of(site, caller, query)),
        "batch": ("see_rows", lambda caller, _: train_batch.batch_of(site, caller)),
    }
    writes = {
        "fields": ("save_config", lambda caller, body: train_do.typed(site, caller, body)),
        "note": ("save_config", lambda caller, body: train_do.note(site, caller, body)),
        "save": ("save_config", lambda caller, body: train_do.save(site, caller, body)),
        "restore": ("save_config", lambda caller, body: train_do.restore(site, caller, body)),
        "start": ("start", lambda caller, body: train_do.start(site, caller)),
        "queue": ("queue", lambda caller, body: train_do.enqueue(site, caller)),
        "smoke": ("smoke", lambda caller, body: train_do.smoke(site, caller)),
        "smoke-stop": ("smoke", lambda caller, body: train_do.smoke_stop(site)),
        "find-batch": ("check", lambda caller, body: train_batch.find_batch(site, caller)),
        "try": ("start", lambda caller, body: train_try.try_it(site, caller)),
    }
    return [
        *(Route(f"/api/train/{n}", guarded(action, _get(work))) for n, (action, work) in reads.items()),
        *(Route(f"/api/train/{n}", guarded(a, _post(site, w)), methods=["POST"]) for n, (a, w) in writes.items()),
    ]


Work = Callable[[Caller, dict[str, Any]], dict[str, Any]]


def _get(work: Work) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        answer = await run_in_threadpool(work, caller_of(request), dict(request.query_params))
        return json_reply(answer)

    return endpoint


def _post(site: Site, work: Work) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        body = await request.body()
        if len(body) > _BODY_BYTES:
            raise Refusal("That is more text than this needs.")
        try:
            sent = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            raise Refusal("The page sent something that is not JSON. Reload it.") from None
        if not isinstance(sent, dict):
            raise Refusal("The page sent something that is not understood. Reload it.")
        caller = caller_of(request)
        answer = await run_in_threadpool(work, caller, sent)
        # the page must tell its own changes of the draft from those of another tab
        return json_reply(answer | {"revision": site.drafts.read(caller.session).revision})

    return endpoint
