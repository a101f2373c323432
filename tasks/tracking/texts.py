"""Keep names and descriptions in MLflow up to date.

A new champion, or people's preferences, change those of earlier rounds too: of the base and the last rounds. A round
that is no longer among them gets its last text, without the champion.
"""

import hashlib
import json
from datetime import UTC
from typing import Any

from d3po.tasks.tracking import wording
from d3po.tasks.tracking.marks import is_marked, mark_path, note_told, told
from d3po.tasks.tracking.registry import describe_registered, describe_version, registered_name, versions_of
from d3po.tasks.tracking.standing import Standing, standings
from d3po.tasks.tracking.store import (
    Client,
    campaign_label,
    describe,
    describe_experiment,
    experiment,
    round_run_id,
    tracking_uri,
)
from d3po.tasks.tracking.views import rounds_view, view_page
from d3po_core.config import CampaignConfig
from d3po_core.evaluation.comparison import round_named
from d3po_core.models.weights import loading_line
from d3po_core.paths import resolve_path
from d3po_core.people.human_win_rate import HumanWinRate
from d3po_core.store.campaign import campaign_id
from d3po_core.store.stages import finished_numbers
from d3po_core.urls import masked

# Rewriting a round's texts takes MLflow a tenth of a second.
RECENT = 10


def tell_texts(client: Client, config: CampaignConfig, campaign_run: str, rates: list[HumanWinRate]) -> None:
    """Write the names and descriptions that have changed; most calls only read one small file.

    Args:
        client: of the store.
        config: of the campaign.
        campaign_run: id of the campaign's run.
        rates: what people preferred in blind comparisons.
    """
    folder, numbers = config.folder, finished_numbers(config.folder)
    if not numbers or not is_marked(mark_path(folder, numbers[-1], "publish"), campaign_run):  # delivered in order
        return
    path = folder / "stages" / "texts.delivered"
    state = f"{numbers} {[rate.model_dump_json() for rate in rates]}"
    known = json.loads(told(path, campaign_run) or "{}")
    if known.get("state") == _digest(state):
        return
    # A recent text depends on its round, the champion and people: a new round alone changes no other recent text.
    champion = round_named(folder, "champion")
    shared = _digest(f"{champion} {[rate.model_dump_json() for rate in rates]}")
    judged = {number for rate in rates for number in (rate.round, rate.against)}
    recent = {numbers[0], champion, *judged, *numbers[-RECENT:]}
    asked = {*numbers} if "recent" not in known else recent ^ {*known["recent"]}
    asked |= {n for n in numbers if str(n) not in known or (n in recent and known["shared"] != shared)}
    found = standings(folder, rates, (asked & {*numbers}) | {numbers[-1]}, recent)
    label = campaign_label(client, config)
    versions = versions_of(client, config, [round_run_id(config, standing.record.round) for standing in found])
    written: dict[str, Any] = known | {"state": _digest(state), "shared": shared, "recent": sorted(recent)}
    for standing in found:
        number = str(standing.record.round)
        written[number] = _tell_round(client, config, standing, label, versions, known.get(number))
    _tell_campaign(client, config, campaign_run, found, label, versions)
    note_told(path, campaign_run, json.dumps(written))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tell_round(
    client: Client, config: CampaignConfig, standing: Standing, label: str, versions: dict[str, str], known: str | None
) -> str:
    """Write a round's name and description unless their digest is known; return the digest."""
    run_id = round_run_id(config, standing.record.round)
    version = versions.get(run_id)
    name, text = wording.round_name(standing, label), wording.about_round(standing, config, label)
    if version:
        text += _loading_lines(config, standing, version)
    if (digest := _digest(f"{name}\n{text}")) != known:
        if version:
            describe_version(client, config, run_id, version, text)
        describe(client, run_id, name, text)
    return digest


def _loading_lines(config: CampaignConfig, standing: Standing, version: str) -> str:
    assert standing.record.checkpoint is not None
    line = loading_line(config.folder / standing.record.checkpoint, "folder", config.model)
    local = resolve_path(config.model.path)
    model = str(local) if local.exists() else config.model.path  # these lines are run in any folder
    return (
        f"\n```python\nimport diffusers\nimport mlflow\n\nmlflow.set_tracking_uri({masked(tracking_uri())!r})\n"
        f"pipe = diffusers.DiffusionPipeline.from_pretrained({model!r})\n"
        f'folder = mlflow.artifacts.download_artifacts("models:/{registered_name(config)}/{version}")\n{line}\n```\n'
    )


def _tell_campaign(
    client: Client, config: CampaignConfig, campaign_run: str, found: list[Standing], label: str,
    versions: dict[str, str],
) -> None:  # fmt: skip
    number, key = experiment(client), campaign_id(config.folder)
    best = next(standing for standing in found if standing.is_champion)
    version = versions.get(round_run_id(config, best.record.round))
    champion = wording.champion_line(found)
    load = wording.load_link(registered_name(config), version) if version else None
    text = wording.about_campaign(champion, load, config, label, view_page(number, key))
    describe(client, campaign_run, wording.campaign_name(found, label), text)
    shown = f"{best.record.score} {wording.called(best.record.round)}"
    describe_registered(client, config, wording.about_registered(champion, load, label), {"champion": shown})
    began = found[0].record.finished_at
    assert began is not None
    view = rounds_view(label, campaign_run, list(config.evaluation_scorers), began.replace(tzinfo=UTC))
    describe_experiment(client, wording.ABOUT_EXPERIMENT, key, view)
