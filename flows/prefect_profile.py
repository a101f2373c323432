"""The profile that plain ``prefect`` commands use: read here, changed by a separate program.

python -m d3po.flows.prefect_profile NAME [API_URL]

A separate program is needed because a process reads Prefect's settings only once. It takes the login from
``PREFECT_API_AUTH_STRING``, because all users can read a command line.
"""

import contextlib
import os
import sys
import tomllib
from pathlib import Path

from d3po.flows.programs import run_program
from d3po.flows.server_files import State, write_state
from d3po.flows.server_programs import LOGIN, QUIET
from d3po_core.errors import D3POError
from d3po_core.paths import PROJECT_ROOT

PROFILE = "d3po"


def take_profile(api_url: str, login: str, state: State) -> None:
    """Point plain ``prefect`` commands to our server, and remember the profile they used before.

    Raises:
        D3POError: the user's profiles cannot be read or written.
    """
    if (earlier := active_profile()) != PROFILE:
        write_state({**state, "profile": earlier})
    _choose(PROFILE, api_url, login=login)


def restore_profile(state: State) -> list[str]:
    """Give plain ``prefect`` commands the profile they used before ``up``; return a line if they used ours."""
    if shown_profile() != PROFILE:
        return []
    if "profile" not in state:
        return [f"Prefect profile: {PROFILE} still; to choose yours: prefect profile use NAME"]
    with contextlib.suppress(D3POError):  # if it was removed since, the line below names the active one
        _choose(state["profile"])
    return [f"Prefect profile: {shown_profile()}"]


def shown_profile() -> str:
    """Name of the profile that a plain ``prefect`` command uses, or why it is unknown."""
    try:
        return active_profile()
    except D3POError as error:
        return f"not known: {error}"


def active_profile() -> str:
    """Name of the profile that a plain ``prefect`` command uses.

    Raises:
        D3POError: the file of profiles cannot be read.
    """
    file = _profiles_file()
    try:
        return str(tomllib.loads(file.read_text()).get("active", "ephemeral"))
    except FileNotFoundError:
        return "ephemeral"
    except (OSError, ValueError) as error:
        raise D3POError(
            f"Prefect's profiles in {file} cannot be read ({error}); mend the file, or move it away"
        ) from None


def choose_profile(name: str, api_url: str | None = None) -> None:
    """Activate a profile; with an address, create or change it to reach that server.

    Raises:
        ValueError: there is no such profile, and no address to create it with.
    """
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        PREFECT_SERVER_ANALYTICS_ENABLED,
        load_profiles,
        save_profiles,
    )

    profiles = load_profiles()
    if api_url:
        settings = {PREFECT_API_URL: api_url, PREFECT_SERVER_ANALYTICS_ENABLED: False}
        profiles.update_profile(name, settings | {PREFECT_API_AUTH_STRING: os.environ.get(LOGIN)})
        file = _profiles_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.chmod(0o600)  # before the login is written to it
    profiles.set_active(name)
    save_profiles(profiles)


def _choose(*name_and_url: str, login: str = "") -> None:
    """Activate a profile of the user's own Prefect."""
    environment = {**os.environ, **QUIET} | ({LOGIN: login} if login else {})
    run_program([sys.executable, "-m", "d3po.flows.prefect_profile", *name_and_url], environment, PROJECT_ROOT)


def _profiles_file() -> Path:
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    return Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser()


if __name__ == "__main__":
    choose_profile(*sys.argv[1:])
