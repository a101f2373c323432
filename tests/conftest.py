"""What the whole suite shares: one thread a process, repeatable property tests, and the embedded model loaded once."""

import os
from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import settings

from d3po_core.config import ModelConfig
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.paths import resolve_path
from tests.core.sampling.drawing import stir_lora

# Two test files run at a time, on two cores. Also for processes that tests start; those that show that two threads
# compute the same again ask for two.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def base_pipeline() -> StableDiffusionPipeline:
    """The embedded model as diffusers alone sees it; no test may change it."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        resolve_path(ModelConfig().path), dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return pipeline


@pytest.fixture(scope="session")
def loaded_policy() -> Policy:
    return load_policy(ModelConfig(device="cpu", lora_rank=4), seed=0)


@pytest.fixture
def policy(loaded_policy: Policy) -> Iterator[Policy]:
    """The embedded model on the CPU with a fresh LoRA of rank 4; loaded once, put back before and after each test."""
    loaded_policy.reset()
    for _, parameter in loaded_policy.weights.parameters():
        parameter.grad = None
    yield loaded_policy
    loaded_policy.reset()


@pytest.fixture
def stirred(policy: Policy) -> Policy:
    """The policy with a LoRA that changes its output."""
    stir_lora(policy, seed=1)
    return policy
