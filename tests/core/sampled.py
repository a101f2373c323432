"""A campaign that has sampled some rounds, for tests that judge it; its images are small PNGs."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.store.campaign import CAMPAIGN_FILE
from d3po_core.store.images import save_png
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import table_from_rows, write_table

PROMPTS = ("a red circle on a black background", '=HYPERLINK("http://x")', 'a <b>bold</b> & "quoted" cross', "été 🎈")


def samples(round_number: int, groups: int = 4, size: int = 4) -> pa.Table:
    rows = [
        {
            "sample_id": f"r{round_number}-g{group}-m{member}", "group_id": f"r{round_number}-g{group}",
            "member": member, "prompt": PROMPTS[group % len(PROMPTS)], "split": "train", "seed": group * size + member,
            "image_path": f"images/round={round_number}/r{round_number}-g{group}-m{member}.png",
            "trajectory_path": "none", "trajectory_row": 0, "checkpoint": None,
        }
        for group in range(groups) for member in range(size)
    ]  # fmt: skip
    return table_from_rows("samples", rows)


def sampled_campaign(
    runs: Path, name: str = "shapes", rounds: int = 3, groups: int = 4, size: int = 4, images: bool = False
) -> CampaignConfig:
    """A campaign whose rounds 1 to ``rounds`` are sampled, without running a model."""
    config = load_config({"campaign": name, "runs_dir": str(runs), "sample": {"group_size": size}}, "test")
    config.folder.mkdir(parents=True)
    identity = {"id": f"{name}-identity", "config": config.model_dump(mode="json")}
    (config.folder / CAMPAIGN_FILE).write_text(json.dumps(identity))
    for number in range(1, rounds + 1):
        table = samples(number, groups, size)
        write_table(config.folder, "samples", number, table)
        for index, path in enumerate(table["image_path"].to_pylist() if images else []):
            save_png(np.full((8, 8, 3), index, dtype=np.uint8), config.folder / path)
    return config


def finish_derive(config: CampaignConfig, round_number: int) -> None:
    path = stage_path(config.folder, round_number, "derive")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
