"""Where the project and its data are, and what a relative path starts at."""

import os
from pathlib import Path

from d3po_core.errors import D3POError

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def data_folder() -> Path:
    """Return the folder of campaigns and of MLflow's and Prefect's databases.

    It is ``D3PO_DATA``, or ``data`` in the project.

    Raises:
        D3POError: ``D3PO_DATA`` is not a path, such as the home of a user who does not exist.
    """
    return absolute(os.environ.get("D3PO_DATA") or str(PROJECT_ROOT / "data"), Path.cwd(), "D3PO_DATA")


def resolve_path(path: str) -> Path:
    """Return an absolute path; a relative one starts at the project's root, not the working directory."""
    return absolute(path, PROJECT_ROOT, "path")


def absolute(path: str, root: Path, what: str) -> Path:
    """Return an absolute path without links.

    Args:
        path: the path as given.
        root: the folder that a relative path starts at.
        what: the path's name in the message.

    Raises:
        D3POError: it holds a NUL, is in the home of a user who does not exist, or leads into a loop of links.
    """
    try:
        return (root / Path(path).expanduser()).resolve()
    except (ValueError, RuntimeError, OSError) as error:
        raise D3POError(f"{what} {path!r}: cannot be a path ({error}); give another") from None
