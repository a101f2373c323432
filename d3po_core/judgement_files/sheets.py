"""Sheets for raters without the page: a folder with images, a CSV to fill in, and a page that works offline."""

import csv
import io
import json
import random
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.judgement_files.importing import MANIFEST, read_samples, sampled_rounds
from d3po_core.people.guideline import guideline_text, render_guideline
from d3po_core.spreadsheets import neutralise
from d3po_core.store.campaign import campaign_id, rules_of
from d3po_core.store.files import new_folder
from d3po_core.store.integrity import require_files
from d3po_core.ways import WAYS, Mode

CSV_FILE, PAGE_FILE, IMAGES = "judgements.csv", "sheet.html", "images"
COMMON = ("rater", "judged_at", "position", "prompt", "campaign", "campaign_id", "round")

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ campaign }}, round {{ round }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1b1b1b }
section { border-top: 1px solid #ccc; padding: 0.75rem 0 }
h2 { font-size: 1.05rem; margin: 0 0 0.5rem } h2 small { color: #595959; font-weight: normal }
.row { display: flex; flex-wrap: wrap; gap: 0.75rem }
figure { margin: 0 } img { width: 16rem; height: 16rem; object-fit: contain; background: #eee; display: block }
figcaption { font: 0.85rem ui-monospace, monospace }
p img, li img { display: inline-block; width: 8rem; height: 8rem; vertical-align: middle }
</style>
<h1>{{ campaign }}, round {{ round }}</h1>
{{ guideline | safe }}
<p>{{ how }} The file to fill in is {{ csv }}; a row that you leave empty counts as not judged yet.</p>
{% for part in parts %}
<section>
<h2>{{ part.prompt }} <small>{{ part.title }}</small></h2>
<div class="row">
{% for image in part.images %}
<figure><img src="{{ image.src }}" alt="{{ image.id }}" loading="lazy">
<figcaption>{{ image.note }}{{ image.id }}</figcaption></figure>
{% endfor %}
</div>
</section>
{% endfor %}
</html>
""")


@dataclass(frozen=True)
class SheetReport:
    """A written sheet: its folder, round, mode, number of rows to fill in, and images."""

    folder: Path
    round_number: int
    mode: str
    num_rows: int
    num_images: int


def export_sheet(
    config: CampaignConfig,
    folder: Path,
    round_number: int | None = None,
    mode: Mode | None = None,
    rater: str | None = None,
    seed: int | None = None,
    groups: Collection[str] | None = None,
) -> SheetReport:
    """Write a sheet for a rater without the page, whole or not at all; ``d3po import`` reads the filled-in CSV.

    Each sheet draws its own order of a group's images, so that no image comes first for every rater. The order is
    recorded as ``position`` and in the manifest.

    Args:
        config: the campaign.
        folder: the new folder; it must not exist yet, or be empty.
        round_number: the round; by default the last sampled one.
        mode: what the rater does; by default the campaign's ``judge.people.mode``.
        rater: name to fill in already.
        seed: of the order; by default it follows from campaign, round and rater.
        groups: ids of the groups to judge; by default all of the round.

    Raises:
        D3POError: no such round, group or image; or the folder is not empty.
    """
    sampled = sampled_rounds(config.folder)
    number = round_number if round_number is not None else max(sampled, default=1)
    people = rules_of(config.folder, number).judge.people
    mode = mode or people.mode
    # Seeded by text, so any Python draws the same sheet; torch's generators would take seconds to load.
    generator = random.Random(f"{config.seed} {config.campaign} {number} {rater}" if seed is None else str(seed))
    chosen = _shuffled(config, number, generator, groups)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise D3POError(f"{folder} holds something already, perhaps a filled-in sheet; give another --output")
    rows, parts = _pairs(chosen, generator) if mode == "pair" else _groups(chosen)
    fixed = {"rater": rater or "", "judged_at": "", "campaign": config.campaign, "round": number,
             "campaign_id": campaign_id(config.folder)}  # fmt: skip
    lines = [{**fixed, **row} for row in rows]
    examples: dict[str, Path] = {}
    guideline = render_guideline(
        guideline_text(people, mode), config.folder, partial(_example, config.folder, examples)
    )
    page = _PAGE.render(
        campaign=config.campaign, round=number, guideline=guideline.whole or guideline.short, how=WAYS[mode].sheet,
        csv=CSV_FILE, parts=parts,
    )  # fmt: skip
    manifest = {
        "campaign": config.campaign, "campaign_id": campaign_id(config.folder), "round": number, "mode": mode,
        "rater": rater, "order": [[s["sample_id"] for s in group] for group in chosen],
    }  # fmt: skip
    images = {
        Path(sample["image_path"]).name: config.folder / sample["image_path"] for group in chosen for sample in group
    }
    require_files(config.folder, [sample["image_path"] for group in chosen for sample in group])
    _write(folder, csv_text((*WAYS[mode].columns, *COMMON), lines), page, manifest, images | examples)
    return SheetReport(folder, number, mode, len(lines), len(images))


def csv_text(header: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    """CSV whose cells no spreadsheet runs as formulas; missing columns of a row are empty."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows([neutralise(str(row.get(name, ""))) for name in header] for row in rows)
    return stream.getvalue()


def _shuffled(
    config: CampaignConfig, number: int, generator: random.Random, groups: Collection[str] | None
) -> list[list[dict[str, Any]]]:
    by_group: dict[str, list[dict[str, Any]]] = {}
    for sample in read_samples(config.folder, number).to_pylist():
        by_group.setdefault(sample["group_id"], []).append(sample)
    unknown = sorted(set(groups or ()) - by_group.keys())
    if unknown:
        raise D3POError(f"round {number} of campaign {config.campaign!r} has no group {', '.join(unknown[:5])}")
    chosen = [group for name, group in by_group.items() if groups is None or name in groups]
    for group in chosen:
        generator.shuffle(group)
    return chosen


def _image(sample: dict[str, Any], note: str) -> dict[str, str]:
    return {"src": f"{IMAGES}/{sample['sample_id']}.png", "id": sample["sample_id"], "note": note}


def _pairs(
    groups: list[list[dict[str, Any]]], generator: random.Random
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, parts = [], []
    for group in groups:
        for pair in combinations(group, 2):
            first, second = generator.sample(pair, 2)
            rows.append({"first_id": first["sample_id"], "second_id": second["sample_id"], "position": 0,
                         "prompt": first["prompt"]})  # fmt: skip
            images = [_image(first, "first: "), _image(second, "second: ")]
            parts.append({"prompt": first["prompt"], "title": f"row {len(rows) + 1}", "images": images})
    return rows, parts


def _groups(groups: list[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, parts = [], []
    for group in groups:
        images = []
        for position, sample in enumerate(group):
            rows.append({**{key: sample[key] for key in ("group_id", "sample_id", "prompt")}, "position": position})
            images.append(_image(sample, f"row {len(rows) + 1}: "))
        parts.append({"prompt": group[0]["prompt"], "title": group[0]["group_id"], "images": images})
    return rows, parts


def _example(campaign: Path, examples: dict[str, Path], path: Path) -> str:
    """Note that the sheet needs an example image of the guideline; return where its page finds it."""
    name = "-".join(("example", *path.relative_to(campaign).parts))
    examples[name] = path
    return f"{IMAGES}/{quote(name)}"


def _write(folder: Path, table: str, page: str, manifest: dict[str, Any], images: dict[str, Path]) -> None:
    with new_folder(folder) as temporary:
        (temporary / IMAGES).mkdir()
        for name, image in images.items():
            try:
                shutil.copyfile(image, temporary / IMAGES / name)
            except FileNotFoundError:
                raise D3POError(f"{image} is missing; restore it, or sample the round again") from None
        # Without a byte order mark, spreadsheets read a CSV in their country's old encoding.
        (temporary / CSV_FILE).write_bytes(b"\xef\xbb\xbf" + table.encode())
        (temporary / PAGE_FILE).write_text(page, encoding="utf-8")
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
