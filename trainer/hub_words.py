"""What a hub's refusals mean, in words: gated, missing, no such revision, a token it does not take, no line to it.

Imports the hub's library, so it belongs to the child process that talks to a hub (`trainer.hub_child`) alone.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from trainer.hub_names import ModelId
from trainer.refusal import Refusal

# the error of the client the library uses, httpx in its version 1 and httpx2 in version 2, without naming either
TRANSPORT: type[Exception] = next(base for base in HfHubHTTPError.__mro__[1:] if base.__name__ == "HTTPError")
_KEPT = "What has arrived is kept."


def host() -> str:
    """The host that is asked."""
    return urlsplit(constants.ENDPOINT).netloc or constants.ENDPOINT


def lost(model: ModelId, why: Exception | None) -> Refusal:
    """The line broke and did not come back."""
    status = getattr(getattr(why, "response", None), "status_code", None)
    if status == 429:
        return Refusal(f"{host()} says that it is asked too often. {_KEPT} Resume in some minutes.")
    what = f"it answers {status}" if status else "the connection was lost and did not come back"
    return Refusal(f"{model} did not come from {host()} to its end: {what}. {_KEPT} Resume when the network is back.")


def words(error: Exception, model: ModelId) -> str | None:
    """What to tell a person about an error of the hub's library; None for one that is a fault of ours."""
    if isinstance(error, GatedRepoError):
        return (
            f"{model.repo} is gated: its owners give it to those who have accepted their conditions. Accept them at "
            f"{constants.ENDPOINT}/{model.repo}, set HF_TOKEN to a token of that account, start Signalbox again, then resume."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{model.repo} has no branch, tag or commit '{model.revision}'. Check what stands behind the @."
    if isinstance(error, RemoteEntryNotFoundError):
        return f"A file of {model.repo} was taken away while it was downloaded. Download again: the newest state is taken then."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no model {model.repo} at {host()}, or it is private. Check the spelling; for a private model set "
            "HF_TOKEN to a token that may read it and start Signalbox again."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is downloaded. Unset it and start Signalbox again."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"{host()} does not take the token in HF_TOKEN. Set a valid one, or none for a public model."
        if status == 403:
            return (
                f"{host()} does not give {model.repo} to this account (403). Check what the token in HF_TOKEN may read."
            )
        return lost(model, error).message
    if isinstance(error, TRANSPORT):
        return (
            f"Cannot reach {host()}: there is no connection to it from here. {_KEPT} Mend the network (behind a proxy set "
            "HTTPS_PROXY), or copy a model folder into the workspace's models."
        )
    return None
