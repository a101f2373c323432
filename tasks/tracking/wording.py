"""Names and descriptions on MLflow's pages. They begin with the score, because narrow columns cut them off."""

from d3po.tasks.tracking.standing import Standing
from d3po.tasks.tracking.views import TRAINING
from d3po_core.config import CampaignConfig
from d3po_core.evaluation.comparison import Comparison
from d3po_core.records import RoundRecord

ABOUT_EXPERIMENT = "Each run is a campaign. Views lists a table of each campaign's rounds, the best first."
# MLflow refuses these in the name of a model.
_REPLACED = str.maketrans({".": "·", "/": "-", ":": "", "%": "", '"': "", "'": ""})


def called(round_number: int) -> str:
    """A round in words: ``base`` or ``round 12``."""
    return f"round {round_number}" if round_number else "base"


def round_name(standing: Standing, label: str) -> str:
    """Name of a round's run, as in ``★ round 12: 0.743 [0.667, 0.812] champion · shapes``."""
    star = "★ " if standing.is_champion else ""
    return f"{star}{called(standing.record.round)}: {standing.record.score}{_stands(standing)} · {label}"


def _stands(standing: Standing) -> str:
    """The round's place: champion, or its change to the champion and what the guard found."""
    if standing.is_champion:
        return " champion"
    change = standing.against_champion
    words = [f"{change.difference.mean:+.3f} to champion"] if change and standing.is_recent else []
    words += [standing.record.verdict] if standing.record.verdict not in (None, "ok") else []
    return f" {', '.join(words)}" if words else ""


def model_name(record: RoundRecord, label: str) -> str:
    """Name of a round's model, which never changes: ``round 12 0·743 [0·667, 0·812] shapes``."""
    return f"{called(record.round)} {record.score} {label}".translate(_REPLACED)


def about_round(standing: Standing, config: CampaignConfig, label: str) -> str:
    """Description of a round's run and of its model's version, without the lines that load it."""
    record = standing.record
    other = called(standing.champion) if standing.champion else "the base"
    place = "; the champion" if standing.is_champion else f"; the champion is {other}" if standing.is_recent else ""
    lines = [
        f"{record.score} {record.eval_scorer}, {called(record.round)} of campaign `{label}`{place}.", "",
        *_compared("the base", standing.against_base),
        *(_compared("the champion", standing.against_champion) if standing.champion and standing.is_recent else []),
        *_by_people(standing),
    ]  # fmt: skip
    if record.verdict:
        lines.append(f"- guard: {record.verdict}{f' ({record.findings})' if record.findings else ''}")
    if standing.is_champion and not record.round:
        lines.append("- nothing to load: the champion is the base model itself; more rounds may change that")
    if record.round:
        lines.append(f"- learned from {record.num_pairs} pairs; {record.num_ties} ties taught nothing")
    scores = ", ".join(config.evaluation_scorers)
    lines += ["", f"Scores are means over held-out images ({scores}), with 95 % intervals over prompts."]
    return "\n".join(lines) + "\n"


def _compared(what: str, comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return []
    wins, images = comparison.win_rate, comparison.num_images
    return [
        f"- against {what}: {comparison.difference.signed}, {comparison.verdict}; better on {wins.mean:.0%} of the "
        f"same {images} images"
    ]


def _by_people(standing: Standing) -> list[str]:
    if (rate := standing.people) is None:
        return []
    return [f"- people, asked blind, prefer it to the base in {rate.win_rate.mean:.0%} of {rate.num_pairs} pairs"]


def champion_line(standings: list[Standing]) -> str:
    """The champion, its score and its gain over the base."""
    best = next(standing for standing in standings if standing.is_champion)
    record, last = best.record, standings[-1].record.round
    if not record.round:
        return f"{record.score} {record.eval_scorer}: the base is the champion, after {_rounds(last)}."
    gain = f", {best.against_base.difference.signed} over the base" if best.against_base else ""
    return f"{record.score} {record.eval_scorer}: the champion is round {record.round} of {last}{gain}."


def load_link(registered: str, version: str) -> str:
    """A link from a description to the version whose description has the lines that load it."""
    return f"[Load the champion](#/models/{registered}/versions/{version}{TRAINING})"


def _rounds(number: int) -> str:
    return f"{number} {'round' if number == 1 else 'rounds'}"


def campaign_name(standings: list[Standing], label: str) -> str:
    """Name of a campaign's run, with its champion: ``shapes: 0.743 [0.667, 0.812] round 12``.

    It is short, because MLflow makes the frame of the images as wide as the name.
    """
    best = next(standing for standing in standings if standing.is_champion).record
    return f"{label}: {best.score} {called(best.round)}"


def about_campaign(champion: str, load: str | None, config: CampaignConfig, label: str, table: str) -> str:
    """Description of a campaign's run: the champion, how to read the run, what to type next, what it is.

    Links come first: MLflow folds a long description, and what lies under the fold cannot be clicked.
    """
    judges = ", ".join(config.judge.scorers)
    links = " · ".join(filter(None, (load, f"[All rounds, best first]({table.removeprefix('/')})")))
    return f"""{links}

{champion}

- *Model metrics* begins with the held-out score over rounds, and images of the same prompts and seeds. Move the
  slider under the images from round to round.
- *Artifacts* holds `report.html`: is it better, is it sane, why did it change.
- Next: `d3po compare base champion --campaign {config.campaign}`, then
  `d3po export-lora --campaign {config.campaign} --output FOLDER`

Campaign `{label}` aligns `{config.model.path}` with D3PO. Labeller: {config.judge.labeller}; scorers: {judges}. Every
round is scored on the same held-out prompts and seeds.
"""


def about_registered(champion: str, load: str | None, label: str) -> str:
    """Description of a registered model."""
    return (
        f"{champion} {load or ''}\n\nCheckpoints of the D3PO campaign `{label}`, one version per round. The alias "
        "`champion` is the best round that the guard trusts, `current` the one that the next round starts from.\n"
    )
