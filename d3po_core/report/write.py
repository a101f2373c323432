"""Write a campaign's report as one HTML file that needs no network, no server and no other file."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from d3po_core.config import CampaignConfig
from d3po_core.models.weights import loading_line, weights_file
from d3po_core.paths import path_in_project
from d3po_core.people.blind import collect_comparisons
from d3po_core.people.raters import rater_report
from d3po_core.report import answers, plots
from d3po_core.report.gather import STAGES, Facts, Row, gather
from d3po_core.report.pictures import SHEETS, RoundPictures, choose, round_pictures, thumbnail
from d3po_core.store.campaign import round_config
from d3po_core.store.files import atomic_path
from d3po_core.store.tables import connect
from d3po_core.urls import masked

REPORT_FILE = "report.html"


def write_report(campaign: CampaignConfig | Path, output: Path | None = None, mlflow: str | None = None) -> Path:
    """Write the report of a campaign's finished rounds, whole or not at all; call it after every round.

    Args:
        campaign: the campaign's configuration or its folder.
        output: the file; ``report.html`` in the campaign's folder when not given.
        mlflow: address of the campaign's rounds in MLflow, if it has one.

    Returns:
        The file's path.

    Raises:
        D3POError: there is no such campaign, it has no finished round, or the file cannot be written.
    """
    folder = campaign.folder if isinstance(campaign, CampaignConfig) else Path(campaign)
    path = output or folder / REPORT_FILE
    collect_comparisons(folder)
    facts = gather(folder)
    page = render(facts, _raters(facts) if facts.raters else None, mlflow)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def render(facts: Facts, raters: Mapping[str, Any] | None = None, mlflow: str | None = None) -> str:
    """Return a campaign's report as HTML.

    Args:
        facts: the facts to report.
        raters: ``summary`` maps a measure's name to a number or a text; ``table`` has one row per rater, which maps a
            column's name to a number, a text or None.
        mlflow: address of the campaign's rounds in MLflow, if it has one.
    """
    pictures = [
        round_pictures(facts.folder, row["round"], [facts.campaign_id, row["lora_sha256"]], facts.held_out, position)
        for position, row in enumerate(facts.rounds)
    ]
    scorers = answers.scored(facts)
    prompts = answers.by_prompt(facts)
    found = answers.checks(facts, scorers, pictures, prompts)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": answers.number, "signed": answers.signed, "interval": answers.interval, "image": _image(facts),
        "duration": duration, "uncapital": uncapital, "pairings": lambda one: answers.pairings(facts, one),
    }  # fmt: skip
    return environment.get_template("template.html").render(
        facts=facts,
        name=facts.config["campaign"],
        folder=path_in_project(facts.folder),
        written_at=datetime.now(UTC),
        rounds=facts.rounds,
        labels=[answers.label(facts, row) for row in range(len(facts.rounds))],
        champion=facts.champion,
        scorers=scorers,
        better=answers.is_it_better(facts, scorers),
        checks=found,
        alarms=[check for check in found if check.fine is False],
        reasons=answers.reasons(facts, scorers[0], prompts),
        prompts=prompts,
        checkpoint=_checkpoint(facts),
        curves=_curves(facts, scorers),
        small=_small_curves(facts, pictures),
        time=_time(facts),
        sheets=_sheets(facts, pictures, scorers[0]),
        sheet_rows=choose(facts.held_out),
        raters=raters or {},
        mlflow=mlflow,
        config=masked(yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True)),
        lineage={what: _spans(facts.rounds, what) for what in ("git_commit", "config_sha256")},
        files=[row | {"path": path_in_project(Path(row["path"]))} for row in facts.files],
        stages=STAGES,
    )


def _raters(facts: Facts) -> dict[str, Any]:
    """Return how far people agree, and each rater's figures."""
    with connect(facts.folder) as connection:
        found = rater_report(connection, facts.config["judge"]["people"]["accuracy_floor"])
    table = [
        {
            "rater": one.rater + (" (left out)" if one.left_out else ""), "judgements": one.judgements,
            "skipped": one.skips, "taken back": one.taken_back, "seconds": one.seconds,
            "gold answered": one.gold_answered,
            "gold right": one.gold_right / one.gold_answered if one.gold_answered else None,
            "reliability": one.reliability, "agreement": one.agreement, "chose the first": one.first_share,
        }
        for one in found.raters
    ]  # fmt: skip
    summary = {"Krippendorff's alpha": found.alpha, "equal votes": found.agreement,
               "pairs with several raters": found.pairs_of_several}  # fmt: skip
    return {"summary": summary, "table": table}


def _image(facts: Facts) -> Any:
    kept: dict[str, str | None] = {}

    def image(path: str) -> str | None:
        if path not in kept:
            kept[path] = thumbnail(facts.folder / path)
        return kept[path]

    return image


def _checkpoint(facts: Facts) -> Row | None:
    row = facts.rounds[facts.champion]
    if row["checkpoint_out"] is None:
        return None
    folder = facts.folder / row["checkpoint_out"]
    path, exists = path_in_project(folder), weights_file(folder).exists()
    model = round_config(facts.folder, facts.champion).model
    line = loading_line(folder, json.dumps(path), model) if exists else None
    return {"path": path, "sha256": row["lora_sha256"], "exists": exists, "line": line}


def _curves(facts: Facts, scorers: list[answers.Scored]) -> list[Row]:
    """Return each scorer's curve, wide and for phones."""
    numbers = [row["round"] for row in facts.rounds]
    return [
        {
            "name": one.name,
            "wide": plots.score_curve(f"wide {i}", numbers, one.means, facts.champion, plots.WIDE),
            "narrow": plots.score_curve(f"narrow {i}", numbers, one.means, facts.champion, plots.NARROW),
        }
        for i, one in enumerate(scorers)
    ]


def _small_curves(facts: Facts, pictures: list[RoundPictures]) -> list[Row]:
    """Return curves of pairs, training and diversity, except those without any value."""
    numbers = [row["round"] for row in facts.rounds]
    trained = {row["round"]: row for row in facts.training}
    curves = [
        ("pair_accuracy_after", "Pairs learned", "share of the round's pairs and steps on which the policy prefers the "
         "winner after the round"),
        ("margin_after", "Margin learned", "log-ratio of winners over that of losers, after the round"),
        ("pair_accuracy_before", "Pair accuracy before each update", "on pairs not learned from yet: near one half"),
        ("margin_before", "Margin before each update", "mean over the round's updates"),
        ("kl_after", "KL of the round", "between the round's first and last policy, nats per element and step"),
        ("loss", "Loss before each update", "on pairs not learned from yet: near log 2 = 0.69, whatever comes after"),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("clip_fraction", "Clamped", "share of the pair-steps"),
    ]  # fmt: skip
    spread = [float(np.mean(list(p.diversity.values()))) if p.diversity else None for p in pictures]
    found: list[tuple[str, str, list[float | None]]] = [
        ("Diversity", "mean difference of two images of a prompt, 0 to 1", spread)
    ]
    for column, title, text in curves:
        found.append((title, text, [trained.get(n, {}).get(column) for n in numbers]))
    shown = [
        {"title": title, "text": text, "svg": plots.small_curve(title, numbers, values, title), "legend": []}
        for title, text, values in found
        if any(value not in (None, 0.0) for value in values)
    ]
    parts = {"pairs": [row["num_pairs"] for row in facts.rounds], "ties": [row["num_ties"] for row in facts.rounds]}
    if any(map(sum, parts.values())):
        svg = plots.stacked_bars("pairs", numbers, parts, "Pairs and ties by round")
        shown.insert(0, {"title": "Pairs", "text": "judged pairs by round", "svg": svg, "legend": list(parts)})
    return shown


def _time(facts: Facts) -> Row:
    """Return seconds per stage: bars over rounds, and one row per stage."""
    seconds = {stage: [row[f"{stage}_seconds"] for row in facts.rounds] for stage in STAGES}
    total = sum(map(sum, seconds.values()))
    rows = [
        {
            "stage": stage,
            "total": sum(values),
            "median": float(np.median(values[1:] or values)),
            "share": sum(values) / total if total else 0.0,
        }
        for stage, values in seconds.items()
    ]
    svg = plots.stacked_bars("time", [row["round"] for row in facts.rounds], seconds, "Seconds by round and stage")
    return {"svg": svg, "rows": rows, "total": total}


def _sheets(facts: Facts, pictures: list[RoundPictures], first: answers.Scored) -> list[Row]:
    """Return the slider's sheets: at most SHEETS rounds, always with the base, the champion and the latest."""
    there = [position for position, picture in enumerate(pictures) if picture.sheet]
    if len(there) > SHEETS:
        must = {0, facts.champion, len(pictures) - 1} & set(there)
        others = [position for position in there if position not in must]
        spread = np.linspace(0, len(others) - 1, SHEETS - len(must)).round().astype(int)
        there = sorted(must | {others[i] for i in spread})
    return [
        {
            "label": answers.label(facts, position),
            "text": answers.number(first.means[position].mean),
            "champion": position == facts.champion,
            "source": pictures[position].sheet,
        }
        for position in there
    ]


def _spans(rounds: Sequence[Row], column: str) -> list[Row]:
    """Return a column's values, each with the first and last round that had it in a row."""
    spans: list[Row] = []
    for row in rounds:
        if not spans or spans[-1]["value"] != row[column]:
            spans.append({"value": row[column], "first": row["round"], "last": row["round"]})
        spans[-1]["last"] = row["round"]
    return spans


def uncapital(text: str) -> str:
    """Return the text with a lower-case first letter, unless its first word is an acronym."""
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def duration(seconds: float) -> str:
    """Return seconds in words: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
