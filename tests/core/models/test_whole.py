"""Training of the whole network: what it changes, what is written, and how it is rounded."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

import d3po_core.models.policy as policy_module
from d3po_core.config import CampaignConfig, ModelConfig, TrainConfig
from d3po_core.denoising.ddim import Schedule
from d3po_core.errors import D3POError, NonFiniteLossError
from d3po_core.models import loss_scale as loss_scale_module
from d3po_core.models.checkpoint import load_checkpoint, save_checkpoint
from d3po_core.models.loaded import load_policy
from d3po_core.models.loss_scale import FP16_LOSS_SCALE
from d3po_core.models.policy import Policy
from d3po_core.models.weights import LORA_FILE, NETWORK_FILE, loading_line, weights_file, weights_sha256
from d3po_core.models.whole import Whole
from d3po_core.paths import resolve_path
from d3po_core.sampling.drift import kl_from_base
from d3po_core.speed.compiling import compile_regions
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.trainer import train_updates
from tests.core.models.test_policy import output, plain_output
from tests.core.models.tiny_models import tiny_model
from tests.core.sampling.drawing import stir_lora
from tests.core.training.test_trainer import (
    IMAGE_PROMPTS,
    NUM_STEPS,
    PlainD3PO,
    assert_gradients_agree,
    image_seed,
    one_update,
    settings,
    training_set,
)

STIR = 0.002


def full(**changes: Any) -> Policy:
    return load_policy(ModelConfig.model_validate({"device": "cpu", "train": "full", **changes}), seed=0)


def moved(seed: int = 1, **changes: Any) -> Policy:
    policy = full(**changes)
    stir_lora(policy, seed, STIR)
    return policy


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.weights.parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return full().schedule(NUM_STEPS, 1.0)


@pytest.fixture(scope="module")
def data(schedule: Schedule) -> TrainingSet:
    return training_set(moved(), schedule)


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_all_weights_of_the_network_are_trained_in_single_precision_and_nothing_else(
    precision: str, base_pipeline: StableDiffusionPipeline
) -> None:
    policy = full(precision=precision)
    names = [name for name, _ in policy.weights.parameters()]
    assert names == sorted(name for name, _ in base_pipeline.unet.named_parameters())
    assert {parameter.dtype for _, parameter in policy.weights.parameters()} == {torch.float32}
    pipeline = policy.family.pipeline
    assert not any(p.requires_grad for part in (pipeline.vae, pipeline.text_encoder) for p in part.parameters())
    tolerance = {"no": 1e-4, "fp16": 0.02, "bf16": 0.2}[precision]
    torch.testing.assert_close(output(policy), plain_output(base_pipeline), rtol=tolerance, atol=tolerance)


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the blocks, but let Python run what was traced."""
    monkeypatch.setattr(
        policy_module, "compile_regions", lambda net, classes: compile_regions(net, classes, backend="eager")
    )


@pytest.mark.parametrize(("precision", "compiled"), [("no", False), ("fp16", False), ("fp16", True)])
@pytest.mark.usefixtures("without_compiler")
def test_base_context_is_the_base_model_and_ends_with_the_trained_one(precision: str, compiled: bool) -> None:
    policy = full(precision=precision, compile=compiled)
    untrained = output(policy)
    stir_lora(policy, seed=1, size=STIR)
    trained, before = output(policy), weights(policy)
    assert (trained - untrained).abs().max() > 0.01
    with policy.base():
        assert torch.equal(output(policy), untrained)
    assert torch.equal(output(policy), trained)
    with pytest.raises(KeyError), policy.base():
        raise KeyError
    assert torch.equal(output(policy), trained)
    assert same(weights(policy), before)
    policy.reset()
    assert torch.equal(output(policy), untrained)


def test_drift_is_that_from_the_base(schedule: Schedule) -> None:
    seeds = [image_seed(prompt, member) for member, prompt in enumerate(IMAGE_PROMPTS)]
    for policy, drifts in ((moved(), True), (full(), False)):
        latents_BTCHW = training_set(policy, schedule).latents_NTCHW
        kl_B = kl_from_base(policy, schedule, seeds, latents_BTCHW, 1.0, rows=64)
        assert bool((kl_B > 1e-3).all()) == drifts
        assert bool((kl_B < 1e-8).all()) != drifts  # exactly nothing, but for rounding of what was sampled


@pytest.mark.parametrize(("reference", "guidance"), [("round_start", 3.0), ("base", 1.0)])
def test_gradient_of_an_update_equals_that_of_plain_d3po(
    reference: str, guidance: float, base_pipeline: StableDiffusionPipeline, schedule: Schedule
) -> None:
    policy = moved()
    data = training_set(policy, schedule, guidance)
    stir_lora(policy, seed=2, size=STIR)
    config = settings(reference=reference, beta=50.0)
    loss, plain = PlainD3PO(policy, base_pipeline, data, config, guidance).gradient()
    update, ours = one_update(policy, schedule, data, config, guidance)
    assert update.loss == pytest.approx(loss, rel=1e-3)
    assert len(ours) == len(plain) == len(list(base_pipeline.unet.parameters()))
    assert_gradients_agree(ours, plain, 2e-3)


def gradient(policy: Policy, schedule: Schedule, data: TrainingSet, **changes: Any) -> dict[str, torch.Tensor]:
    stir_lora(policy, seed=2, size=STIR)
    return one_update(policy, schedule, data, settings(beta=50.0, **changes))[1]


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-3), ("fp16", 0.1)])
@pytest.mark.usefixtures("without_compiler")
def test_compiled_and_recomputed_blocks_give_the_same_gradient(
    precision: str, tolerance: float, schedule: Schedule, data: TrainingSet
) -> None:
    expected = gradient(moved(precision=precision), schedule, data)
    for changes in ({"compile": True}, {"memory": "small"}):
        found = gradient(moved(precision=precision, **changes), schedule, data)
        assert_gradients_agree(found, expected, tolerance)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.15), ("bf16", 0.8)])
def test_gradients_in_half_precision_reach_the_trained_weights(
    precision: str, tolerance: float, schedule: Schedule, data: TrainingSet
) -> None:
    """As large as in single precision, the loss scale of fp16 taken out; and none is left in the network."""
    policy = moved(precision=precision)
    ours, expected = gradient(policy, schedule, data), gradient(moved(), schedule, data)
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert_gradients_agree(ours, expected, tolerance)
    assert all(parameter.grad is None for parameter in policy.network.parameters())


def test_micro_batches_are_summed_in_single_precision(schedule: Schedule, data: TrainingSet) -> None:
    exact = gradient(moved(), schedule, data)
    found = {size: gradient(moved(precision="fp16"), schedule, data, micro_batch=size) for size in (1000, 2)}
    for split in found.values():
        assert_gradients_agree(split, exact, 0.15)
    scaled = {name: value * FP16_LOSS_SCALE for name, value in found[2].items()}
    assert not any(torch.equal(value, value.half().float()) for value in scaled.values() if value.ndim > 1)


def test_overflow_in_fp16_takes_the_update_again_with_a_smaller_loss_scale(
    schedule: Schedule, data: TrainingSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = gradient(moved(precision="fp16"), schedule, data)
    monkeypatch.setattr(loss_scale_module, "FP16_LOSS_SCALE", 2.0**24)
    policy = moved(precision="fp16")
    assert policy.loss_scale.factor == 2.0**24
    assert_gradients_agree(gradient(policy, schedule, data), expected, 1e-2)
    assert 1 < policy.loss_scale.factor < 2.0**24
    # What a checkpoint goes on from does not depend on what the process did before.
    shrunk = policy.loss_scale.factor
    folder = save(policy, tmp_path / "round=1")
    policy.reset()
    assert policy.loss_scale.factor == 2.0**24
    load_checkpoint(folder, policy, None)
    assert policy.loss_scale.factor == shrunk
    single = moved()
    load_checkpoint(folder, single, None)
    assert single.loss_scale.factor == 1


def test_loss_that_is_not_finite_still_ends_the_round(schedule: Schedule, data: TrainingSet) -> None:
    policy = full(precision="fp16")
    before = weights(policy)
    broken = replace(data, log_probs_NT=torch.full_like(data.log_probs_NT, torch.nan))
    with pytest.raises(NonFiniteLossError):
        one_update(policy, schedule, broken, settings())
    assert same(weights(policy), before)


def test_gradient_is_the_same_when_memory_runs_out_in_half_precision(
    schedule: Schedule, data: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of an attempt that failed is left in the sum."""
    expected = gradient(moved(precision="fp16"), schedule, data, micro_batch=3)
    policy = moved(precision="fp16")
    backward, calls = policy.loss_scale.backward, itertools.count()

    def fails_once(loss: torch.Tensor) -> None:
        backward(loss)
        if next(calls) == 1:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(policy.loss_scale, "backward", fails_once)
    found = gradient(policy, schedule, data, micro_batch=6)
    assert policy.training_rows.of(6) == 3
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_steps_too_small_for_half_precision_add_up() -> None:
    policy = moved(precision="bf16")
    name = "conv_in.weight"
    passing = dict(policy.network.named_parameters())[name]
    start = dict(policy.weights.parameters())[name].detach().clone()
    rounded = passing.detach().clone()
    for _ in range(200):
        with torch.no_grad():
            dict(policy.weights.parameters())[name].sub_(1e-5)
        policy.weights.changed()
        rounded -= 1e-5
    distance = 2**-8 * (start.abs() + 2e-3)  # of neighbouring numbers, at most
    assert ((start - 2e-3 - passing.float()).abs() <= distance).all()
    lost = (start - 2e-3 - rounded.float()).abs() > distance
    assert lost.float().mean() > 0.5


def test_saved_network_opens_with_diffusers_and_gives_the_same_output(tmp_path: Path) -> None:
    policy = moved()
    file = policy.weights.save(tmp_path)
    assert file == tmp_path / "unet" / NETWORK_FILE == weights_file(tmp_path)
    assert sorted(path.name for path in file.parent.iterdir()) == ["config.json", NETWORK_FILE]
    assert str(resolve_path("")) not in (file.parent / "config.json").read_text()
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    pipeline = StableDiffusionPipeline.from_pretrained(
        resolve_path(ModelConfig().path), unet=unet, safety_checker=None, requires_safety_checker=False
    )
    torch.testing.assert_close(plain_output(pipeline), output(policy), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_line_that_is_shown_loads_any_familys_network(name: str, tmp_path: Path) -> None:
    policy = moved(path=str(tiny_model(name, tmp_path / name)), precision="fp16")
    policy.weights.save(tmp_path)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name, **absent)
    names = {"pipe": pipe, "diffusers": diffusers}
    exec(loading_line(tmp_path, repr(str(tmp_path))), names)
    loaded = dict(getattr(pipe, policy.family.NETWORK).named_parameters())
    assert loaded.keys() == weights(policy).keys()
    assert all(torch.equal(loaded[key], value) for key, value in weights(policy).items())


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_saved_network_is_read_back_bit_for_bit(precision: str, tmp_path: Path) -> None:
    policy, other = moved(precision=precision), full(precision=precision)
    policy.weights.save(tmp_path)
    other.weights.load(tmp_path)
    assert same(weights(other), weights(policy))
    assert torch.equal(output(other), output(policy))


FOUR = {"updates_per_round": 4, "epochs": 2, "learning_rate": 1e-4, "max_grad_norm": 1.0}


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_resumed_training_equals_uninterrupted_bit_for_bit(
    precision: str, schedule: Schedule, data: TrainingSet, tmp_path: Path
) -> None:
    config = settings(**FOUR)

    def begin() -> tuple[Policy, torch.optim.Optimizer]:
        policy = full(precision=precision)
        return policy, make_optimizer(policy, config)

    policy, optimizer = begin()
    straight = list(train_updates(policy, optimizer, schedule, data, config, 1.0, seed=5))
    expected = weights(policy)
    assert max(float((expected[name] - value).abs().max()) for name, value in weights(full()).items()) > 1e-4

    half, optimizer = begin()
    first = list(itertools.islice(train_updates(half, optimizer, schedule, data, config, 1.0, seed=5), 2))
    save_checkpoint(tmp_path / "half", half, optimizer, {"updates": 2})
    other, optimizer = begin()
    assert load_checkpoint(tmp_path / "half", other, optimizer)["updates"] == 2
    strides = [p.stride() for _, p in other.weights.parameters() if p.ndim == 4]
    assert [optimizer.state[p]["exp_avg"].stride() for _, p in other.weights.parameters() if p.ndim == 4] == strides
    second = list(train_updates(other, optimizer, schedule, data, config, 1.0, seed=5, first_update=2))
    assert same(weights(other), expected)
    assert torch.equal(output(other), output(policy))
    assert [replace(u, seconds=0) for u in first + second] == [replace(u, seconds=0) for u in straight]


def save(policy: Policy, folder: Path) -> Path:
    save_checkpoint(folder, policy, make_optimizer(policy, TrainConfig()), {"round": 1})
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "unet"), "cannot be read"),
        (lambda folder: (folder / "unet" / NETWORK_FILE).unlink(), "cannot be read"),
        (lambda folder: cut(folder / "unet" / NETWORK_FILE), f"{NETWORK_FILE} was changed since it was written"),
        (lambda folder: (folder / "optimizer.safetensors").write_bytes(b"12345"), "optimizer.safetensors was changed"),
    ],
)
def test_damaged_checkpoint_is_a_one_line_error(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    policy = moved()
    folder = save(policy, tmp_path / "round=1")
    optimizer = make_optimizer(policy, TrainConfig())
    load_checkpoint(folder, policy, optimizer)
    for _, parameter in policy.weights.parameters():
        parameter.grad = torch.ones_like(parameter)
    damage(folder)
    with pytest.raises(D3POError, match=message) as caught:
        load_checkpoint(folder, policy, optimizer)
    assert "\n" not in str(caught.value)
    assert "restore" in str(caught.value)


def test_checkpoint_of_another_network_or_a_lora_is_refused(tmp_path: Path) -> None:
    policy, other = moved(), full(path=str(tiny_model("sd", tmp_path / "sd")))
    folder = save(policy, tmp_path / "round=1")
    with pytest.raises(D3POError, match="its network has other layers than that of"):
        load_checkpoint(folder, other, None)
    lora = load_policy(ModelConfig(device="cpu", lora_rank=2), seed=0)
    assert (save(lora, tmp_path / "round=2") / LORA_FILE).exists()
    for mine, theirs in ((lora, "round=1"), (policy, "round=2")):
        with pytest.raises(D3POError, match="cannot be read") as caught:
            load_checkpoint(tmp_path / theirs, mine, None)
        assert "\n" not in str(caught.value)


def test_saving_twice_gives_the_same_bytes_and_the_digest_is_of_them(tmp_path: Path) -> None:
    policy = moved()
    first, second = save(policy, tmp_path / "a"), save(policy, tmp_path / "b")
    assert weights_file(first).read_bytes() == weights_file(second).read_bytes()
    assert json.loads((first / "checkpoint.json").read_text())["lora_sha256"] == weights_sha256(second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_space_for_checkpoints_is_asked_for(tmp_path: Path) -> None:
    from d3po_core.models.space import round_bytes

    needed = [round_bytes(CampaignConfig.model_validate({"model": {"train": train}})) for train in ("lora", "full")]
    count = sum(parameter.numel() for _, parameter in full().weights.parameters())
    assert needed[1] - needed[0] == 24 * count


def test_a_network_trained_as_a_whole_learns_to_prefer_winners(schedule: Schedule, data: TrainingSet) -> None:
    policy = moved()
    assert isinstance(policy.weights, Whole)
    config = settings(updates_per_round=12, epochs=12, learning_rate=3e-5, max_grad_norm=1.0, beta=100.0)
    updates = list(train_updates(policy, make_optimizer(policy, config), schedule, data, config, 1.0, seed=5))
    assert updates[-1].loss < updates[0].loss
    assert updates[-1].pair_accuracy_before > 0.8
