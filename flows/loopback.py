"""Addresses that only this machine can reach, and how to reach them past a proxy."""

from collections.abc import Mapping

HOST = "127.0.0.1"
NAMES = (HOST, "localhost", "::1")


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Both spellings of NO_PROXY: the environment's exclusions plus the loopback names."""
    excluded = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if excluded.strip() == "*":
        return {"NO_PROXY": "*", "no_proxy": "*"}
    names = [name.strip() for name in excluded.split(",") if name.strip()]
    whole = ",".join([*names, *(name for name in NAMES if name not in names)])
    return {"NO_PROXY": whole, "no_proxy": whole}


def is_proxied(environment: Mapping[str, str]) -> bool:
    """Return whether programs with this environment would use a proxy for addresses of this machine."""
    proxy = any(environment.get(name) for word in ("http_proxy", "all_proxy") for name in (word, word.upper()))
    excluded = environment.get("no_proxy") or environment.get("NO_PROXY")
    return proxy and without_proxy(environment)["no_proxy"] != excluded
