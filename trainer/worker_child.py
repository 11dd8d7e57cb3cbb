"""The child's side of the worker: pipes, limits, and the loop that answers. The client is trainer.worker.

Owns the frames on the pipes (four bytes of length, then JSON) and what a child may not do. Standard library only
until the first operation.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import traceback
from typing import Any, BinaryIO

from trainer.refusal import Refusal

MAX_FRAME_BYTES = 256 * 1024 * 1024
OPEN_FILES = 256


def write_frame(pipe: BinaryIO | Any, value: dict[str, Any]) -> None:
    """Send one JSON value; raises OSError when nobody reads, ValueError for NaN."""
    body = json.dumps(value, allow_nan=False).encode()
    pipe.write(len(body).to_bytes(4, "big") + body)
    pipe.flush()


def read_frame(pipe: BinaryIO | Any) -> bytes | None:
    """The next frame, or None at the end of the pipe or for a frame that cannot be one."""
    head = pipe.read(4)
    if len(head) < 4 or (size := int.from_bytes(head, "big")) > MAX_FRAME_BYTES:
        return None
    body = pipe.read(size)
    return body if len(body) == size else None


def main() -> int:
    """The child: answer requests until the pipe closes."""
    parser = argparse.ArgumentParser(prog="trainer.worker")
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--torch", action="store_true")
    arguments = parser.parse_args()
    requests, replies = take_pipes()
    limit_self(arguments.memory_bytes, arguments.parent)
    if not arguments.torch:
        sys.modules["torch"] = None  # type: ignore[assignment]  # tokenizers need none: saves 200 MiB and seconds
    from trainer.worker_ops import Operations

    operations = Operations(lambda done, total: write_frame(replies, {"progress": [done, total]}))
    while (frame := read_frame(requests)) is not None:
        request = json.loads(frame)
        answer = _answer(operations, request["op"], request["args"])
        write_frame(replies, answer)
        if "died" in answer:
            return 1
    return 0


def _answer(operations: Any, op: str, args: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": operations.run(op, args)}
    except Refusal as refusal:
        return {"refusal": refusal.message, "field": refusal.field}
    except MemoryError:
        return {"died": "memory", "detail": traceback.format_exc()[-8000:]}
    except Exception as error:  # the edge of the process: whatever happened is told to the one who asked
        return {"died": f"{type(error).__name__}: {error}"[:300], "detail": traceback.format_exc()[-8000:]}


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Our two pipes under new numbers; libraries get an empty stdin, and what they print goes to stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def limit_self(memory_bytes: int, parent: int) -> None:
    """Limits on memory and files, no core dump, end with the parent. Windows has none of these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    if sys.platform == "win32":
        return
    import resource

    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):
            continue  # macOS refuses some; said in the docs
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)
