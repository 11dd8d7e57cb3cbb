"""The one process that talks to a hub: it asks what a model consists of, fetches its files and proves each of them.

`python -m trainer.hub_child`, started and killed by `trainer.hub`; frames of JSON on its pipes, as the worker's. It writes
into its staging folder alone. Every file is continued where it was cut off, since it lies in `parts/` under a name that its
content decides: hf_hub_download of huggingface_hub 2 throws a part away, so only its addresses, headers and errors are used.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.disk_need import file_size
from trainer.files import fsync_dir, make_private_dir, write_json
from trainer.hub_names import NOTE, ModelId, chosen_files
from trainer.hub_words import TRANSPORT, lost, words
from trainer.refusal import Refusal
from trainer.worker_child import limit_self, read_frame, take_pipes, write_frame

MEMORY_BYTES = 4 * 2**30
TIMEOUT_S = 30.0
"""So long the hub may say nothing; a slow line that still gives bytes is left to go on."""
SAY_EVERY_S = 0.25
TRY_AGAIN = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub announces it; `digest` is the sha256 of a large file, the git hash of a small one."""

    name: str
    size_bytes: int
    digest: str
    is_sha256: bool

    @property
    def part(self) -> str:
        """Its name while it is not whole: other content has another one, so parts of two states are never mixed."""
        return f"{self.name}.{self.digest[:16]}"

    def is_proved(self, path: Path) -> bool:
        """Whether the file at `path` has the announced size and content."""
        if path.stat().st_size != self.size_bytes:
            return False
        digest = hashlib.sha256() if self.is_sha256 else hashlib.sha1(usedforsecurity=False)
        if not self.is_sha256:
            digest.update(f"blob {self.size_bytes}\0".encode())  # how git hashes a file
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        return digest.hexdigest() == self.digest


class Fetch:
    """One model on its way into `staging`; `say` takes what the parent is told."""

    def __init__(self, model: ModelId, staging: Path, pauses_s: list[float], say: Any) -> None:
        self.model, self.pauses_s, self._say = model, pauses_s, say
        self.parts, self.made = make_private_dir(staging / "parts"), staging / "model"
        self._done_bytes, self._said = 0, 0.0
        self.commit = ""

    def plan(self) -> list[RemoteFile]:
        """Ask the hub what there is and tell the parent; raises Refusal, or what the hub's library raises."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(self.model.repo, revision=self.model.revision, files_metadata=True, timeout=TIMEOUT_S)
        there = {entry.rfilename: entry for entry in info.siblings or []}
        names = chosen_files(list(there))
        if not any(name.endswith(".safetensors") for name in names):
            others = sorted(
                {Path(name).suffix for name in there if name.endswith((".bin", ".gguf", ".pth", ".pt", ".h5"))}
            )
            only = f" (it has {', '.join(others)})" if others else ""
            raise Refusal(
                f"{self.model} has no safetensors weights{only}, and others are not downloaded. Choose another model."
            )
        if not {"config.json", "adapter_config.json"} & set(names):
            raise Refusal(
                f"{self.model} has no config.json, so it is no model that can be trained. Choose another one."
            )
        files = []
        for name in names:
            entry = there[name]
            digest = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            if not info.sha or entry.size is None or not digest or not digest.isalnum():
                raise Refusal(
                    f"The hub does not say how large {name} of {self.model} is, so it could not be proved. Try later."
                )
            files.append(RemoteFile(name, entry.size, digest, entry.lfs is not None))
        self.commit = str(info.sha)
        self._tidy(files)
        self._done_bytes = sum(self._there(file) for file in files)
        total = sum(file.size_bytes for file in files)
        self._say({"plan": {"files": len(files), "total": total, "done": self._done_bytes}})
        return files

    def _tidy(self, files: list[RemoteFile]) -> None:
        """Back to parts what an end in the middle of the last step left, and away with parts of other states."""
        for file in files:
            if (self.made / file.name).is_file():
                os.replace(self.made / file.name, self.parts / file.part)
        wanted = {file.part for file in files}
        for path in self.parts.iterdir():
            if path.name not in wanted:
                path.unlink()

    def _there(self, file: RemoteFile) -> int:
        path = self.parts / file.part
        return path.stat().st_size if path.exists() else 0

    def fetch(self, file: RemoteFile) -> None:
        """Bring one file here whole and prove it; raises Refusal when the line stays lost or the content is another."""
        failures, path = 0, self.parts / file.part
        while True:
            before = self._there(file)
            why: Exception | None = None
            try:
                self._stream(file, path)
            except TRANSPORT as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status is not None and status not in TRY_AGAIN:
                    raise
                why = error
            now = self._there(file)
            if now >= file.size_bytes and why is None:
                break
            failures = 0 if now > before else failures + 1
            if failures >= len(self.pauses_s):
                raise lost(self.model, why)
            time.sleep(self.pauses_s[failures])
        if not file.is_proved(path):
            path.unlink()
            kind = "sha256" if file.is_sha256 else "git hash"
            raise Refusal(
                f"{file.name} arrived with other content than the hub announces ({kind} differs). It was thrown away, "
                "what else has arrived is kept. Download again to fetch it anew."
            )

    def _stream(self, file: RemoteFile, path: Path) -> None:
        """Append to `path` what is missing of the file; an answer that starts from the beginning replaces it."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        start = self._there(file)
        if start == file.size_bytes:
            path.touch(0o600)
            return
        url = hf_hub_url(self.model.repo, file.name, revision=self.commit)
        # identity: a compressed answer could be continued nowhere
        headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S) as answer:
            hf_raise_for_status(answer)
            continued = answer.status_code == 206
            if not continued:
                self._done_bytes -= start
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if continued else os.O_TRUNC), 0o600)
            with os.fdopen(fd, "wb") as out:
                self._write(file, answer, out, start if continued else 0)

    def _write(self, file: RemoteFile, answer: Any, out: BinaryIO, have: int) -> None:
        for chunk in answer.iter_bytes():  # as they come: pieces of one size would lose up to one at a cut
            have += len(chunk)
            if have > file.size_bytes:
                raise Refusal(f"The hub sends more of {file.name} than it announced. Nothing of it is used. Try later.")
            out.write(chunk)
            self._done_bytes += len(chunk)
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._said >= SAY_EVERY_S:
            self._said = now
            self._say({"done": self._done_bytes})

    def put_together(self, files: list[RemoteFile]) -> None:
        """All files, proved, under their names in `model/`, with a note of where they come from."""
        make_private_dir(self.made)
        for file in files:
            with open(self.parts / file.part, "rb") as whole:
                os.fsync(whole.fileno())
            os.replace(self.parts / file.part, self.made / file.name)
        about = [{"name": file.name, "bytes": file.size_bytes, "digest": file.digest} for file in files]
        write_json(self.made / NOTE, {"id": str(self.model), "commit": self.commit, "files": about})
        fsync_dir(self.made)


def run(request: dict[str, Any], requests: BinaryIO, say: Any) -> None:
    """Plan, wait for the parent's word, fetch; what goes wrong is raised as Refusal or by the hub's library."""
    fetch = Fetch(ModelId.parse(request["model"]), Path(request["staging"]), request["pauses_s"], say)
    files = fetch.plan()
    if read_frame(requests) is None:
        return
    for file in files:
        fetch.fetch(file)
    fetch.put_together(files)
    say({"end": True})


def main() -> int:
    """The child: one request, then its end."""
    parser = argparse.ArgumentParser(prog="trainer.hub_child")
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    requests, replies = take_pipes()
    limit_self(MEMORY_BYTES, arguments.parent)
    sys.modules["torch"] = None  # type: ignore[assignment]  # nothing here computes
    request = json.loads(read_frame(requests) or b"{}")

    def say(value: dict[str, Any]) -> None:
        write_frame(replies, value)

    try:
        run(request, requests, say)
    except Refusal as refusal:
        say({"refusal": refusal.message})
    except BrokenPipeError:
        return 1  # nobody listens any more
    except Exception as error:  # the edge of the process: whatever happened is told to the one who asked
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            say({"refusal": f"The disk is full. {kept(Path(request['staging']))} Free some, then resume."})
        elif (said := words(error, ModelId.parse(request["model"]))) is not None:
            say({"refusal": said})
        else:
            say({"died": type(error).__name__, "detail": traceback.format_exc()[-8000:]})
    return 0


def kept(staging: Path) -> str:
    """What has arrived so far, as a sentence."""
    arrived = sum(path.stat().st_size for path in (staging / "parts").iterdir())
    return f"What has arrived ({file_size(arrived)}) is kept."


if __name__ == "__main__":
    sys.exit(main())
