"""Choose the profile that plain ``prefect`` commands use: a program of its own, since Prefect reads its settings once.

python -m flows.prefect_profile NAME [API_URL]
"""

import sys

from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ANALYTICS_ENABLED, load_profiles, save_profiles


def choose_profile(name: str, api_url: str | None = None) -> None:
    """Make a profile the active one; with an address it is created or changed to reach that server.

    Raises:
        ValueError: there is no such profile, and no address to create it with.
    """
    profiles = load_profiles()
    if api_url:
        profiles.update_profile(name, {PREFECT_API_URL: api_url, PREFECT_SERVER_ANALYTICS_ENABLED: False})
    profiles.set_active(name)
    save_profiles(profiles)


if __name__ == "__main__":
    choose_profile(*sys.argv[1:])
