"""The command submit: start a run on the Prefect server, also one that has to wait for people."""

import os
from typing import Any

from d3po.flows.commands.parts import ConfigOption, DeploymentArgument, NameOption, RoundsOption, SettingOption
from d3po.flows.interrupting import this_command
from d3po.flows.presets import ENTRYPOINT
from d3po.flows.typed import typed_values
from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config, merge
from d3po_core.errors import D3POError


def submit(
    deployment: DeploymentArgument = "round",
    rounds: RoundsOption = 1,
    campaign: NameOption = None,
    file: ConfigOption = None,
    setting: SettingOption = None,
) -> None:
    """Start rounds on the Prefect server and return; a campaign that people judge waits for them there."""
    from d3po.flows.servers import find_prefect

    values, origins = typed_values(file, setting or [], campaign)
    if not find_prefect():
        raise D3POError("no Prefect server is running, so nothing could take the run; type: d3po up")
    from prefect.client.orchestration import get_client

    from d3po.flows.prefect_trouble import require_prefect
    from d3po.tasks.run_names import run_name, run_tags

    require_prefect()
    with get_client(sync_client=True) as client:
        known = _deployment(client, deployment)
        config = load_config(merge(known.parameters.get("config") or {}, values), f"deployment {deployment!r}", origins)
        # The flow merges them over the deployment's.
        given = _checked(values, config.model_dump(mode="json"))
        run = client.create_flow_run_from_deployment(
            known.id, parameters={"rounds": rounds, "config": given}, name=run_name(config.campaign),
            tags=[*known.tags, *run_tags(config)],
        )  # fmt: skip
    print("\n".join(_told(config, deployment, rounds, run)))


def require_no_wait(config: CampaignConfig, rounds: int) -> None:
    """Refuse a run in a terminal that would have to wait for people.

    Raises:
        D3POError: it would; the message holds the command that submits it.
    """
    if config.judge.labeller == "proxy":
        return
    from d3po_core.people.questions import label_progress
    from d3po_core.store.stages import last_finished_round, stage_path

    first = max(last_finished_round(config.folder), 0) + 1
    judged = stage_path(config.folder, first, "judge").exists() and label_progress(config, first).complete
    if rounds > 1 or not judged:
        raise D3POError(
            "people judge this campaign, and a terminal cannot wait for them; "
            f"start it on the servers of `d3po up`: {this_command().replace('d3po run', 'd3po submit', 1)}"
        )


def _checked(typed: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """The typed fields with their values from the checked configuration, since the server takes no short forms."""
    return {
        name: _checked(value, whole[name]) if isinstance(value, dict) and isinstance(whole[name], dict) else whole[name]
        for name, value in typed.items()
    }


def _deployment(client: Any, name: str) -> Any:
    """A deployment of rounds on the server.

    Raises:
        D3POError: the server has none of that name.
    """
    found = {entry.name: entry for entry in client.read_deployments() if entry.entrypoint == ENTRYPOINT}
    if name not in found:
        there = f"it has {', '.join(sorted(found))}" if found else "it has none; type: d3po up"
        raise D3POError(f"{name!r} is no deployment of rounds on the Prefect server {_page()}; {there}")
    return found[name]


def _told(config: CampaignConfig, deployment: str, rounds: int, run: Any) -> list[str]:
    people = config.judge.labeller != "proxy"
    first = (
        f"  d3po label --rater NAME --campaign {config.campaign}" if people else f"  prefect flow-run watch {run.id}"
    )
    return [
        f"campaign {config.campaign}: {rounds} {'round' if rounds == 1 else 'rounds'} of {deployment} submitted",
        f"flow run {run.name}: {_page()}/runs/flow-run/{run.id}",
        "",
        "next:",
        first,
        f"  d3po rounds --campaign {config.campaign}",
    ]


def _page() -> str:
    return os.environ["PREFECT_API_URL"].rstrip("/").removesuffix("/api")
