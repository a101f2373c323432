"""The sentences of a model card about a base model that the card's lines cannot load as it is."""

from d3po_core.config import ModelConfig
from d3po_core.models.families import Family
from d3po_core.models.loading import storage_notes


def said_of_base(config: ModelConfig, family: type[Family], hub: str | None) -> str:
    """Return a paragraph of what to change in the lines that draw; empty if they run as they are.

    Args:
        config: the model's settings.
        family: the model's family.
        hub: the base model's hub id, if it has one.
    """
    if hub:
        return ""
    said = [
        "The base model was a folder: put its hub id under `base_model` above and in the lines below before you upload "
        "this."
    ]
    if config.single_file_config:
        said = [
            f"The base model was one file: load it with `from_single_file` of `diffusers.{family.PIPELINE.__name__}`, "
            f"or of its {family.NETWORK}'s class if it holds no more, instead of `from_pretrained`."
        ]
    if any("with scales" in note for note in storage_notes(config)):
        said.append(
            "Its weights were stored in 8 bits with scales, which diffusers does not apply: take the model in 16 bits "
            "in these lines."
        )
    return " ".join(said) + "\n\n"
