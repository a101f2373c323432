"""What a round trained, as a folder that can be uploaded as it is: weights, model card, configuration."""

import json
import shutil
from pathlib import Path
from typing import Any

from d3po_core.campaign import checkpoint_path, read_record, round_config
from d3po_core.cards import card, hub_model, new_folder, public_config
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.kohya import KOHYA_FILE, write_kohya
from d3po_core.lookup import finished_round
from d3po_core.records import EvaluateRecord
from d3po_core.tables import partition, read_rows
from d3po_core.weights import LORA_FILE, loading_line, weights_file, weights_sha256

CONFIG_FILE = "d3po.json"


def export_lora(campaign: Path, output: Path, round_number: int | None = None) -> int:
    """Write the LoRA of a round, or the network if all of it was trained, with a model card.

    Args:
        campaign: the campaign's folder.
        output: the folder to make; it may exist if it is empty.
        round_number: a finished round from 1; the last when not given.

    Returns:
        The round.

    Raises:
        D3POError: ``output`` is not empty, the round is not finished, or its weights are not what was trained.
    """
    number = finished_round(campaign, round_number, trained=True)
    checkpoint = campaign / str(checkpoint_path(number))
    row = read_rows(partition(campaign, "rounds", number) / "part.parquet")[0]
    file = weights_file(checkpoint)
    if not file.is_file():
        raise D3POError(f"{file}: is gone; restore it, or export another round")
    if weights_sha256(checkpoint) != row["lora_sha256"]:
        raise D3POError(f"{file}: was changed since round {number} was trained; restore it")
    config = round_config(campaign, number)
    details = {
        "campaign": campaign.name,
        "round": number,
        **{key: row[key] for key in ("lora_sha256", "config_sha256", "git_commit")},
        "config": public_config(config),
    }
    with new_folder(output) as folder:
        if file.name == LORA_FILE:
            shutil.copyfile(file, folder / LORA_FILE)
            rank = config.model.lora_rank
            write_kohya(folder / LORA_FILE, folder / KOHYA_FILE, rank, config.model.lora_alpha or rank)
        else:
            shutil.copytree(file.parent, folder / file.parent.name)
        (folder / CONFIG_FILE).write_text(json.dumps(details, indent=1))
        (folder / "README.md").write_text(_card(campaign, checkpoint, config, number, row))
    return number


def _card(campaign: Path, checkpoint: Path, config: CampaignConfig, number: int, row: dict[str, Any]) -> str:
    hub = hub_model(config)
    header: dict[str, Any] = {"base_model": hub} if hub else {}
    file = weights_file(checkpoint)
    part = "LoRA" if file.name == LORA_FILE else file.parent.name
    header |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*(["lora"] if part == "LoRA" else []), "diffusers", "text-to-image", "d3po"],
    }
    prompt = read_rows(partition(campaign, "evaluations", number) / "part.parquet")[0]["prompt"]
    sample, train = config.sample, config.train
    people = "people" if config.judge.labeller != "proxy" else "proxy scorers"
    body = _BODY.format(
        name=campaign.name, number=number, sha256=row["lora_sha256"], prompt=json.dumps(prompt), file=CONFIG_FILE,
        base=hub or public_config(config)["model"]["path"],
        missing="" if hub else "The base model was a folder: put its hub id under `base_model` above and in the lines "
                               "below before you upload this.\n\n",
        scores=_scores(campaign, number, part), part=part, line=loading_line(checkpoint, '"FOLDER"'),
        labeller=config.judge.labeller, judges=people, steps=sample.num_steps,
        guidance=sample.guidance_scale, eta=sample.eta, beta=train.beta, rate=train.learning_rate,
        extent=f"Rank {config.model.lora_rank}, alpha {config.model.lora_alpha or config.model.lora_rank}"
               if part == "LoRA" else f"All weights of the {part}",
        images=sample.images_per_round, size=sample.group_size,
    )  # fmt: skip
    return card(header, body)


def _scores(campaign: Path, number: int, part: str) -> str:
    """Rows of a Markdown table: every held-out score of base and round, with its interval."""
    records = [read_record(campaign, n, "evaluate", EvaluateRecord) for n in (0, number)]
    lines = [f"| held-out score, {records[1].num_images} images | base model | with this {part} |", "|---|---|---|"]
    for scorer in records[1].scores:
        cells = [f"{s.mean:.3f} [{s.low:.3f}, {s.high:.3f}]" for s in (record.scores[scorer] for record in records)]
        lines.append(f"| {scorer} | {' | '.join(cells)} |")
    return "\n".join(lines)


_BODY = """
# {name}, round {number}

{missing}A {part} trained from preferences between images with [D3PO](https://arxiv.org/abs/2311.13231), without a
reward model: {number} rounds of {images} images in groups of {size}, judged by {judges} (`labeller: {labeller}`).

```python
import diffusers, torch

pipe = diffusers.DiffusionPipeline.from_pretrained("{base}", safety_checker=None)
pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
{line}  # this folder, or the id it is uploaded as
image = pipe(
    {prompt},
    num_inference_steps={steps},
    guidance_scale={guidance},
    eta={eta},
    generator=torch.Generator().manual_seed(0),
).images[0]
```

{scores}

In brackets: 95 % bootstrap intervals of the mean. Prompts and seeds are the same for both columns and were never
trained on.

{extent}, beta {beta}, learning rate {rate}; everything else is in [{file}]({file}). SHA-256 of the
weights: `{sha256}`.
"""
