"""Hostile model folders: every field of every configuration set to values that nobody wants, then two images drawn.

Counts how each ends: refused in one line, drawn with finite latents, drawn with others, or in a traceback.

    python tests/benchmarks/hostile_models.py --count 400
"""

import argparse
import collections
import json
import random
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from d3po_core.config import ModelConfig, SampleConfig
from d3po_core.errors import D3POError
from d3po_core.models.loaded import load_policy
from d3po_core.sampling.rollout import draw_images
from tests.core.models.tiny_models import tiny_model
from tests.core.sampling.drawing import image_seed

FAMILIES = ("sd", "sdxl", "sd3")
VALUES: tuple[Any, ...] = (None, "8", -1, 0, 3, 1e300, True, [], [8], {}, {"a": [1]}, "x" * 50)
SEEDS = [image_seed("a red circle on a gray background", member) for member in range(2)]


def main() -> None:
    """Print a table of endings, and each traceback's last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="how many changes are tried, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        changes = [change for name in FAMILIES for change in all_changes(tiny_model(name, Path(root) / name))]
        endings = collections.Counter[str]()
        for file, field, value in random.Random(arguments.seed).sample(changes, arguments.count):
            ending = ending_of(file, field, value)
            endings[ending.partition(":")[0]] += 1
            if not ending.startswith(("refused", "drawn, finite")):
                print(f"{file.relative_to(root)} {field} = {json.dumps(value)[:40]}: {ending}", flush=True)
    print(f"{len(changes)} changes possible, {arguments.count} tried")
    for ending, count in endings.most_common():
        print(f"{count:6}  {ending}")


def all_changes(folder: Path) -> list[tuple[Path, str, Any]]:
    """Each field of each JSON file of a model's configuration, with each value."""
    files = [folder / "model_index.json", *folder.glob("*/config.json"), *folder.glob("*/scheduler_config.json")]
    return [
        (file, field, value) for file in sorted(files) for field in json.loads(file.read_text()) for value in VALUES
    ]


def ending_of(file: Path, field: str, value: Any) -> str:
    """How drawing two images ends with one field changed; the file is as before afterwards."""
    before = file.read_text()
    folder = file.parent if file.name == "model_index.json" else file.parent.parent
    file.write_text(json.dumps({**json.loads(before), field: value}))
    try:
        policy = load_policy(ModelConfig(path=str(folder), device="cpu", lora_rank=2), seed=0)
        drawn, _ = draw_images(policy, SampleConfig(num_steps=2, guidance_scale=3.0), SEEDS, torch.float32)
    except D3POError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Exception:
        return f"traceback: {traceback.format_exc().strip().splitlines()[-1][:150]}"
    finally:
        file.write_text(before)
    return "drawn, finite" if drawn.latents_BTCHW.isfinite().all() else "drawn, not finite"


if __name__ == "__main__":
    main()
