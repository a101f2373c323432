"""The hub of models: its cache on this machine, and what it would send."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from d3po_core.errors import D3POError

SECONDS = 5.0  # to wait for the hub
REFUSED = (401, 403, 404)


@dataclass(frozen=True)
class HubCache:
    """The hub's cache: its folder, whether it can be written, the bytes of its files, and the offline flag."""

    folder: Path
    writable: bool
    bytes: int
    offline: bool


def hub_cache() -> HubCache:
    """Return the hub's cache on this machine; a folder that is not there yet will be made."""
    folder = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    files = [path for path in folder.glob("*/blobs/*") if path.is_file()]
    return HubCache(
        folder, os.access(existing, os.W_OK), sum(path.stat().st_size for path in files), constants.is_offline_mode()
    )


def hub_files(hub_id: str, revision: str | None, field: str) -> dict[str, int]:
    """Return a model's files on the hub with their bytes; empty if the hub is there but will not list them.

    Raises:
        D3POError: the hub cannot be reached, or does not have or give this model.
    """
    said = f"{field} {hub_id!r} is neither a folder nor whole in the hub's cache, and"
    remedy = f"set {field} to a folder, or download it where there is a network"
    if constants.is_offline_mode():
        raise D3POError(f"{said} HF_HUB_OFFLINE forbids to download it; unset HF_HUB_OFFLINE, or {remedy}")
    try:
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=SECONDS)
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code not in REFUSED:  # the download itself may still work, and tells why if not
            return {}
        raise D3POError(
            f"{said} {constants.ENDPOINT} answers {code}: is the id right, and does the model want a login "
            f"(`hf auth login`) or a licence to be accepted? Or {remedy}"
        ) from None
    except Exception as error:  # the client's own and its HTTP library's errors have no base class in common
        raise D3POError(
            f"{said} {constants.ENDPOINT} cannot be reached ({' '.join(str(error).split())[:100]}); "
            f"is there a network? Or {remedy}"
        ) from None
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}
