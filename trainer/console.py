"""Lines for whoever started us, on a terminal, in a file or in a pipe: never a reason to wait or to end."""

from __future__ import annotations

import os
import select
import sys
from typing import Any, TextIO

PIPE_BYTES = 4096
"""What a pipe takes in one piece, or not at all (PIPE_BUF on Linux)."""


def say(text: str, to: TextIO | None = None) -> None:
    """Print a line to `to` (stdout). A closed terminal, a reader that is gone and a pipe that is full cost the line alone."""
    stream = to if to is not None else sys.stdout
    if stream is None or not _takes(stream):  # None: the process was started with the descriptor closed
        return
    try:
        print(text[:PIPE_BYTES], file=stream, flush=True)
    except BrokenPipeError:
        _discard_the_rest(stream)
    except (OSError, ValueError):  # ValueError: the stream was closed in this process
        pass


def _takes(stream: Any) -> bool:
    """Whether a line can be written now without waiting for a reader."""
    if not hasattr(select, "poll"):
        return True
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        found = poll.poll(0)
    except (OSError, ValueError):  # a stream without a descriptor, as tests have it
        return True
    return bool(found)


def _discard_the_rest(stream: Any) -> None:
    # what is left in the buffer would be tried once more when the interpreter ends, and spoil the exit code
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
