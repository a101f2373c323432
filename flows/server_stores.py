"""Where the servers of ``d3po up`` keep what they know: files of the data folder, or a database that a team shares.

The choice and the database's password are in ``<data folder>/servers/stores.json``, which only its user can read. Other
programs get the password as ``PGPASSWORD``: addresses, command lines and logs never hold it.
"""

import json
import os
from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from d3po.flows.server_files import SET_DATA, server_file
from d3po_core.errors import D3POError
from d3po_core.store.files import atomic_path

STORES = "stores.json"
LOCAL = "local"  # instead of an address: the data folder again
DATABASE, ARTIFACTS = "D3PO_DATABASE", "D3PO_ARTIFACTS"
PASSWORD, ENDPOINT = "PGPASSWORD", "MLFLOW_S3_ENDPOINT_URL"
# libpq's names for what an address may say after "?". Both servers' drivers read the variables.
OPTIONS = {"sslmode": "PGSSLMODE", "sslrootcert": "PGSSLROOTCERT"}
ENDPOINTS = (ENDPOINT, "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
SHAPE = "expected postgresql://user@host:port/ or postgresql://user@host:port/prefix"

Stores = dict[str, str]


def read_stores() -> Stores:
    """The remembered stores: ``database`` and perhaps ``password``, ``artifacts``, ``endpoint``; empty if local.

    Raises:
        D3POError: the file exists but cannot be read.
    """
    file = server_file(STORES)
    try:
        found: Any = json.loads(file.read_text())
        url_of(found["database"])
        return {str(name): str(value) for name, value in found.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, D3POError):
        raise D3POError(
            f"{file} does not say any more which database the servers use; type `d3po up --database ADDRESS` again, "
            f"or `d3po up --database {LOCAL}` for the data folder"
        ) from None


def are_shared() -> bool:
    """Return whether the servers use a database, also if the file that names it is damaged."""
    return server_file(STORES).exists()


def write_stores(stores: Stores) -> None:
    """Remember the stores for the next ``d3po up``.

    Raises:
        D3POError: the folder cannot be written.
    """
    if not stores:
        server_file(STORES).unlink(missing_ok=True)
        return
    with atomic_path(server_file(STORES), SET_DATA, private=True) as temporary:
        temporary.touch(mode=0o600)  # private from its first byte
        temporary.write_text(json.dumps(stores, indent=2))


def chosen_stores(database: str | None, artifacts: str | None) -> Stores:
    """The stores that the next servers use: what is given, else what is remembered.

    Args:
        database: PostgreSQL's address, or ``local``.
        artifacts: ``s3://bucket/prefix``, or ``local``.

    Raises:
        D3POError: an address is wrong, or artefacts are given without a database.
    """
    stores = _with_database(database) if database else read_stores()
    if artifacts == LOCAL:
        return {name: stores[name] for name in stores if name in ("database", "password")}
    if not artifacts:
        return stores
    if not stores:
        raise D3POError(
            f"--artifacts {artifacts} needs a database that is no file of the data folder; add --database "
            "postgresql://user@host:port/"
        )
    return {**stores, "artifacts": _bucket(artifacts), **_endpoint()}


def _with_database(given: str) -> Stores:
    """Stores with a new database; artefacts stay where they are."""
    if given == LOCAL:
        return {}
    url = url_of(given)
    password = url.password if isinstance(url.password, str) else os.environ.get(PASSWORD, "")
    clean = url._replace(password=None).render_as_string(hide_password=False)  # set() ignores None
    before: Stores = read_stores() if are_shared() and _is_readable() else {}
    if not password and before.get("database") == clean:
        password = before.get("password", "")
    kept: Stores = {name: before[name] for name in ("artifacts", "endpoint") if name in before}
    return {"database": clean, **({"password": password} if password else {}), **kept}


def _is_readable() -> bool:
    try:
        return bool(read_stores())
    except D3POError:
        return False


def url_of(address: str) -> URL:
    """PostgreSQL's address in parts; its path is a prefix of the databases' names.

    Raises:
        D3POError: it is not one, or says more than we understand; the message does not repeat a password.
    """
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        raise D3POError(f"--database is no address; {SHAPE}") from None
    if url.drivername not in ("postgresql", "postgres"):
        raise D3POError(f"--database begins with {url.drivername}://; {SHAPE}, or {LOCAL}")
    if not url.host or (url.database or "").strip("abcdefghijklmnopqrstuvwxyz0123456789_"):
        raise D3POError(f"--database names no host, or a prefix of other than small letters, digits and _; {SHAPE}")
    if unknown := sorted(set(url.query) - set(OPTIONS)):
        raise D3POError(f"--database says {', '.join(unknown)}; after ? we understand {' and '.join(OPTIONS)}")
    return url.set(drivername="postgresql", port=url.port or 5432, database=url.database or "")


def database_names(stores: Stores) -> dict[str, str]:
    """The database of each server: ``prefect`` and ``mlflow``, after the prefix if there is one."""
    prefix = url_of(stores["database"]).database
    return {name: f"{prefix}_{name}" if prefix else name for name in ("prefect", "mlflow")}


def store_url(stores: Stores, name: str) -> str:
    """SQLAlchemy's address of a server's database, without password and options."""
    driver = {"prefect": "postgresql+asyncpg", "mlflow": "postgresql+psycopg2"}[name]
    url = url_of(stores["database"]).set(drivername=driver, database=database_names(stores)[name], query={})
    return url.render_as_string(hide_password=False)


def store_variables(stores: Stores) -> dict[str, str]:
    """Variables with which both servers reach the database and the object store."""
    query = url_of(stores["database"]).query
    variables = {variable: str(query[name]) for name, variable in OPTIONS.items() if name in query}
    if "password" in stores:
        variables[PASSWORD] = stores["password"]
    return variables | ({ENDPOINT: stores["endpoint"]} if "endpoint" in stores else {})


def shown_stores(stores: Stores) -> list[str]:
    """A line that says where the servers keep their data; none for the data folder."""
    if not stores:
        return []
    names = " and ".join(database_names(stores).values())
    where = stores.get("artifacts", "the data folder")
    return [f"databases {names} on {server_of(stores)}, artefacts in {where}"]


def server_of(stores: Stores) -> str:
    """Who is asked where, for messages: ``user@host:port``."""
    url = url_of(stores["database"])
    return f"{url.username}@{url.host}:{url.port}" if url.username else f"{url.host}:{url.port}"


def _bucket(address: str) -> str:
    scheme, _, rest = address.partition("://")
    if scheme != "s3" or not rest.strip("/"):
        raise D3POError(f"--artifacts {address}: expected s3://bucket/prefix, or {LOCAL}")
    return address.rstrip("/")


def _endpoint() -> dict[str, str]:
    """The shell's address of an S3 server that is not Amazon's, to be remembered."""
    found = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    return {"endpoint": found} if found else {}
