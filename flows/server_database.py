"""Check the PostgreSQL server that a team shares, and create the databases of Prefect and MLflow."""

import asyncio
import importlib.util
import re
from pathlib import Path
from typing import Any

from d3po.flows.server_stores import OPTIONS, PASSWORD, Stores, database_names, server_of, store_variables, url_of
from d3po_core.errors import D3POError

OLDEST = 14  # the oldest that PostgreSQL's project still supports; we test with Debian's 15
SECONDS = 10.0
# Migrations name the tables' version: one that ours lack is a newer program's.
MIGRATIONS = {
    "prefect": ("prefect", "server/database/_migrations/versions/postgresql"),
    "mlflow": ("mlflow", "store/db_migrations/versions"),
}


def require_database(stores: Stores) -> str:
    """Check both databases, create those that are missing, and return PostgreSQL's version.

    Raises:
        D3POError: the extra is missing, or the server cannot be reached, refuses us, or is not fit.
    """
    require_extra()
    return asyncio.run(_checked(stores))


def require_extra() -> None:
    """Refuse an install without MLflow's driver of PostgreSQL and without boto3.

    Raises:
        D3POError: one is missing.
    """
    if missing := [name for name in ("psycopg2", "boto3") if importlib.util.find_spec(name) is None]:
        raise D3POError(
            f"a database that a team shares needs {' and '.join(missing)}; type `pip install 'd3po[servers]'`"
        )


async def _checked(stores: Stores) -> str:
    names, version = database_names(stores), ""
    for name, database in names.items():
        connection = await _opened(stores, database)
        try:
            version = _require_version(connection)
            await _require_rights(connection, database)
            await _require_known_tables(connection, name, database)
        finally:
            await connection.close()
    return version


async def _opened(stores: Stores, database: str) -> Any:
    """A connection to a database; a missing one is created."""
    import asyncpg

    try:
        return await _connect(stores, database)
    except asyncpg.InvalidCatalogNameError:
        await _create(stores, database)
        return await _connect(stores, database)


async def _connect(stores: Stores, database: str) -> Any:
    """A connection to an existing database; every failure but a missing database is one line."""
    import asyncpg

    url, variables = url_of(stores["database"]), store_variables(stores)
    options = {name: variables[variable] for name, variable in OPTIONS.items() if variable in variables}
    dsn = url.set(database=database, query=options).render_as_string(hide_password=False)
    server = server_of(stores)
    try:
        return await asyncpg.connect(dsn, password=variables.get(PASSWORD), timeout=SECONDS)
    except asyncpg.InvalidCatalogNameError:
        raise
    except (asyncpg.InvalidPasswordError, asyncpg.InvalidAuthorizationSpecificationError) as error:
        raise D3POError(
            f"PostgreSQL refuses {server} ({_said(error)}); give the right user and password: "
            f"`PGPASSWORD=... d3po up --database postgresql://user@{url.host}:{url.port}/`, or a line in ~/.pgpass"
        ) from None
    except asyncpg.InsufficientPrivilegeError as error:
        raise D3POError(
            f"{server} may not use database {database} ({_said(error)}); let its administrator type: "
            f"GRANT ALL ON DATABASE {database} TO {url.username};"
        ) from None
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        raise D3POError(
            f"no PostgreSQL answers at {server} ({_said(error) or 'timeout'}); is it started, does it listen there? "
            f"Try: pg_isready -h {url.host} -p {url.port}"
        ) from None


async def _create(stores: Stores, database: str) -> None:
    """Create a database from one that every server has; two of us may do it at once."""
    import asyncpg

    server, user = server_of(stores), url_of(stores["database"]).username
    try:
        connection = await _connect(stores, "postgres")
    except asyncpg.InvalidCatalogNameError:
        raise D3POError(
            f"{server} has neither database {database} nor postgres, from which we would create it; type there: "
            f"CREATE DATABASE {database};"
        ) from None
    try:
        await connection.execute(f'CREATE DATABASE "{database}"')
    except (asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
        pass
    except asyncpg.PostgresError as error:
        raise D3POError(
            f"{server} has no database {database}, and may not create it ({_said(error)}); let its administrator type: "
            f"CREATE DATABASE {database} OWNER {user};"
        ) from None
    finally:
        await connection.close()


def _require_version(connection: Any) -> str:
    version = connection.get_server_version()
    if version.major < OLDEST:
        raise D3POError(f"PostgreSQL is version {version.major}; Prefect needs {OLDEST} or newer: upgrade it")
    return f"{version.major}.{version.minor}"


async def _require_rights(connection: Any, database: str) -> None:
    user = await connection.fetchval("SELECT current_user")
    if not await connection.fetchval("SELECT has_schema_privilege(current_schema(), 'CREATE')"):
        raise D3POError(
            f"{user} may not create tables in database {database}; let its administrator type: "
            f"ALTER DATABASE {database} OWNER TO {user};"
        )
    if not await connection.fetchval("SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_trgm'"):
        raise D3POError(
            "PostgreSQL has no extension pg_trgm, which Prefect needs; install its package postgresql-contrib"
        )


async def _require_known_tables(connection: Any, name: str, database: str) -> None:
    """Refuse tables that another version or another program made."""
    if not await connection.fetchval("SELECT to_regclass('alembic_version') IS NOT NULL"):
        if others := await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()"):
            raise D3POError(
                f"database {database} holds {others} tables that are not {name}'s; give a prefix of your own: "
                "--database postgresql://user@host:port/prefix"
            )
        return
    found = await connection.fetchval("SELECT version_num FROM alembic_version")
    if found and found not in known_versions(name):
        raise D3POError(
            f"database {database} has tables of version {found}, which this {name} does not know: they are another "
            "program's, or a newer version's; install that version, or give a prefix of your own: --database "
            "postgresql://user@host:port/prefix"
        )


def known_versions(name: str) -> set[str]:
    """Versions of its tables that the installed Prefect or MLflow knows; read from its files, without loading it."""
    package, folder = MIGRATIONS[name]
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    found = (Path(spec.origin).parent / folder).glob("*.py")
    return {version for file in found for version in re.findall(r"^revision[^=]*= [\"'](\w+)", file.read_text(), re.M)}


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
