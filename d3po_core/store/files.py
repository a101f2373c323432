"""Files that appear whole or not at all, locks, and one-line disk errors."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from d3po_core.errors import D3POError
from d3po_core.paths import HERE, absolute

_NOT_WRITABLE = (
    errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG
)  # fmt: skip
# Some network shares answer a lock request with these.
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
# The alternative to making the folder writable.
ELSEWHERE = "or set runs_dir or D3PO_DATA to another folder"
# Reading the mask means setting it, so do it once, before threads make files.
os.umask(_UMASK := os.umask(0o077))


@contextlib.contextmanager
def atomic_path(path: Path, remedy: str = ELSEWHERE, private: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it to ``path`` on success, delete it on failure.

    Args:
        path: the file or folder to make.
        remedy: see ``disk_errors``.
        private: keep the permissions that the block sets; otherwise use those of any new file.
    """
    with disk_errors(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            if temporary.is_file() and not private:
                as_readable_as_usual(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def as_readable_as_usual(path: Path) -> None:
    """Give a file the usual permissions of new files, since some libraries make theirs private."""
    path.chmod(0o666 & ~_UMASK)


@contextlib.contextmanager
def exclusive(path: Path, mode: int = 0o644, wait: bool = True) -> Iterator[int]:
    """Lock a folder or a lock file for this process; the kernel frees it however the process ends.

    Args:
        path: the folder, or the lock file, which is made with its folder if missing.
        mode: permissions of a new lock file.
        wait: wait until the holder frees it.

    Yields:
        The open descriptor, for a lock file that says who holds it.

    Raises:
        BlockingIOError: another process holds it and ``wait`` is false.
        D3POError: it cannot be opened or made, or its file system has no locks.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, mode)
    try:
        with _lock_errors(path):
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _lock_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise D3POError(
            f"the file system of {path} has no locks ({error.strerror}), without which two runs could advance one "
            f"campaign; keep the data on a local disk: make its folder there, {ELSEWHERE}"
        ) from None


@contextlib.contextmanager
def disk_errors(path: Path, remedy: str = ELSEWHERE) -> Iterator[None]:
    """Turn errors of a full or read-only disk into one line that says what to do.

    Args:
        path: the file being written.
        remedy: the alternative to making its folder writable.

    Raises:
        D3POError: replaces the OSError; other OSErrors pass.
    """
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise _disk_full(path) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path) from None
        if error.errno in _NOT_WRITABLE or _folder_cannot_be_made(error, path):
            raise D3POError(f"cannot write {path} ({error.strerror}); make its folder writable, {remedy}") from None
        raise


def _folder_cannot_be_made(error: OSError, path: Path) -> bool:
    """Return whether a parent folder cannot be made, as on a share that is not mounted."""
    return (
        error.errno == errno.ENOENT
        and isinstance(error.filename, str | Path)
        and path != Path(error.filename)
        and (path.is_relative_to(error.filename))
    )


def _disk_full(path: Path) -> D3POError:
    return D3POError(f"disk full while writing {path}; free some space and run again, finished work is kept")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``output``; rename it to ``output`` on success, delete it on failure.

    Raises:
        D3POError: ``output`` is a file or a folder that is not empty, or the disk is full or cannot be written.
    """
    output = absolute(str(output), HERE, "--output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "is not empty" if output.is_dir() else "is a file"
        raise D3POError(f"--output {output}: {what}; nothing is overwritten, name a new folder")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    with disk_errors(output):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    as_readable_as_usual(path)
            os.replace(temporary, output)  # an empty folder may be replaced
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
