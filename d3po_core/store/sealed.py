"""JSON files that hold their own digest, so that any change is noticed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from d3po_core.errors import D3POError

SEAL = "sha256"


def sealed(content: dict[str, Any]) -> str:
    """Return the JSON text of a mapping together with its digest."""
    return json.dumps({**content, SEAL: _digest(content)}, indent=1, ensure_ascii=False)


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """Return a sealed file's content without the digest.

    Files of earlier versions have no digest and are read without a check.

    Args:
        path: the file.
        remedy: what the user can do if it is damaged.

    Raises:
        D3POError: the file is gone, is not JSON, is not a mapping, or changed since it was written.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError(f"expected a mapping, found a {type(content).__name__}")
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise D3POError(f"{path}: cannot be read ({error}); {remedy}") from None
    seal = content.pop(SEAL, None)
    if seal is not None and seal != _digest(content):
        raise D3POError(f"{path}: has other content than was written: it is damaged; {remedy}")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
