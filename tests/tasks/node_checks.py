"""What a run meets on nodes whose disk is full, or whose model is missing or another. Not tests themselves."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.processes import crew, engine
from d3po_core.processes.worker import Worker
from tests.tasks.heavy_jobs import HEAVY, HEAVY_BYTES, HEAVY_FILE, LARGE, MODEL_TEXT

Refused = Callable[[Any, CampaignConfig, int], list[str]]
HERE, THERE = "/models-here/", "/models-there/"


class Elsewhere(Worker):
    """A worker on a node with another disk: what the run has in one folder, the node has, or lacks, in another."""

    def look(self, models: dict[str, dict[str, str]]) -> dict[str, Any]:
        found = super().look({place.replace(HERE, THERE): files for place, files in models.items()})
        for kind in ("lacks", "differs"):
            found[kind] = [place.replace(THERE, HERE) for place in found[kind]]
        return found


def check_full_stores(config: CampaignConfig, refused: Refused) -> dict[str, Any]:
    """A file, and a result, that fit neither into the nodes' memory nor, they are told, on their disk."""
    found: dict[str, Any] = {}
    config.folder.mkdir(parents=True, exist_ok=True)
    with (config.folder / HEAVY_FILE).open("wb") as file:
        file.truncate(HEAVY_BYTES)
    for name, job in (("full, sending", HEAVY), ("full, returning", LARGE)):
        began = time.monotonic()
        found[name] = [*refused(job, config, 0), time.monotonic() - began]
    engine.end_processes()
    return found


def check_models(folder: Path, compute: dict[str, Any], refused: Refused) -> dict[str, Any]:
    """Two models of one name that the nodes lack; then one of them is there, with other files."""
    here = folder / HERE.strip("/")
    model, pipeline = here / "first" / "model", here / "second" / "model"
    for path, text in ((model / "unet" / "weights.bin", "weights"), (pipeline / "index.json", "index")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    values = {"device": "cpu", "path": str(model), "single_file_config": str(pipeline)}
    config = load_config({"runs_dir": str(folder), "model": values, "compute": compute}, "test")
    found: dict[str, Any] = {}
    with mock.patch.object(crew, "Worker", Elsewhere):
        found["models lacking"] = engine.run_job(MODEL_TEXT, config, 0, lambda count: None)
        engine.end_processes()
        other = folder / THERE.strip("/") / "second" / "model" / "index.json"
        other.parent.mkdir(parents=True)
        other.write_text("other")
        found["model differs"] = refused(MODEL_TEXT, config, 0)
        engine.end_processes()
    return found
