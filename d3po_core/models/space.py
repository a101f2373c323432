"""Estimate a round's disk space from the model's own files."""

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.models.families import Network, Vae
from d3po_core.models.model_files import family_of, network_elements, parts_of
from d3po_core.models.places import model_folder
from d3po_core.models.written import UNKNOWN_LATENT, UNKNOWN_PIXELS, UNKNOWN_WEIGHTS, require_space, written_bytes


def check_space(config: CampaignConfig) -> None:
    """Check that a round fits on the disk before anything is computed.

    Raises:
        D3POError: the free space is less than a round needs.
    """
    require_space(config, round_bytes(config))


def round_bytes(config: CampaignConfig) -> int:
    """Estimate the bytes a round writes: trajectories, images (at most one byte per channel as PNG), weights."""
    latent, per_side = latent_and_pixels(config.model)
    trained = (network_elements(config.model) or UNKNOWN_WEIGHTS) if config.model.train == "full" else 0
    return written_bytes(config, latent, per_side, trained)


def latent_and_pixels(config: ModelConfig) -> tuple[tuple[int, ...], int]:
    """Return a latent's shape, and the pixel width of one element."""
    folder = model_folder(config)
    if folder is None:
        return UNKNOWN_LATENT, UNKNOWN_PIXELS
    family = family_of(config, folder)
    parts = parts_of(config, folder, family)
    network, vae = parts[family.NETWORK], parts["vae"]
    assert isinstance(network, Network), "families say so"
    assert isinstance(vae, Vae), "families say so"
    return network.latent_shape, vae.pixels_per_latent
