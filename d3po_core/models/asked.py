"""What a campaign asks of the policy beside its model: the sizes that it draws, and how texts are read."""

from dataclasses import dataclass

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.sizes import Size

# The pipelines whose texts CLIP alone reads, so that long ones can be read window by window.
READ_BY_WINDOWS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass(frozen=True)
class Asked:
    """Sizes and texts of a campaign.

    Attributes:
        sizes: every size that is drawn, sampled or held out; None is the network's native size.
        negative_prompt: what guidance leads away from.
        by_windows: whether prompts longer than an encoder reads are read window by window; else they are cut.
    """

    sizes: tuple[Size | None, ...] = (None,)
    negative_prompt: str = ""
    by_windows: bool = False


def asked_by(config: CampaignConfig) -> Asked:
    """Return what a campaign's configuration asks of the policy."""
    return Asked(
        sizes=tuple(dict.fromkeys((*config.sample.image_sizes, config.held_out_size))),
        negative_prompt=config.sample.negative_prompt,
        by_windows=config.sample.long_prompts == "chunk",
    )


def why_not(config: ModelConfig, asked: Asked, pipeline: str | None, guidance: str | None) -> str | None:
    """Return what a model cannot do of what is asked, in one line; None if it can, or if nothing is known of it.

    Args:
        config: the model's settings.
        asked: sizes and texts.
        pipeline: the class of its pipeline.
        guidance: how it is guided: ``two passes``, ``told`` or ``none``.
    """
    if asked.negative_prompt and guidance not in (None, "two passes"):
        how = "is told its guidance as a number" if guidance == "told" else "was distilled to draw without guidance"
        return (
            f"sample.negative_prompt is set, and model.path {config.path!r} cannot use one: it {how}; only guidance by "
            "two passes leads away from a text. Leave it out"
        )
    if asked.by_windows and pipeline not in (None, *READ_BY_WINDOWS):
        return (
            f"sample.long_prompts is 'chunk', and model.path {config.path!r} is a {pipeline}, whose encoders do not "
            "read window by window; set it to 'truncate' or 'error'"
        )
    return None
