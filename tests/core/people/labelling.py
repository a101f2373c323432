"""A campaign whose round waits for people, written without a model: flat images, each of its own colour."""

import itertools
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from d3po_core.config import CampaignConfig
from d3po_core.store.campaign import CAMPAIGN_FILE
from d3po_core.store.images import save_png
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import table_from_rows, write_table

NOON = datetime(2026, 3, 1, 12)


def waiting_campaign(
    data: Path, name: str = "x", groups: int = 3, size: int = 3, labeller: str = "human", round_number: int = 1,
    pixels: int = 8, **people: Any,
) -> CampaignConfig:  # fmt: skip
    """Write a sampled round of a campaign in ``data/runs``; ``people`` are fields of judge.people."""
    values = {"campaign": name, "runs_dir": str(data / "runs"), "judge": {"labeller": labeller, "people": people}}
    config = CampaignConfig.model_validate(values)
    folder = config.folder
    rows = []
    for group, member in itertools.product(range(groups), range(size)):
        sample_id = f"r{round_number}-g{group}-m{member}"
        path = f"images/round={round_number}/{sample_id}.png"
        colour = np.array([(37 * group) % 256, (80 * member) % 256, 100], np.uint8)
        save_png(np.broadcast_to(colour, (pixels, pixels, 3)).copy(), folder / path)
        rows.append(
            {
                "sample_id": sample_id, "group_id": f"r{round_number}-g{group}", "member": member,
                "prompt": f"prompt <b>{group}</b> & co", "split": "train", "seed": 1, "image_path": path,
                "trajectory_path": "t", "trajectory_row": 0, "checkpoint": None,
            }
        )  # fmt: skip
    write_table(folder, "samples", round_number, table_from_rows("samples", rows))
    saved = config.model_dump(mode="json")
    (folder / CAMPAIGN_FILE).write_text(json.dumps({"id": name, "config": saved}))
    stage = stage_path(folder, round_number, "config")
    stage.parent.mkdir(parents=True)
    stage.write_text(json.dumps(saved))
    stage_path(folder, round_number, "sample").write_text(json.dumps({"num_samples": len(rows), "round": round_number}))
    return config


def bring_in(config: CampaignConfig, rows: Iterable[dict[str, Any]], name: str = "csv", round_number: int = 1) -> None:
    """Write judgements that did not come from the page; what a row does not say is a human's rating."""
    usual = {
        "rater": "carl", "rater_kind": "human", "kind": "rating", "other_id": None, "value": 1.0, "judged_at": NOON,
        "source": name, "seconds": None, "position": None,
    }  # fmt: skip
    table = table_from_rows("judgements", [usual | row for row in rows])
    write_table(config.folder, "judgements", round_number, table, name=name)
