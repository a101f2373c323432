"""A PostgreSQL server of a test's own on loopback, by a user who is not root, with Debian's programs."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.flows.real_servers import free_ports

PASSWORD = "pass:word \\ @/%'"  # each of these characters means something in an address or a file of passwords
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
MISSING = "needs PostgreSQL's programs; as root: apt-get install postgresql"


@contextlib.contextmanager
def postgres() -> Iterator[int]:
    """Run a server in a folder of its own; yield its port. Role `postgres` has PASSWORD."""
    tools, (port,) = PROGRAMS[-1].parent, free_ports(1)
    home = Path(tempfile.mkdtemp(prefix="d3po-postgres-"))  # pytest's folders admit only their owner
    (home / "secret").write_text(PASSWORD)
    as_user = _unprivileged(home, home / "secret")

    def run(program: str, *words: str | Path) -> None:
        command = [*as_user, tools / program, "-D", home / "data", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")

    options = f"-p {port} -c listen_addresses=127.0.0.1 -k '' -c fsync=off"
    try:
        run("initdb", "-U", "postgres", "-A", "scram-sha-256", "--pwfile", home / "secret", "-N")
        run("pg_ctl", "-w", "-l", home / "log", "-o", options, "start")
        yield port
    finally:
        run("pg_ctl", "-w", "-m", "immediate", "stop")
        shutil.rmtree(home)


def _unprivileged(*paths: Path) -> list[str]:
    """PostgreSQL refuses to run as root: give the paths to Debian's user, and return the words that change to it."""
    if os.getuid():
        return []
    user = pwd.getpwnam("postgres")
    for path in paths:
        os.chown(path, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
