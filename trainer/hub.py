"""Download of a model by its id into the workspace: what was begun is kept and continued, only what is whole gets a name.

The network is the child's alone (`trainer.hub_child`); this side starts it, looks at the room on the disk, ends it within a
moment when asked to, and renames the folder at the end. Called by the Models page and the command line. Torch-free.

    models/.download-org--name/  lock, about.json, parts/NAME.DIGEST, model/        while it is on its way
    models/org--name/            the files, and `.downloaded`: id, commit, digests  when every byte is proved
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainer.checkpoint import free_bytes
from trainer.disk_need import file_size
from trainer.files import fsync_dir, make_private_dir, read_json, write_json
from trainer.hub_names import STAGING, ModelId, downloaded, how_to_get, id_in
from trainer.locks import FileLock, holder, is_held
from trainer.refusal import Refusal
from trainer.schema import Config
from trainer.worker import INHERITED, Cancelled, WorkerDied
from trainer.worker_child import read_frame, write_frame
from trainer.workspace import Workspace

PAUSES_S = (1.0, 3.0, 8.0, 20.0)
"""Between tries without a byte in between; the last one is followed by the refusal."""
LEFT_FREE_BYTES = 512 * 2**20
_LOOK_S = 0.1
_HUB_INHERITED = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME", "HF_ENDPOINT",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
    "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip
_HUB_SET = {
    # without it huggingface_hub 2 asks the hub for a list of programs to say by which of them it is run
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",  # a second protocol with servers and a cache of its own; every file is there by HTTP too
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONIOENCODING": "utf-8",
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Unfinished:
    """A download that was cut off or cancelled; `total_bytes` is None before the hub has answered."""

    model: ModelId
    done_bytes: int
    total_bytes: int | None


def _never() -> bool:
    return False


def download(
    models_dir: Path,
    model: ModelId,
    *,
    on_progress: Progress,
    cancelled: Callable[[], bool] = _never,
    pauses_s: tuple[float, ...] = PAUSES_S,
) -> Path:
    """Fetch a model and return its folder; `on_progress` hears of bytes done and in all, from the hub's answer on.

    Raises Refusal in words for a person (what has arrived is kept, and the next call goes on there), Cancelled within a
    moment of `cancelled()`.
    """
    target, staging = models_dir / model.folder, models_dir / f"{STAGING}{model.folder}"
    _refuse_offline()
    try:
        with _alone(model, staging):
            if target.exists():
                raise Refusal(f"{model} is here already, as {target.name}. Nothing was downloaded.")
            try:
                _fetch(model, staging, list(pauses_s), on_progress, cancelled)
            except Refusal:
                if not _arrived(staging):  # a wrong name leaves nothing to resume
                    shutil.rmtree(staging, ignore_errors=True)
                raise
            os.rename(staging / "model", target)
            fsync_dir(models_dir)
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise Refusal(f"Cannot write into {models_dir}: {error.strerror or error}. What has arrived is kept.") from None
    return target


def _refuse_offline() -> None:
    """A person who has asked Python's programs to stay off the network means this one too."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise Refusal(f"{name} is set, so nothing is downloaded. Unset it and start Signalbox again.")


@contextlib.contextmanager
def _alone(model: ModelId, staging: Path) -> Iterator[None]:
    """Holds the lock of a download: two processes never write the same parts."""
    make_private_dir(staging)
    lock = FileLock(staging / "lock")
    if not lock.acquire({"pid": os.getpid()}, retry_s=0.5):
        process = (holder(lock.path) or {}).get("pid", "another")
        raise Refusal(f"{model} is being downloaded already (by process {process}). Wait for it, or cancel it there.")
    try:
        yield
    finally:
        lock.release()


def _fetch(
    model: ModelId, staging: Path, pauses_s: list[float], on_progress: Progress, cancelled: Callable[[], bool]
) -> None:
    """One life of the child, from the request to the last proof; it is gone when this returns or raises."""
    with tempfile.TemporaryFile() as said:
        process = _start(said)
        try:
            assert process.stdin is not None
            write_frame(process.stdin, {"model": str(model), "staging": str(staging), "pauses_s": pauses_s})
            total = 0
            for answer in _answers(process, cancelled):
                if "plan" in answer:
                    plan = answer["plan"]
                    total = plan["total"]
                    write_json(staging / "about.json", {"id": str(model), "total": total})
                    _refuse_no_room(model, plan, staging)
                    on_progress(plan["done"], total)
                    write_frame(process.stdin, {"go": True})
                elif "done" in answer:
                    on_progress(answer["done"], total)
                elif "refusal" in answer:
                    raise Refusal(answer["refusal"])
                elif "died" in answer:
                    raise _died(model, answer["died"], answer["detail"])
                else:
                    on_progress(total, total)
                    return
            raise _died(model, "it was ended", _tail(said))
        except BrokenPipeError:
            raise _died(model, "it was ended", _tail(said)) from None
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()


def _start(said: IO[bytes]) -> subprocess.Popen[bytes]:
    package_root = str(Path(__file__).resolve().parent.parent)
    names = (*INHERITED, *_HUB_INHERITED)
    environment = {name: os.environ[name] for name in names if name in os.environ} | _HUB_SET
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([package_root, inherited] if inherited else [package_root])
    command = [sys.executable, "-P", "-m", "trainer.hub_child", "--parent", str(os.getpid())]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, env=environment, start_new_session=True)


def _answers(process: subprocess.Popen[bytes], cancelled: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """What the child says, until it says no more; raises Cancelled."""
    frames: queue.Queue[bytes | None] = queue.Queue()

    def read() -> None:
        frame: bytes | None = b""
        while frame is not None:
            try:
                frame = read_frame(process.stdout)
            except (OSError, ValueError):  # closed under us, after a cancel
                frame = None
            frames.put(frame)

    threading.Thread(target=read, name="hub-read", daemon=True).start()
    while True:
        if cancelled():
            raise Cancelled("The download was cancelled. What has arrived is kept; resume goes on there.")
        try:
            frame = frames.get(timeout=_LOOK_S)
        except queue.Empty:
            continue
        if frame is None:
            return
        yield json.loads(frame)


def _refuse_no_room(model: ModelId, plan: dict[str, Any], staging: Path) -> None:
    missing, free = plan["total"] - plan["done"], free_bytes(staging)
    if missing + LEFT_FREE_BYTES > free:
        raise Refusal(
            f"There is no room for {model}: {file_size(missing)} are still to come, {file_size(free)} are free, and "
            f"{file_size(LEFT_FREE_BYTES)} stay free for runs. Nothing more was downloaded. Free some, then resume."
        )


def _died(model: ModelId, how: str, detail: str) -> WorkerDied:
    return WorkerDied(
        f"The download of {model} ended unexpectedly ({how}). What has arrived is kept. Resume it.", detail
    )


def _tail(said: IO[bytes]) -> str:
    said.seek(0)
    return said.read()[-8000:].decode("utf-8", "replace")


def unfinished(models_dir: Path) -> list[Unfinished]:
    """Downloads that nobody is working on, by name."""
    found = []
    for staging in sorted(models_dir.glob(f"{STAGING}*")):
        model = ModelId.of_folder(staging.name.removeprefix(STAGING))
        if model is None or is_held(staging / "lock"):
            continue
        try:
            total = read_json(staging / "about.json")["total"]
        except (OSError, ValueError, KeyError, TypeError):
            total = None
        found.append(Unfinished(model, _arrived(staging), total))
    return found


def _arrived(staging: Path) -> int:
    sizes = 0
    for folder in (staging / "parts", staging / "model"):
        with contextlib.suppress(OSError):
            sizes += sum(entry.stat().st_size for entry in os.scandir(folder))
    return sizes


def discard(models_dir: Path, model: ModelId) -> None:
    """Throw away what has arrived of a download; Refusal while it goes on, or when there is none."""
    staging = models_dir / f"{STAGING}{model.folder}"
    if not staging.is_dir():
        raise Refusal(f"Nothing of {model} lies half-downloaded here.")
    with _alone(model, staging):
        shutil.rmtree(staging)


def with_downloaded_model(config: Config, workspace: Workspace, config_file: Path) -> Config:
    """`config` with the folder of its model where `model_path` is the id of a downloaded one.

    An id in a file was read as a path beside that file. Raises Refusal that says how to download the model where it is
    neither a folder nor in the workspace.
    """
    model = id_in(config.model_path, config_file)
    if model is None:
        return config
    folder = downloaded(workspace.models_dir, str(model))
    if folder is None:
        where = f"There is no folder {config.model_path}, and no downloaded model {model} in the workspace."
        raise Refusal(f"{where} {how_to_get(model)}", "model_path")
    return config.model_copy(update={"model_path": str(folder)})


def download_alone(workspace: Workspace, text: str) -> Path:
    """The command line's download: a line for each tenth on stderr, and Ctrl-C as a refusal that says what is kept."""
    model, tenth = ModelId.parse(text), -1
    if (here := downloaded(workspace.models_dir, str(model))) is not None:  # a script may say it each time
        print(f"{model} is here already. Nothing was downloaded.", file=sys.stderr)
        return here

    def tell(done: int, total: int) -> None:
        nonlocal tenth
        now = done * 10 // max(total, 1)
        if now > tenth:
            tenth = now
            print(f"{model}: {file_size(done)} of {file_size(total)}", file=sys.stderr, flush=True)

    try:
        return download(workspace.models_dir, model, on_progress=tell)
    except KeyboardInterrupt:
        raise Cancelled("Cancelled. What has arrived is kept; the same command goes on there.") from None
