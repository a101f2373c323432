"""Where the code, the project and its data are, and what a relative path starts at."""

import os
from pathlib import Path

from d3po_core.errors import D3POError

# The folder of the packages: the clone, or where d3po was installed.
PROJECT_ROOT = Path(__file__).resolve().parent.parent
DEPLOYMENTS = "prefect.yaml"
HERE = Path()
NAME_BYTES = 255  # the longest name of a file
FLOWS = b"d3po.flows."  # in the entrypoints of a project's deployments


def running_clone() -> Path | None:
    """Return the clone that this code runs from, None if d3po was installed elsewhere."""
    return PROJECT_ROOT if _is_project(PROJECT_ROOT) else None


def find_project() -> Path | None:
    """Return the project folder, None if there is none.

    It is ``D3PO_PROJECT``, else the nearest folder from the working directory upwards whose prefect.yaml deploys flows
    of d3po, else the clone that this code runs from.

    Raises:
        D3POError: ``D3PO_PROJECT`` is no such folder.
    """
    if given := os.environ.get("D3PO_PROJECT"):
        folder = absolute(given, HERE, "D3PO_PROJECT")
        if not _is_project(folder):
            raise D3POError(
                f"D3PO_PROJECT is {given!r}, where no {DEPLOYMENTS} deploys flows of d3po; "
                "unset it, set it to a project folder, or make one with `d3po init FOLDER`"
            )
        return folder
    try:
        here = Path.cwd()
    except FileNotFoundError:  # the folder was removed under the process
        return running_clone()
    return next(filter(_is_project, (here, *here.parents)), None) or running_clone()


def project_folder() -> Path:
    """Return the folder of the deployments, and of ``data`` unless ``D3PO_DATA`` is set.

    Raises:
        D3POError: the command was typed outside any project.
    """
    if not (found := find_project()):
        raise D3POError(
            "this folder is in no project of d3po: no prefect.yaml here or above deploys its flows; make one with "
            "`d3po init FOLDER` and go there, or set D3PO_PROJECT to a project"
        )
    return found


def data_folder() -> Path:
    """Return the folder of campaigns and of MLflow's and Prefect's databases.

    It is ``D3PO_DATA``, or ``data`` in the project.

    Raises:
        D3POError: ``D3PO_DATA`` is not a path, such as the home of a user who does not exist; or it is not set and
            there is no project.
    """
    if given := os.environ.get("D3PO_DATA"):
        return absolute(given, HERE, "D3PO_DATA")
    return absolute("data", project_folder(), "data")


def resolve_path(path: str) -> Path:
    """Return an absolute path; a relative one starts at the project folder, not the working directory."""
    starts_elsewhere = path.startswith("~") or Path(path).is_absolute()
    return absolute(path, HERE if starts_elsewhere else project_folder(), "path")


def path_from_here(path: Path) -> str:
    """Return a path for a person: relative if it is in the working directory, else absolute."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # the folder was removed under the process
        return str(path)
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def path_in_project(path: Path) -> str:
    """Return a path for a person: relative if it is in the project, else absolute."""
    project = find_project()
    return str(path.relative_to(project) if project and path.is_relative_to(project) else path)


def python_path() -> str:
    """Return the PYTHONPATH with which another process imports the same code: the clone's folder comes first."""
    return os.pathsep.join(filter(None, (str(running_clone() or ""), os.environ.get("PYTHONPATH"))))


def absolute(path: str, root: Path, what: str) -> Path:
    """Return an absolute path without links.

    Args:
        path: the path as given.
        root: the folder that a relative path starts at.
        what: the path's name in the message.

    Raises:
        D3POError: it holds a NUL or too long a name, is in the home of a user who does not exist, or leads into a
            loop of links.
    """
    try:
        found = (root / Path(path).expanduser()).resolve()
        if any(len(os.fsencode(part)) > NAME_BYTES for part in found.parts):
            raise ValueError(f"a name in it has more than {NAME_BYTES} bytes")
        return found
    except (ValueError, RuntimeError, OSError) as error:
        raise D3POError(f"{what} {path!r}: cannot be a path ({error}); give another") from None


def _is_project(folder: Path) -> bool:
    try:
        return FLOWS in (folder / DEPLOYMENTS).read_bytes()
    except OSError:
        return False
