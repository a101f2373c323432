"""Export a round's trained weights, model card and configuration as a folder ready for upload."""

import json
import shutil
from pathlib import Path
from typing import Any

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.errors import D3POError
from d3po_core.export.cards import card, hub_model, public_config
from d3po_core.export.kohya import READERS, write_for_others
from d3po_core.export.native_names import NATIVE, write_native
from d3po_core.export.native_names import READERS as NATIVE_READERS
from d3po_core.models.families import FAMILIES, Family, Part
from d3po_core.models.families.stable_diffusion import StableDiffusion
from d3po_core.models.model_files import (
    absent_parts,
    family_of,
    layers_per_block,
    parts_of,
    scheduler_of,
    tensor_shapes,
)
from d3po_core.models.places import model_folder
from d3po_core.models.weights import LORA_FILE, loading_line, weights_file, weights_sha256
from d3po_core.queries.lookup import trained_round
from d3po_core.records import EvaluateRecord
from d3po_core.sizes import in_words
from d3po_core.store.campaign import round_config
from d3po_core.store.files import new_folder
from d3po_core.store.stages import checkpoint_path, read_record
from d3po_core.store.tables import partition, read_rows

CONFIG_FILE = "d3po.json"


def export_lora(campaign: Path, output: Path, round_name: str = "champion") -> int:
    """Write a round's LoRA, or the whole network if that was trained, with a model card.

    Args:
        campaign: the campaign's folder.
        output: the folder to make; it may exist if it is empty.
        round_name: ``champion``, ``latest`` or the number of a finished round.

    Returns:
        The round's number.

    Raises:
        D3POError: ``output`` is not empty, the round is not finished or is the base model, or its weights changed
            since training.
    """
    number = trained_round(campaign, round_name)
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
    family = _family(config.model, file)
    with new_folder(output) as folder:
        if file.name == LORA_FILE:
            shutil.copyfile(file, folder / LORA_FILE)
            rank = config.model.lora_rank
            readers = _for_others(folder, rank, config.model.lora_alpha or rank, config.model, family)
        else:
            shutil.copytree(file.parent, folder / file.parent.name)
            readers = ""
        (folder / CONFIG_FILE).write_text(json.dumps(details, indent=1))
        (folder / "README.md").write_text(_card(campaign, checkpoint, config, number, row, family, readers))
    return number


def _for_others(folder: Path, rank: int, alpha: float, config: ModelConfig, family: type[Family]) -> str:
    """Write the LoRA for programs that do not read diffusers' file; return lines for the model card."""
    said, pipeline = [], family.PIPELINE.__name__
    if family.COMFYUI or family.NETWORK == "unet":
        layers = layers_per_block(config) if family.FIRST_AUTHORS_NAMES else None
        other = write_for_others(folder / LORA_FILE, folder, rank, alpha, layers)
        said.append(f"`{other.name}` is the same LoRA for {READERS[other.name]}.")
    if pipeline in NATIVE:
        native = write_native(folder / LORA_FILE, folder, rank, alpha, pipeline)
        said.append(
            f"`{native.name}` is the same LoRA under its authors' names, for {NATIVE_READERS[pipeline]}."
            if native
            else "Some of its layers have no name in sd-scripts, so there is no file for it."
        )
    return "".join(f"{line}\n\n" for line in said)


def _family(config: ModelConfig, weights: Path) -> type[Family]:
    """Return the base model's family, from its folder or, if that is not on this machine, from the weights."""
    folder = model_folder(config)
    if folder is not None:
        return family_of(config, folder)
    shapes = tensor_shapes(config, weights)
    return next((family for family in FAMILIES.values() if family.trained(shapes)), StableDiffusion)


def _card(
    campaign: Path,
    checkpoint: Path,
    config: CampaignConfig,
    number: int,
    row: dict[str, Any],
    family: type[Family],
    readers: str,
) -> str:
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
        drawing=_drawing(config.model, family, hub or public_config(config)["model"]["path"]), readers=readers,
        call=_call(config, family), long=_LONG if sample.long_prompts == "chunk" else "",
        missing="" if hub else "The base model was a folder: put its hub id under `base_model` above and in the lines "
                               "below before you upload this.\n\n",
        scores=_scores(campaign, number, part), part=part, line=loading_line(checkpoint, '"FOLDER"'),
        labeller=config.judge.labeller, judges=people, steps=sample.num_steps,
        beta=train.beta, rate=train.learning_rate,
        extent=f"Rank {config.model.lora_rank}, alpha {config.model.lora_alpha or config.model.lora_rank}"
               if part == "LoRA" else f"All weights of the {part}",
        images=sample.images_per_round, size=sample.group_size,
    )  # fmt: skip
    return card(header, body)


def _call(config: CampaignConfig, family: type[Family]) -> str:
    """Return the arguments of the pipeline's call: guidance, negative prompt and size, a line each."""
    sample, (size, *others) = config.sample, config.sample.image_sizes
    lines = [
        family.call(sample.guidance_scale, sample.eta, _network(config.model, family)),
        family.call_away(sample.negative_prompt),
        family.call_size(*size) if size else "",
        f"# also trained at {', '.join(in_words(other) for other in others if other)} (height x width)"
        if others
        else "",
    ]
    return "\n    ".join(line for line in lines if line)


def _network(config: ModelConfig, family: type[Family]) -> Part | None:
    folder = model_folder(config)
    return parts_of(config, folder, family)[family.NETWORK] if folder else None


def _drawing(config: ModelConfig, family: type[Family], base: str) -> str:
    folder = model_folder(config)
    absent = [name for name in absent_parts(config, folder) if f"{name}=" not in family.DRAWING] if folder else []
    said = scheduler_of(config, folder, family).config if folder else {}
    fields = ("prediction_type", "rescale_betas_zero_snr", "clip_sample", "set_alpha_to_one")
    chain = "".join(f", {field}={said[field]!r}" for field in fields if field in said)
    return family.DRAWING.format(base=", ".join([json.dumps(base), *(f"{name}=None" for name in absent)]), chain=chain)


def _scores(campaign: Path, number: int, part: str) -> str:
    """Return a Markdown table of all held-out scores of the base and the round, with intervals."""
    records = [read_record(campaign, n, "evaluate", EvaluateRecord) for n in (0, number)]
    lines = [f"| held-out score, {records[1].num_images} images | base model | with this {part} |", "|---|---|---|"]
    for scorer in records[1].scores:
        cells = [str(record.scores[scorer]) for record in records]
        lines.append(f"| {scorer} | {' | '.join(cells)} |")
    return "\n".join(lines)


_LONG = """\
Prompts longer than 77 tokens were read in windows of 75, as AUTOMATIC1111 and compel read them. The lines above cut
them; compel gives `prompt_embeds` of all windows.

"""

_BODY = """
# {name}, round {number}

{missing}A {part} trained from preferences between images with [D3PO](https://arxiv.org/abs/2311.13231), without a
reward model: {number} rounds of {images} images in groups of {size}, judged by {judges} (`labeller: {labeller}`).

```python
import diffusers, torch

{drawing}
{line}  # this folder, or the id it is uploaded as
image = pipe(
    prompt={prompt},
    num_inference_steps={steps},
    {call}
    generator=torch.Generator().manual_seed(0),
).images[0]
```

{long}{readers}{scores}

In brackets: 95 % intervals of the mean over prompts. Prompts and seeds are the same for both columns and were never
trained on.

{extent}, beta {beta}, learning rate {rate}; everything else is in [{file}]({file}). SHA-256 of the
weights: `{sha256}`.
"""
