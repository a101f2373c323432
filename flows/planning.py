"""Plans of deployments: where each setting comes from, and what ``d3po run`` says before it starts."""

from pathlib import Path
from typing import Any

from d3po.flows.presets import deployment_config
from d3po_core.config import CampaignConfig
from d3po_core.config_values import changed_fields
from d3po_core.errors import D3POError
from d3po_core.planning.plan import make_plan
from d3po_core.planning.told import three_lines
from d3po_core.urls import masked


def announce(config: CampaignConfig, rounds: int) -> None:
    """Print what a run will do, how long it takes and where; first refuse a run that cannot work.

    Raises:
        D3POError: the first problem that would stop the run.
    """
    plan = make_plan(config, rounds)
    if plan.problems:
        raise D3POError(plan.problems[0])
    print("\n".join(three_lines(plan)), flush=True)


def settings(deployment: str, config: CampaignConfig, file: Path | None = None) -> list[tuple[str, Any, str]]:
    """The fields that differ from the defaults, each with its value and where that was set."""
    of_deployment = deployment_config(deployment, None, [])
    of_file = deployment_config(deployment, None, [], file)
    typed = {name for name, *_ in changed_fields(of_file, config)}
    filed = {name for name, *_ in changed_fields(of_deployment, of_file)}

    def source(name: str) -> str:
        if name in typed:
            return "--campaign" if name == "campaign" else "--set"
        return f"--config {file}" if name in filed else f"deployment {deployment}"

    return [(name, _public(value), source(name)) for name, _, value in changed_fields(CampaignConfig(), config)]


def _public(value: Any) -> Any:
    return masked(value) if isinstance(value, str) else value
