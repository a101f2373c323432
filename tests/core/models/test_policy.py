"""The LoRA on the embedded model: what it changes, what is written, and which model folders are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from d3po_core.config import CampaignConfig, ModelConfig, TrainConfig
from d3po_core.errors import D3POError
from d3po_core.models.checkpoint import load_checkpoint, save_checkpoint
from d3po_core.models.loaded import load_policy
from d3po_core.models.loading import check_model
from d3po_core.models.policy import Policy
from d3po_core.models.weights import LORA_FILE
from d3po_core.paths import resolve_path
from d3po_core.sampling.prompts import check_held_out, load_prompts
from d3po_core.scorers.shapes import all_scenes, is_held_out, parse_prompt
from d3po_core.seeds import gaussian
from d3po_core.training.optimizer import make_optimizer
from tests.core.sampling.drawing import stir_lora

MODEL = resolve_path(ModelConfig().path)
PROMPTS = ["a red circle on a gray background", "a blue cross on a white background"]
LATENT = torch.stack([gaussian(i, 4, 8, 8) for i in range(2)])
TIMESTEPS = torch.tensor([901, 101])


def output(policy: Policy, guidance: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        return policy.predict(LATENT, TIMESTEPS, policy.encode(PROMPTS, guidance))


def plain_output(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
        return pipeline.unet(LATENT, TIMESTEPS, text).sample


def fresh_pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(
        MODEL, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )


def test_untrained_lora_changes_nothing_at_all(policy: Policy) -> None:
    with_lora = output(policy)
    with policy.base():
        assert torch.equal(output(policy), with_lora)


def test_base_context_equals_the_base_pipeline(stirred: Policy, base_pipeline: StableDiffusionPipeline) -> None:
    with_lora = output(stirred)
    with stirred.base():
        base = output(stirred)
    torch.testing.assert_close(base, plain_output(base_pipeline), rtol=1e-4, atol=1e-4)
    assert (with_lora - base).abs().max() > 0.01
    assert torch.equal(output(stirred), with_lora)


def test_lora_is_on_again_after_an_error_in_the_base_context(stirred: Policy) -> None:
    before = output(stirred)
    with pytest.raises(KeyError), stirred.base():
        raise KeyError
    assert torch.equal(output(stirred), before)


def test_only_the_lora_is_trainable_and_it_has_its_rank(policy: Policy) -> None:
    names = [name for name, _ in policy.weights.parameters()]
    assert names == sorted(names)
    assert names
    assert all("lora_" in name for name in names)
    assert {min(parameter.shape) for _, parameter in policy.weights.parameters()} == {4}
    targets = {name.split(".lora_")[0].rpartition("attn")[2][2:] for name in names}
    assert targets == set(ModelConfig().lora_targets)


def test_reset_puts_the_lora_back_to_its_seeded_start(policy: Policy) -> None:
    start = {name: parameter.clone() for name, parameter in policy.weights.parameters()}
    stir_lora(policy, seed=1)
    policy.reset()
    assert all(torch.equal(parameter, start[name]) for name, parameter in policy.weights.parameters())


def test_guidance_joins_output_with_and_without_prompt(stirred: Policy) -> None:
    with_prompt = output(stirred)
    with torch.no_grad():
        without = stirred.predict(LATENT, TIMESTEPS, stirred.encode(["", ""], 1.0))
    torch.testing.assert_close(output(stirred, 3.0), without + 3 * (with_prompt - without), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora_alpha", [None, 10.0])
def test_saved_lora_loads_with_diffusers_and_gives_the_same_output(tmp_path: Path, lora_alpha: float | None) -> None:
    policy = load_policy(ModelConfig(device="cpu", lora_rank=4, lora_alpha=lora_alpha), seed=0)
    stir_lora(policy, seed=1)
    assert policy.weights.save(tmp_path) == tmp_path / LORA_FILE
    pipeline = fresh_pipeline()
    before = plain_output(pipeline)
    pipeline.load_lora_weights(tmp_path)
    after = plain_output(pipeline)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, output(policy), rtol=1e-4, atol=1e-4)


def test_saved_lora_is_read_back_bit_for_bit(stirred: Policy, tmp_path: Path) -> None:
    saved = {name: parameter.clone() for name, parameter in stirred.weights.parameters()}
    before = output(stirred)
    stirred.weights.save(tmp_path)
    stirred.reset()
    stirred.weights.load(tmp_path)
    assert all(torch.equal(parameter, saved[name]) for name, parameter in stirred.weights.parameters())
    assert torch.equal(output(stirred), before)


def save(policy: Policy, folder: Path) -> Path:
    save_checkpoint(folder, policy, make_optimizer(policy, TrainConfig()), {"round": 1})
    return folder


def test_checkpoint_holds_safetensors_and_json_only(stirred: Policy, tmp_path: Path) -> None:
    optimizer = make_optimizer(stirred, TrainConfig())
    for _, parameter in stirred.weights.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(tmp_path / "round=1", stirred, optimizer, {"round": 1})
    assert sorted(file.name for file in (tmp_path / "round=1").iterdir()) == [
        "checkpoint.json", "optimizer.safetensors", LORA_FILE,
    ]  # fmt: skip
    assert [folder.name for folder in tmp_path.iterdir()] == ["round=1"]
    for file in (tmp_path / "round=1").glob("*.safetensors"):
        # A safetensors file starts with its header's length and a JSON header; a pickle or zip does not.
        length = int.from_bytes(file.read_bytes()[:8], "little")
        assert json.loads(file.read_bytes()[8 : 8 + length])


def test_saving_twice_gives_the_same_bytes_and_replaces(stirred: Policy, tmp_path: Path) -> None:
    first, second = save(stirred, tmp_path / "a"), save(stirred, tmp_path / "b")
    assert (first / LORA_FILE).read_bytes() == (second / LORA_FILE).read_bytes()
    (second / "stale").touch()
    save(stirred, second)
    assert not (second / "stale").exists()


def test_failing_save_leaves_the_older_checkpoint(
    stirred: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    folder = save(stirred, tmp_path / "round=1")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("d3po_core.models.checkpoint.save_file", full)
    with pytest.raises(D3POError, match="disk full"):
        save(stirred, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["round=1"]


def test_changed_lora_file_is_refused_by_its_hash(stirred: Policy, tmp_path: Path) -> None:
    folder = save(stirred, tmp_path / "round=1")
    damaged = bytearray((folder / LORA_FILE).read_bytes())
    damaged[-1] ^= 1
    (folder / LORA_FILE).write_bytes(damaged)
    before = output(stirred)
    with pytest.raises(D3POError, match="was changed since it was written"):
        load_checkpoint(folder, stirred, None)
    assert torch.equal(output(stirred), before)


@pytest.mark.parametrize("name", ["checkpoint.json", LORA_FILE, "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_checkpoint_is_a_one_line_error(stirred: Policy, tmp_path: Path, name: str, damage: str) -> None:
    folder = save(stirred, tmp_path / "round=1")
    file = folder / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:5] if damage == "cut" else b"{}")
    with pytest.raises(D3POError) as caught:
        load_checkpoint(folder, stirred, make_optimizer(stirred, TrainConfig()))
    assert "\n" not in str(caught.value)
    assert "restore" in str(caught.value)


def test_checkpoint_of_another_rank_is_refused(policy: Policy, tmp_path: Path) -> None:
    other = load_policy(ModelConfig(device="cpu", lora_rank=2), seed=0)
    with pytest.raises(D3POError, match=r"another rank than model\.lora_") as caught:
        load_checkpoint(save(other, tmp_path / "round=1"), policy, None)
    assert "\n" not in str(caught.value)


def test_lora_targets_that_match_no_layer_are_a_one_line_error() -> None:
    with pytest.raises(D3POError, match=r"model.lora_targets \['no_such_layer'\]") as caught:
        load_policy(ModelConfig(device="cpu", lora_targets=("no_such_layer",)), seed=0)
    assert "\n" not in str(caught.value)


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def with_text(name: str, text: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


BROKEN = {
    "no unet": (without("unet"), "unet/config.json is missing"),
    "no unet weights": (without("unet/diffusion_pytorch_model.safetensors"), "unet/.*safetensors is missing"),
    "no unet config": (without("unet/config.json"), "unet/config.json is missing"),
    "no vae": (without("vae"), "vae/config.json is missing"),
    "no text encoder": (without("text_encoder"), "text_encoder/.*safetensors is missing"),
    "no tokenizer": (without("tokenizer"), "tokenizer/.*json is missing"),
    "no scheduler": (without("scheduler"), "scheduler_config.json is missing"),
    "no index": (without("model_index.json"), "model_index.json is missing"),
    "index is not JSON": (with_text("model_index.json", '{"_class_name": '), "model_index.json is not JSON"),
    "index is a list": (with_text("model_index.json", "[]"), "holds a list; expected a mapping"),
    "index is not text": (with_text("model_index.json", b"\xff\xfe\x00"), "model_index.json is not JSON"),
    "other pipeline": (
        with_text("model_index.json", '{"_class_name": "LuminaPipeline"}'),
        "is a LuminaPipeline; expected",
    ),
    "cut weights": (with_text("unet/diffusion_pytorch_model.safetensors", b"12345"), "no whole safetensors file"),
    "unet config is not JSON": (with_text("unet/config.json", "{"), "unet/config.json is not JSON"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_broken_model_folder_is_a_one_line_error(tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    change(folder)
    with pytest.raises(D3POError, match=message) as caught:
        load_policy(ModelConfig(path=str(folder), device="cpu"), seed=0)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["no/such/folder/here", "./nowhere", "/nowhere/at/all", "nowhere"])
def test_absent_model_folder_is_named_before_anything_is_loaded(path: str) -> None:
    with pytest.raises(D3POError, match="no such folder") as caught:
        check_model(ModelConfig(path=path))
    assert path in str(caught.value)


def test_hub_id_is_not_taken_for_a_folder() -> None:
    check_model(ModelConfig(path="some-org/some-model"))


def test_cuda_that_is_absent_is_said_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(D3POError, match="no CUDA device"):
        check_model(ModelConfig(device="cuda"))


def test_embedded_model_is_at_most_eight_megabytes_and_nothing_pickled() -> None:
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt"}


def test_embedded_model_opens_and_draws_with_diffusers_alone() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=1.0).images[0]
    assert image.size == (64, 64)


def test_held_out_prompts_are_a_fifth_and_never_trained_on() -> None:
    defaults = CampaignConfig()
    training = load_prompts(defaults.sample.prompts, "prompt", "sample.prompts")
    held_out = load_prompts(defaults.evaluate.prompts, "prompt", "evaluate.prompts")
    assert set(training).isdisjoint(held_out)
    check_held_out(training, held_out)
    assert len(held_out) >= 0.2 * (len(training) + len(held_out))
    assert all(is_held_out(parse_prompt(prompt)) for prompt in held_out)
    assert not any(is_held_out(parse_prompt(prompt)) for prompt in training)
    assert {*training, *held_out} == {scene.prompt for scene in all_scenes()}
    assert len(held_out) <= defaults.evaluate.max_prompts


def test_same_seed_gives_the_same_lora_and_leaves_global_randomness_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second = (load_policy(ModelConfig(device="cpu", lora_rank=2), seed=9) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    for (_, a), (_, b) in zip(first.weights.parameters(), second.weights.parameters(), strict=True):
        assert torch.equal(a, b)
