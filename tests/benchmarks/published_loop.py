"""What the published D3PO loop computes, said again in our own words, so that its cost can be measured beside ours.

Source: the code that goes with arXiv 2311.13231. Restated is the work: which tensors of which batch size pass through
which network how often. Nothing of it is copied, and its faults (``published`` in d3po_core.config) are not at issue.

    sampling   10 prompts at a time; one full pass of 10 images for every member of a group (2 or 7), each decoded at
               once; members after the first start from the first one's x_T
    training   batch 1; every pair of a group alone; at every step four passes of one image: winner and loser, each
               through the policy (with gradient) and through a second full copy of the UNet (the reference);
               one backward a pair and step; one optimizer step a pair of trajectories

What is the same as in ours: the model and its LoRA, T steps, guidance (1: one row an image; above: a second row for the
empty prompt), the arithmetic of a step (d3po_core.denoising.ddim), eager, the libraries. What is left out because it
would only make it slower: progress bars, logging, files, the accelerator's wrappers. What ours has and this has not:
channels-last weights, larger batches, embeddings kept, stored log_probs as the reference.

Tensor names carry their shape: B images, M members, L tokens, D embedding, T steps, C H W latent.
"""

import copy
import itertools
from dataclasses import dataclass, replace

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from transformers.utils import logging as transformers_logging

from d3po_core.config import ModelConfig
from d3po_core.denoising.ddim import Schedule, log_prob, make_schedule, step_mean
from d3po_core.paths import resolve_path

PROMPTS_PER_BATCH = 10
BETA, CLIP_RANGE = 0.1, 0.1
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-5, 1e-4, 1.0


@dataclass(frozen=True)
class Published:
    """The pipeline with a LoRA on its UNet, the frozen copy that serves as reference, and the steps."""

    pipeline: StableDiffusionPipeline
    reference: torch.nn.Module
    schedule: Schedule
    guidance_scale: float = 1.0
    empty_1LD: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.pipeline.unet.device

    def parameters(self) -> list[torch.nn.Parameter]:
        """The LoRA's weights."""
        return [p for _, p in sorted(self.pipeline.unet.named_parameters()) if p.requires_grad]

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW with the published settings."""
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def load_published(config: ModelConfig, num_steps: int, eta: float, seed: int) -> Published:
    """Load the base model with the same LoRA as ours, and copy its UNet for the reference."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(
        resolve_path(config.path), use_safetensors=True, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return make_published(pipeline, config, num_steps, eta, seed)


def make_published(
    pipeline: StableDiffusionPipeline, config: ModelConfig, num_steps: int, eta: float, seed: int,
    guidance_scale: float = 1.0,
) -> Published:  # fmt: skip
    """Put the LoRA on a loaded pipeline and copy its UNet for the reference."""
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        alpha = config.lora_alpha or config.lora_rank
        pipeline.unet.add_adapter(
            LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=list(config.lora_targets))
        )
    for parameter in pipeline.unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    reference = copy.deepcopy(pipeline.unet).requires_grad_(False)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    schedule = make_schedule(scheduler, num_steps, eta).to(pipeline.unet.device)
    model = Published(pipeline, reference, schedule, guidance_scale)
    return replace(model, empty_1LD=encode(model, [""]))


@torch.no_grad()
def encode(model: Published, prompts: list[str]) -> torch.Tensor:
    """Embeddings ``[B, L, D]`` of a batch of prompts."""
    tokenizer = model.pipeline.tokenizer
    tokens = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    # Its weights may be stored in half precision.
    return model.pipeline.text_encoder(tokens.input_ids.to(model.device))[0].float()


def predict(
    model: Published, unet: torch.nn.Module, latent_BCHW: torch.Tensor, t_B: torch.Tensor, text_BLD: torch.Tensor
) -> torch.Tensor:
    """The network's output, guided when the scale is not 1; under autocast when the weights are in half precision."""
    weights = unet.conv_in.weight.dtype
    with torch.autocast(model.device.type, weights, enabled=weights != torch.float32):
        if model.guidance_scale == 1.0:
            return unet(latent_BCHW, t_B, encoder_hidden_states=text_BLD).sample.float()
        assert model.empty_1LD is not None
        both_BLD = torch.cat([model.empty_1LD.expand_as(text_BLD), text_BLD])
        output_BCHW = unet(torch.cat([latent_BCHW] * 2), torch.cat([t_B] * 2), encoder_hidden_states=both_BLD).sample
    without_BCHW, with_BCHW = output_BCHW.float().chunk(2)
    return without_BCHW + model.guidance_scale * (with_BCHW - without_BCHW)


@torch.no_grad()
def sample_pass(
    model: Published, text_BLD: torch.Tensor, initial_BCHW: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pass: an image of every prompt. Returns latents ``[B, T+1, ...]``, log_probs ``[B, T]`` and images."""
    unet, schedule = model.pipeline.unet, model.schedule
    shape = (len(text_BLD), unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    device = model.device
    latent_BCHW = torch.randn(shape, device=device) if initial_BCHW is None else initial_BCHW
    latents, log_probs = [latent_BCHW], []
    for step in range(len(schedule.timesteps_T)):
        step_B = torch.full((len(text_BLD),), step, device=device)
        output_BCHW = predict(model, unet, latent_BCHW, schedule.timesteps_T[step_B], text_BLD)
        mean_BCHW = step_mean(schedule, step_B, latent_BCHW, output_BCHW)
        latent_BCHW = mean_BCHW + schedule.sigma_T[step] * torch.randn(shape, device=device)
        log_probs.append(log_prob(latent_BCHW, mean_BCHW, schedule.sigma_T[step_B]))
        latents.append(latent_BCHW)
    vae = model.pipeline.vae
    image_BCHW = vae.decode((latent_BCHW / vae.config.scaling_factor).to(vae.dtype)).sample
    image_BCHW = (image_BCHW / 2 + 0.5).clamp(0, 1)
    return torch.stack(latents, dim=1), torch.stack(log_probs, dim=1), image_BCHW


def sample_groups(model: Published, prompts: list[str], group_size: int) -> list[torch.Tensor]:
    """Sample a group of images for each prompt; returns the latents ``[B, M, T+1, C, H, W]`` of each batch."""
    batches = []
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        batch = prompts[start : start + PROMPTS_PER_BATCH]
        initial_BCHW = None
        members = []
        for _ in range(group_size):
            latents_BTCHW, _, _ = sample_pass(model, encode(model, batch), initial_BCHW)
            initial_BCHW = latents_BTCHW[:, 0] if initial_BCHW is None else initial_BCHW
            members.append(latents_BTCHW)
        batches.append(torch.stack(members, dim=1))
    return batches


def train_pair(
    model: Published, optimizer: torch.optim.Optimizer, text_1LD: torch.Tensor, winner_TCHW: torch.Tensor,
    loser_TCHW: torch.Tensor, max_grad_norm: float = MAX_GRAD_NORM,
) -> float:  # fmt: skip
    """Train on one pair: every step alone, then one optimizer step. Returns the mean loss (nats).

    Args:
        model: the policy and its reference.
        optimizer: over the LoRA's weights.
        text_1LD: embedding of the pair's prompt.
        winner_TCHW: latents ``[T+1, C, H, W]`` of the preferred image.
        loser_TCHW: the other one's.
        max_grad_norm: the gradient is clipped to this.
    """
    num_steps = len(model.schedule.timesteps_T)
    total = 0.0
    optimizer.zero_grad()
    for step in torch.randperm(num_steps).tolist():
        winner_1, loser_1 = (_clipped_log_ratio(model, text_1LD, x, step) for x in (winner_TCHW, loser_TCHW))
        # Eq. 14, one pair at one step.
        loss = -torch.nn.functional.logsigmoid(BETA * (winner_1 - loser_1)).mean()
        (loss / num_steps).backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return total / num_steps


def train_group(
    model: Published, optimizer: torch.optim.Optimizer, text_1LD: torch.Tensor, members_MTCHW: torch.Tensor,
    scores: list[float], max_pairs: int | None = None,
) -> int:  # fmt: skip
    """Train on the pairs of one prompt's images, one after the other; returns how many those were.

    Args:
        model: the policy and its reference.
        optimizer: over the LoRA's weights.
        text_1LD: embedding of the prompt.
        members_MTCHW: latents ``[M, T+1, C, H, W]`` of the group.
        scores: M distinct scores; the higher wins.
        max_pairs: stop after so many; all M (M - 1) / 2 when not given.
    """
    pairs = list(itertools.combinations(range(len(scores)), 2))[:max_pairs]
    for a, b in pairs:
        winner, loser = (a, b) if scores[a] > scores[b] else (b, a)
        train_pair(model, optimizer, text_1LD, members_MTCHW[winner], members_MTCHW[loser])
    return len(pairs)


def _clipped_log_ratio(model: Published, text_1LD: torch.Tensor, latents_TCHW: torch.Tensor, step: int) -> torch.Tensor:
    """Log of the clamped ratio ``[1]`` of policy and reference at one step of one image: two batch-1 passes."""
    policy_1 = _step_log_prob(model, model.pipeline.unet, text_1LD, latents_TCHW, step)
    with torch.no_grad():
        reference_1 = _step_log_prob(model, model.reference, text_1LD, latents_TCHW, step)
    return (policy_1 - reference_1).exp().clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE).log()


def _step_log_prob(
    model: Published, unet: torch.nn.Module, text_1LD: torch.Tensor, latents_TCHW: torch.Tensor, step: int
) -> torch.Tensor:
    latent_1CHW, next_1CHW = latents_TCHW[step : step + 1], latents_TCHW[step + 1 : step + 2]
    step_1 = torch.tensor([step], device=model.device)
    output_1CHW = predict(model, unet, latent_1CHW, model.schedule.timesteps_T[step_1], text_1LD)
    mean_1CHW = step_mean(model.schedule, step_1, latent_1CHW, output_1CHW)
    return log_prob(next_1CHW, mean_1CHW, model.schedule.sigma_T[step_1])
