"""AdamW with moments in 8 bits: near AdamW, kept exactly, and missed in one line."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d3po_core.config import CampaignConfig, ModelConfig, TrainConfig
from d3po_core.denoising.ddim import Schedule
from d3po_core.errors import D3POError
from d3po_core.models.checkpoint import load_checkpoint, save_checkpoint
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.trainer import train_updates
from tests.core.training.test_trainer import NUM_STEPS, settings, training_set

FOUR = {"updates_per_round": 4, "epochs": 2, "learning_rate": 3e-5, "max_grad_norm": 1.0}


def test_missing_library_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from d3po.tasks.publishing import check_campaign

    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        D3POError, match=r"install the extra \(pip install -e '\.\[adam8bit\]'\), or set it to"
    ) as caught:
        check_campaign(CampaignConfig.model_validate({"train": {"optimizer": "adamw8bit"}}))
    assert "\n" not in str(caught.value)


@pytest.fixture(autouse=True)
def library(request: pytest.FixtureRequest) -> None:
    if "missing" not in request.node.name:
        pytest.importorskip("bitsandbytes", reason="the extra adam8bit is not installed")


def policy_of(train: str, precision: str = "no") -> Policy:
    values = {"device": "cpu", "train": train, "precision": precision, "lora_rank": 64}
    return load_policy(ModelConfig.model_validate(values), seed=0)


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return policy_of("lora").schedule(NUM_STEPS, 1.0)


@pytest.fixture(scope="module")
def data(schedule: Schedule) -> TrainingSet:
    return training_set(policy_of("lora"), schedule)


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for _, parameter in policy.weights.parameters()])


def trained(policy: Policy, schedule: Schedule, data: TrainingSet, **changes: Any) -> torch.optim.Optimizer:
    config = settings(**FOUR | changes)
    optimizer = make_optimizer(policy, config)
    list(train_updates(policy, optimizer, schedule, data, config, 1.0, seed=5))
    return optimizer


def test_weights_move_as_with_adamw(schedule: Schedule, data: TrainingSet) -> None:
    moves = {}
    for kind in ("adamw", "adamw8bit"):
        policy = policy_of("full")
        before = weights(policy)
        optimizer = trained(policy, schedule, data, optimizer=kind)
        moves[kind] = weights(policy) - before
    dtypes = {state["state1"].dtype for state in optimizer.state.values()}
    assert dtypes == {torch.uint8, torch.float32}  # weights of fewer than 4,096 elements keep theirs
    cosine = torch.nn.functional.cosine_similarity(moves["adamw"], moves["adamw8bit"], dim=0)
    assert cosine > 0.95
    assert moves["adamw8bit"].norm() / moves["adamw"].norm() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("train", "precision"), [("lora", "no"), ("full", "no"), ("full", "fp16")])
def test_resumed_training_equals_uninterrupted_bit_for_bit(
    train: str, precision: str, schedule: Schedule, data: TrainingSet, tmp_path: Path
) -> None:
    straight = policy_of(train, precision)
    expected_state = trained(straight, schedule, data, optimizer="adamw8bit").state
    config = settings(**FOUR, optimizer="adamw8bit")

    half = policy_of(train, precision)
    optimizer = make_optimizer(half, config)
    for _ in itertools.islice(train_updates(half, optimizer, schedule, data, config, 1.0, seed=5), 2):
        pass
    save_checkpoint(tmp_path / "half", half, optimizer, {})
    stored = load_file(tmp_path / "half" / "optimizer.safetensors")
    assert torch.uint8 in {value.dtype for value in stored.values()}

    other = policy_of(train, precision)
    optimizer = make_optimizer(other, config)
    load_checkpoint(tmp_path / "half", other, optimizer)
    list(train_updates(other, optimizer, schedule, data, config, 1.0, seed=5, first_update=2))
    assert torch.equal(weights(other), weights(straight))
    for found, expected in zip(optimizer.state.values(), expected_state.values(), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(found[key]), torch.as_tensor(expected[key])) for key in expected)


def test_file_of_the_state_is_a_third_of_adamws(schedule: Schedule, data: TrainingSet, tmp_path: Path) -> None:
    sizes = {}
    for kind in ("adamw", "adamw8bit"):
        policy = policy_of("full")
        save_checkpoint(tmp_path / kind, policy, trained(policy, schedule, data, optimizer=kind), {})
        sizes[kind] = (tmp_path / kind / "optimizer.safetensors").stat().st_size
    assert sizes["adamw8bit"] < sizes["adamw"] / 3


@pytest.mark.parametrize(("written", "asked"), [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_state_of_the_other_optimizer_is_refused(
    written: str, asked: str, schedule: Schedule, data: TrainingSet, tmp_path: Path
) -> None:
    policy = policy_of("lora")
    save_checkpoint(tmp_path / "round=1", policy, trained(policy, schedule, data, optimizer=written), {})
    optimizer = make_optimizer(policy, TrainConfig.model_validate({"optimizer": asked}))
    with pytest.raises(D3POError, match=r"another train\.optimizer; set that back, or .*carry_optimizer") as caught:
        load_checkpoint(tmp_path / "round=1", policy, optimizer)
    assert "\n" not in str(caught.value)
    load_checkpoint(tmp_path / "round=1", policy, None)
