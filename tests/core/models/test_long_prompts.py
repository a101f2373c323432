"""Prompts longer than CLIP reads: counted, refused, cut, or read window by window, restated by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from d3po_core.config import CampaignConfig, ModelConfig, SampleConfig
from d3po_core.errors import D3POError
from d3po_core.models.asked import Asked
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.models.prompt_length import check_length
from d3po_core.planning.preflight import check_texts
from d3po_core.sampling.rollout import FirstOutputs, replay_steps, start_drawing
from d3po_core.seeds import ImageSeed, gaussian
from tests.core.models.tiny_models import tiny_model
from tests.core.sampling.drawing import stir_lora

SHORT = "a red circle on a gray background"
LONG = "a blue cross on a white background and " * 12  # the small tokenizer reads 10 tokens, so windows hold 8
NEGATIVE = "a yellow square"
ASKED = Asked(by_windows=True, negative_prompt=NEGATIVE)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp("long") / request.param)


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(ModelConfig(path=str(folder), device="cpu", lora_rank=2), seed=0, asked=ASKED)


@pytest.fixture(scope="module")
def drawn_in_single() -> dict[str, np.ndarray]:
    """By model, what was drawn in single precision, which comes first."""
    return {}


def windows_by_hand(tokenizer: Callable[..., object], text: str, least: int) -> list[list[int]]:
    """Windows of 75 tokens between start and end, the last one padded; empty ones up to ``least``."""
    first, *tokens, last = tokenizer(text, truncation=False).input_ids  # type: ignore[attr-defined]
    pad, room = tokenizer.pad_token_id, tokenizer.model_max_length - 2  # type: ignore[attr-defined]
    found = []
    while tokens or len(found) < least:
        head, tokens = tokens[:room], tokens[room:]
        found.append([first, *head, last] + [pad] * (room - len(head)))
    return found


def states_by_hand(policy: Policy, text: str, least: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    pipeline = policy.family.pipeline
    ids = torch.tensor(windows_by_hand(pipeline.tokenizer, text, least))
    with torch.no_grad():
        if not hasattr(pipeline, "text_encoder_2"):
            return pipeline.text_encoder(ids).last_hidden_state.flatten(0, 1), None
        second = torch.tensor(windows_by_hand(pipeline.tokenizer_2, text, least))
        outputs = (
            pipeline.text_encoder(ids, output_hidden_states=True),
            pipeline.text_encoder_2(second, output_hidden_states=True),
        )
    states = torch.cat([output.hidden_states[-2].flatten(0, 1) for output in outputs], dim=-1)
    return states, outputs[1].text_embeds[0]


def test_windows_are_those_by_hand(policy: Policy) -> None:
    """All of a long prompt is read; the negative prompt gets empty windows up to its number."""
    conditioning = policy.encode([LONG], 3.0)
    count = policy.family.windows(LONG)
    assert count >= 2
    for embedding, text in ((conditioning.embeddings, LONG), (conditioning.empty, NEGATIVE)):
        states, pooled = states_by_hand(policy, text, count)
        found = embedding["encoder_hidden_states"]
        torch.testing.assert_close(found[0] if text == LONG else found, states, rtol=1e-4, atol=1e-4)
        if pooled is not None:
            own = embedding["text_embeds"]
            torch.testing.assert_close(own[0] if text == LONG else own, pooled, rtol=1e-4, atol=1e-4)


def test_a_short_prompt_is_read_as_ever_and_a_mixed_batch_as_single_images(policy: Policy, folder: Path) -> None:
    plain = load_policy(
        policy.config, seed=0, asked=replace(ASKED, by_windows=False)
    )  # its prompts are cut where the window ends
    latent, t_B = torch.stack([gaussian(i, *policy.latent_shape) for i in range(3)]), torch.tensor([900, 500, 100])
    with torch.no_grad():
        prompts = [LONG, SHORT, LONG + "and a red circle"]
        mixed = policy.predict(latent, t_B, policy.encode(prompts, 3.0))
        alone = [policy.predict(latent[i : i + 1], t_B[i : i + 1], policy.encode([prompts[i]], 3.0)) for i in range(3)]
        ever = plain.predict(latent[1:2], t_B[1:2], plain.encode([SHORT], 3.0))
        cut = plain.predict(latent[:1], t_B[:1], plain.encode([LONG], 3.0))
        with policy.steady(policy.encode(prompts, 3.0)):
            steady = policy.predict(latent, t_B, policy.encode(prompts, 3.0))
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steady, mixed, rtol=1e-5, atol=1e-5)
    assert torch.equal(alone[1], ever)
    assert (alone[0] - cut).abs().max() > 1e-3


def test_without_a_negative_prompt_xls_is_zeros_in_every_window(folder: Path) -> None:
    if folder.name != "sdxl":
        pytest.skip("Stable Diffusion reads the empty prompt")
    config = ModelConfig(path=str(folder), device="cpu", lora_rank=2)
    empty = load_policy(config, seed=0, asked=Asked(by_windows=True)).encode([LONG], 3.0).empty
    assert not empty["encoder_hidden_states"].any()
    assert not empty["text_embeds"].any()
    assert len(empty["encoder_hidden_states"]) % 10 == 0


def test_long_prompts_are_counted_and_the_setting_decides(folder: Path) -> None:
    config = ModelConfig(path=str(folder), device="cpu")
    first, *_ = check_length(config, [SHORT, LONG])
    assert first.startswith("1 prompt is longer than the 10 tokens that tokenizer reads, and what lies beyond is not")
    assert check_length(config, [SHORT], "error", NEGATIVE) == []
    with pytest.raises(D3POError, match=r"1 prompt is longer than the 10 .*set sample.long_prompts to another value"):
        check_length(config, [SHORT, LONG], "error")
    with pytest.raises(D3POError, match="1 prompt is longer"):
        check_length(config, [SHORT], "error", LONG)
    # Read by windows, prompts that differ late differ.
    late = [LONG + "blue", LONG + "green"]
    with pytest.raises(D3POError, match="are the same to the model's text encoders"):
        check_length(config, late)
    assert (
        "2 prompts are longer than the 10 tokens that tokenizer reads, and are read in up to"
        in (check_length(config, late, "chunk")[0])
    )


def test_families_that_do_not_read_by_windows_say_so(tmp_path: Path) -> None:
    path = str(tiny_model("sd3", tmp_path / "sd3"))
    said = r"sample.long_prompts is 'chunk', and model.path .* is a StableDiffusion3Pipeline.*set it to 'truncate' or"
    with pytest.raises(D3POError, match=said):
        load_policy(ModelConfig(path=path, device="cpu"), seed=0, asked=Asked(by_windows=True))
    values = {"model": {"path": path}, "sample": {"long_prompts": "chunk"}}
    with pytest.raises(D3POError, match=said):
        check_texts(CampaignConfig.model_validate(values))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_mixed_sizes_and_lengths_replay_and_agree_in_half_precision(
    precision: Literal["no", "bf16"], folder: Path, drawn_in_single: dict[str, np.ndarray]
) -> None:
    """Also in the faster passes, and at a size whose latents do not halve evenly."""
    sizes, texts = ((16, 24), (18, 26)), (SHORT, LONG[:80])
    config = ModelConfig(path=str(folder), device="cpu", lora_rank=2, precision=precision)
    policy = load_policy(config, seed=0, asked=replace(ASKED, sizes=sizes))
    stir_lora(policy, seed=1, size=0.1)
    settings = SampleConfig(num_steps=2, guidance_scale=3.0)
    batches = [
        [ImageSeed(text, start, 10 * start + member, size) for start, text in enumerate(texts) for member in (0, 1)]
        for size in sizes
    ]
    first = FirstOutputs(policy, settings, [seed for batch in batches for seed in batch], torch.float32)
    pixels = []
    for batch in batches:
        found, images = start_drawing(policy, settings, batch, first).wait()
        assert images.shape[1:3] == batch[0].size
        schedule, prompts = policy.schedule(2, 1.0, batch[0].size), [seed.prompt for seed in batch]
        for step in range(2):
            x, following = found.latents_BTCHW[:, step], found.latents_BTCHW[:, step + 1]
            with torch.no_grad():
                again = replay_steps(policy, schedule, prompts, x, following, torch.full((4,), step), 3.0)[0]
            torch.testing.assert_close(again, found.log_probs_BT[:, step], rtol=0, atol=1e-3)
        pixels.append(images.flatten().astype(int))
    ours = drawn_in_single.setdefault(folder.name, np.concatenate(pixels))
    assert np.abs(np.concatenate(pixels) - ours).max() <= 6
