"""Name and tag a flow run, so that Prefect's lists say which campaign and rounds it works on."""

from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import deployment, flow_run

from d3po_core.config import CampaignConfig


def name_run(config: CampaignConfig, numbers: list[int] | None = None) -> None:
    """Name this flow run by campaign and rounds, and tag it with campaign, labeller and deployment.

    A run that is resumed or retried keeps the name with its first rounds.

    Args:
        config: of the campaign.
        numbers: the rounds that the run finishes; None while they are unknown.
    """
    with get_client(sync_client=True) as client:
        this = client.read_flow_run(UUID(str(flow_run.id)))
        named = this.name.startswith(f"{config.campaign}: ")
        name = this.name if named else run_name(config.campaign, numbers)
        client.update_flow_run(this.id, name=name, tags=sorted({*this.tags, *run_tags(config)}))


def run_name(campaign: str, numbers: list[int] | None = None) -> str:
    """``shapes: round 3`` or ``shapes: rounds 3-6``; only the campaign's name if the rounds are unknown."""
    if numbers is None:
        return campaign
    trained = [number for number in numbers if number > 0]  # round 0 only measures the base model
    if not trained:
        return f"{campaign}: nothing left to do"
    if len(trained) == 1:
        return f"{campaign}: round {trained[0]}"
    return f"{campaign}: rounds {trained[0]}-{trained[-1]}"


def run_tags(config: CampaignConfig) -> list[str]:
    """The tags of a campaign's run: campaign, labeller, and the deployment if one started it."""
    of_deployment = [f"deployment:{deployment.name}"] if deployment.id else []
    return [f"campaign:{config.campaign}", f"labeller:{config.judge.labeller}", *of_deployment]
