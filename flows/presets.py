"""Presets: the deployments of prefect.yaml that advance a campaign, and the one that fits a given campaign."""

import json
import shlex
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml

from d3po.flows.project import deployments
from d3po_core.config import CampaignConfig, is_url
from d3po_core.config_values import changed_fields, load_config, merge
from d3po_core.errors import D3POError
from d3po_core.paths import resolve_path
from d3po_core.urls import masked

ENTRYPOINT = "d3po.flows.round.d3po"
PATH_FIELDS = ("model.path", "model.single_file_config", "sample.prompts", "evaluate.prompts", "runs_dir")


def presets() -> dict[str, dict[str, Any]]:
    """Configuration values of each deployment of the flow ``d3po``, by name, in file order."""
    return {
        deployment["name"]: (deployment.get("parameters") or {}).get("config") or {}
        for deployment in deployments()
        if deployment["entrypoint"] == ENTRYPOINT
    }


def deployment_config(deployment: str, campaign: str | None, settings: list[str]) -> CampaignConfig:
    """Configuration of a deployment of prefect.yaml, with changes.

    Raises:
        D3POError: there is no such deployment, or a setting is not a field or does not fit it.
    """
    known = presets()
    if deployment not in known:
        raise D3POError(f"{deployment!r} is no deployment of rounds in prefect.yaml; it has {', '.join(known)}")
    values = known[deployment]
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name:
            raise D3POError(f"--set {setting!r}: expected field=value, such as train.learning_rate=1e-3")
        value = _typed_here(name, _value(setting, text))
        values = merge(values, _nested(name, value))
    if campaign:
        values = merge(values, {"campaign": campaign})
    return load_config(values, f"deployment {deployment!r}")


def _value(setting: str, text: str) -> Any:
    try:
        # Aliases can expand until they fill the memory.
        if not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise D3POError(f"--set {setting[:100]!r}: the value is not YAML; quote it") from None
    raise D3POError(f"--set {setting[:100]!r}: has a YAML alias (*name); write the value out, or quote it")


def _nested(field: str, value: Any) -> dict[str, Any]:
    for part in reversed(field.split(".")):
        value = {part: value}
    return dict(value)


def _typed_here(field: str, value: Any) -> Any:
    """Resolve a relative path against the current folder, if it exists there."""
    if field not in PATH_FIELDS and not field.startswith("scoring.models."):
        return value
    if not isinstance(value, str) or is_url(value) or Path(value).is_absolute() or not Path(value).exists():
        return value
    here = Path(value).resolve()
    return value if here == resolve_path(value) else str(here)


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

    A campaign that people judge needs a server; ``d3po run`` would refuse it.
    """
    changed = {
        name: [(field, new) for field, _, new in changed_fields(deployment_config(name, None, []), config)]
        for name in presets()
    }
    nearest = min(changed, key=lambda name: len(changed[name]))
    if config.judge.labeller != "proxy":
        values: dict[str, Any] = {}
        for field, value in changed[nearest]:  # the flow merges them over the deployment's values
            values = merge(values, _nested(field, value))
        other = f" -p {shlex.quote(f'config={masked(json.dumps(values))}')}" if values else ""
        return f"prefect deployment run d3po/{nearest} -p rounds={rounds}{other}"
    options = [
        f" --campaign {value}" if field == "campaign" else f" --set {shlex.quote(masked(f'{field}={_yaml(value)}'))}"
        for field, value in changed[nearest]
    ]
    return f"d3po run {nearest}{''.join(options)} --rounds {rounds}"


def _yaml(value: Any) -> str:
    """A value as one types it: without quotes if YAML reads it back unchanged."""
    return value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)
