"""What tests of sampling and training draw from."""

import torch

from d3po_core.denoising.ddim import step_mean
from d3po_core.models.policy import Policy
from d3po_core.seeds import ImageSeed, derive_seed, gaussian
from d3po_core.sizes import Size


def image_seed(prompt: str, member: int, campaign: int = 0, round_number: int = 1) -> ImageSeed:
    """The seed of a member of a prompt's group; members share x_T."""
    key = (campaign, round_number, prompt)
    return ImageSeed(prompt, derive_seed(*key, "x_T"), derive_seed(*key, "noise", member))


def stir_lora(policy: Policy, seed: int, size: float = 0.02) -> None:
    """Move every trained weight at random, so that the policy is no longer what it was."""
    with torch.no_grad():
        for name, parameter in policy.weights.parameters():
            parameter.add_(size * gaussian(derive_seed(seed, name), *parameter.shape))
    policy.weights.changed()


def drawn_without_noise(
    policy: Policy, latent: torch.Tensor, prompts: list[str], guidance: float, num_steps: int, size: Size | None = None
) -> torch.Tensor:
    """Final latents by our steps with hardly any noise, and none of it drawn: a flow's are Euler's."""
    schedule, conditioning = policy.schedule(num_steps, 1e-5, size), policy.encode(prompts, guidance)
    for step in range(num_steps):
        rows = torch.full((len(prompts),), step)
        with torch.no_grad():
            output = policy.predict(latent, schedule.timesteps_T[rows], conditioning)
        latent = step_mean(schedule, rows, latent, output)
    return latent
