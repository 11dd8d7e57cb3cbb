"""Replies that the routes of runs share: compact JSON, and a run that is not there."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trainer.refusal import Refusal
from trainer.run import RunDir
from trainer.workspace import Workspace


def json_reply(value: Any, status: int = 200) -> Response:
    """Compact JSON. Half characters (lone surrogates out of foreign files) become question marks, not a 500."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    headers = {"cache-control": "no-store"}
    return Response(text.encode("utf-8", "replace"), status, headers, media_type="application/json")


def find_run(workspace: Workspace, request: Request) -> RunDir | None:
    """The run that the address names, or None."""
    try:
        return workspace.run(request.path_params["run_id"])
    except Refusal:
        return None


def no_run(request: Request) -> Response:
    """404 in words."""
    name = request.path_params["run_id"][:80]
    return json_reply({"error": f"There is no run '{name}'. It may have been deleted; see Runs."}, 404)


async def json_body(request: Request) -> dict[str, Any]:
    """The JSON object a request carries; Refusal for anything else."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refusal("The request is not a JSON object.")
    return body
