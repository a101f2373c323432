"""Presets: the deployments of prefect.yaml that advance a campaign, and the one that fits a given campaign."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml

from d3po.flows.project import deployments
from d3po.flows.typed import typed_again, typed_values
from d3po_core.config import CampaignConfig
from d3po_core.config_values import changed_fields, load_config, merge
from d3po_core.errors import D3POError
from d3po_core.urls import masked

ENTRYPOINT = "d3po.flows.round.d3po"


def presets() -> dict[str, dict[str, Any]]:
    """Configuration values of each deployment of the flow ``d3po``, by name, in file order."""
    return {entry["name"]: (entry.get("parameters") or {}).get("config") or {} for entry in _of_rounds()}


def descriptions() -> dict[str, str]:
    """Description of each deployment of the flow ``d3po``, by name, in file order."""
    return {entry["name"]: entry.get("description") or "" for entry in _of_rounds()}


def verified(deployment: str) -> str | None:
    """What was verified of a deployment's settings, as its description ends; None if it does not say."""
    return descriptions().get(deployment, "").partition("Verified: ")[2] or None


def _of_rounds() -> list[dict[str, Any]]:
    return [entry for entry in deployments() if entry["entrypoint"] == ENTRYPOINT]


def deployment_config(
    deployment: str, campaign: str | None, settings: Sequence[str], file: Path | None = None
) -> CampaignConfig:
    """Configuration of a deployment of prefect.yaml, with what a person typed over it.

    Args:
        deployment: its name.
        campaign: the campaign's name, if it is not the deployment's.
        settings: ``field=value``, over the file's values.
        file: a configuration file, over the deployment's values.

    Raises:
        D3POError: there is no such deployment, or a value is of no field or does not fit it.
    """
    known = presets()
    if deployment not in known:
        raise D3POError(
            f"{deployment!r} is no deployment of rounds in prefect.yaml; it has {', '.join(known) or 'none'}"
        )
    values, origins = typed_values(file, settings, campaign)
    return load_config(merge(known[deployment], values), f"deployment {deployment!r}", origins)


def over_deployment(given: CampaignConfig) -> CampaignConfig:
    """The configuration of a run that a deployment started: the given values over the deployment's.

    Prefect itself would replace the deployment's whole ``config``. Then ``-p config={...}`` with one field would turn a
    campaign judged by people into one judged by programs.

    Args:
        given: as the flow got it; ``model_fields_set`` tells which fields were given.

    Raises:
        D3POError: the merged values are no valid configuration.
    """
    from prefect.client.orchestration import get_client
    from prefect.runtime import deployment, flow_run

    if not deployment.id or flow_run.parent_flow_run_id:  # a flow called this one
        return given
    with get_client(sync_client=True) as client:
        known = client.read_deployment(UUID(deployment.id))
    values = merge(known.parameters.get("config") or {}, given.model_dump(mode="json", exclude_unset=True))
    return load_config(values, f"deployment {known.name!r} with what the run was given")


def command_that_goes_on(config: CampaignConfig, rounds: int = 3) -> str:
    """The command that adds rounds to a campaign: the nearest deployment, plus the differences.

    It may be typed in any folder. A campaign that people judge needs a server; ``d3po run`` would refuse it.
    """
    changed = {
        name: [(field, new) for field, _, new in changed_fields(load_config(values, f"deployment {name!r}"), config)]
        for name, values in presets().items()
    }
    nearest = min(changed, key=lambda name: len(changed[name]))
    options = [
        f" --campaign {value}"
        if field == "campaign"
        else f" --set {shlex.quote(masked(f'{field}={_yaml(typed_again(field, value))}'))}"
        for field, value in changed[nearest]
    ]
    verb = "run" if config.judge.labeller == "proxy" else "submit"
    return f"d3po {verb} {nearest}{''.join(options)} --rounds {rounds}"


def _yaml(value: Any) -> str:
    """A value as one types it: without quotes if YAML reads it back unchanged."""
    return value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)
