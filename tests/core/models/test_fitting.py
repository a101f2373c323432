"""Memory plans: what a GPU of some size gets, and that a campaign keeps its plan."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models import loaded
from d3po_core.models.fitting import fitted_plan
from d3po_core.models.loaded import load_policy, loaded_policy
from d3po_core.models.memory import PLAN_FILE, PLANS, Card, MemoryPlan, plan_in_words, read_plan, write_plan
from d3po_core.models.policy import Policy
from d3po_core.speed.row_limit import RowLimit

NETWORK = 1_000  # MB, as are the sizes per row below
PLAIN, RECOMPUTING, SAMPLING, DECODING = 300, 100, 50, 120
MB = 10**6


class SmallCard(Card):
    """A GPU with so many MB, on which passes take what is written above."""

    def __init__(self, policy: Policy, megabytes: int, monkeypatch: pytest.MonkeyPatch, most_rows: int = 99) -> None:
        self.policy, self.megabytes, self.most_rows, self.taken = policy, megabytes, most_rows, 0
        for name in ("predict", "decode_on_device"):
            monkeypatch.setattr(policy, name, self._weighed(getattr(policy, name), decoding=name != "predict"))

    def _weighed(self, work: Callable[..., Any], decoding: bool) -> Callable[..., Any]:
        def weighed(latent_BCHW: torch.Tensor, *rest: Any) -> Any:
            rows, training = len(latent_BCHW), torch.is_grad_enabled()
            per_row = SAMPLING
            if decoding:
                assert rows == self.policy.plan.decoded, "all of them at once"
                per_row = DECODING
            elif training:
                per_row = RECOMPUTING if self.policy.plan.recomputes else PLAIN
            needed = NETWORK + rows * per_row
            if needed > self.megabytes or rows > self.most_rows:
                raise torch.OutOfMemoryError(f"{rows} rows take {needed} MB")
            self.taken = max(self.taken, needed)
            return work(latent_BCHW[:1], *(x[:1] if isinstance(x, torch.Tensor) else x for x in rest))

        return weighed

    @property
    def name(self) -> str:
        return "a small card"

    def budget(self) -> int:
        return self.megabytes * MB

    def start(self) -> None:
        self.taken = 0

    def peak(self) -> int:
        return self.taken * MB


@pytest.fixture(scope="module")
def embedded() -> Policy:
    return load_policy(ModelConfig(device="cpu", memory="auto", lora_rank=2), seed=0)


@pytest.fixture
def policy(embedded: Policy, monkeypatch: pytest.MonkeyPatch) -> Policy:
    monkeypatch.setattr(embedded, "encode", lambda prompts, scale: embedded_texts(embedded))
    return embedded


def embedded_texts(policy: Policy) -> Any:
    return Policy.encode(policy, [""], 2.0)


# A tenth of the memory stays free: of 4,100 MB, 3,690 are for 1,000 and (3,690 - 1,000) / 300 = 8 rows.
@pytest.mark.parametrize(
    ("megabytes", "expected"),
    [
        (12_000, (True, False, 32, 64, 16)),  # room for 32 rows: all stays
        (4_100, (False, False, 8, 53, 16)),
        (2_050, (False, True, 8, 16, 7)),  # only 2 rows without recomputing
        (1_350, (False, True, 2, 4, 1)),  # 1 row without recomputing, (1,215 - 1,000) / 100 = 2 with
        (1_125, (False, True, 1, 1, 1)),  # what has been passed once is taken, though less than a tenth is left
    ],
)
def test_a_card_gets_the_rows_that_fit(
    megabytes: int, expected: tuple[bool, bool, int, int, int], policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fitted_plan(policy, SmallCard(policy, megabytes, monkeypatch))
    assert (plan.stays, plan.recomputes, plan.trained, plan.sampled, plan.decoded) == expected
    assert policy.plan == plan
    assert plan.needs <= megabytes * MB
    assert policy.training_rows.of(1000) == plan.trained
    assert policy.network.is_gradient_checkpointing == plan.recomputes
    assert all(parameter.grad is None for _, parameter in policy.weights.parameters())


def test_what_two_rows_promised_is_tried(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than five rows do not fit, so training goes from 8 to 6 to 4 and decoding from 16 to 12, 9, 6 and 4."""
    plan = fitted_plan(policy, SmallCard(policy, 4_100, monkeypatch, most_rows=5))
    assert (plan.trained, plan.sampled, plan.decoded) == (4, 4, 4)


@pytest.mark.parametrize("megabytes", [1_040, 1_110])
def test_a_card_for_less_than_one_image_is_refused_in_one_line(
    megabytes: int, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1,110 MB one image-step can be trained, but not one image decoded."""
    with pytest.raises(D3POError, match=rf"^model\.memory 'auto': .* {megabytes / 1000:.1f} GB .* model\.precision"):
        fitted_plan(policy, SmallCard(policy, megabytes, monkeypatch))


def test_auto_on_a_cpu_is_the_plain_path(tmp_path: Path) -> None:
    config = CampaignConfig.model_validate(
        {"runs_dir": str(tmp_path), "model": {"device": "cpu", "memory": "auto", "lora_rank": 2}}
    )
    policy = loaded_policy(config)
    assert policy.plan == PLANS["fast"]
    assert not policy.network.is_gradient_checkpointing
    assert plan_in_words(config) is None


PLAN = MemoryPlan(stays=False, recomputes=True, trained=6, sampled=12, decoded=2, needs=20 * 10**9)


def card(gigabytes: float) -> Any:
    return SimpleNamespace(name="Card A", budget=lambda: int(gigabytes * 1e9))


def test_a_campaign_keeps_its_plan_on_another_card(tmp_path: Path) -> None:
    campaign = CampaignConfig.model_validate(
        {"runs_dir": str(tmp_path), "model": {"memory": "auto", "precision": "fp16"}}
    )
    config, folder = campaign.model, campaign.folder
    assert read_plan(folder, config, card(24)) is None
    write_plan(folder, config, card(24), PLAN)
    assert read_plan(folder, config, card(80)) == PLAN, "also with room for more"
    assert read_plan(folder, config.model_copy(update={"precision": "no"}), card(80)) is None
    with pytest.raises(D3POError, match=r"measured on Card A and needs 20\.0 GB, but this GPU gives 11\.5 GB"):
        read_plan(folder, config, card(11.5))
    assert plan_in_words(campaign) == (
        "model.memory auto, measured on Card A: at most 6 image-steps in training, 12 images in sampling, 2 in "
        "decoding at once, activations recomputed; idle parts leave; about 20.0 GB (memory.json)"
    )
    file = folder / PLAN_FILE
    file.write_text(file.read_text().replace("12", "13"))
    with pytest.raises(D3POError, match="is damaged; restore it, or remove it"):
        read_plan(folder, config, card(80))


def test_a_measured_plan_is_written_by_the_first_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CampaignConfig.model_validate({"runs_dir": str(tmp_path), "model": {"memory": "auto"}})
    monkeypatch.setattr(loaded, "Card", lambda: card(24))
    for first in (False, True):
        accelerator = SimpleNamespace(is_main_process=first)
        policy = SimpleNamespace(plan=PLAN, accelerator=accelerator)
        monkeypatch.setattr(loaded, "load_policy", lambda *_, policy=policy: policy)
        monkeypatch.setattr(loaded, "_loaded", {})
        loaded_policy(config)
        assert (config.folder / PLAN_FILE).exists() == first
    assert read_plan(config.folder, config.model, card(24)) == PLAN


def test_a_model_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(loaded, "Policy", too_large)
    with pytest.raises(
        D3POError, match=r"^model\.path .*: a first pass of one image does not fit .* model\.memory auto"
    ):
        load_policy(ModelConfig(device="cpu"), seed=0)


def test_a_cut_batch_is_said_and_recorded(embedded: Policy, caplog: pytest.LogCaptureFixture) -> None:
    embedded.use(replace(PLANS["medium"], trained=6))
    with caplog.at_level(logging.WARNING):
        assert embedded.training_rows.fit(40, passes_up_to(4)) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "training: 6 rows at once do not fit the GPU's memory; going on with 3, with the same results up to rounding. "
        "model.memory 'auto' takes fewer from the start"
    ]
    assert embedded.memory_used() == {
        "stays": False, "recomputes": True, "trained": 3, "sampled": 8, "decoded": 2, "needs": 0,
    }  # fmt: skip


def passes_up_to(most: int) -> Callable[[int], int]:
    def work(rows: int) -> int:
        if rows > most:
            raise torch.OutOfMemoryError
        return rows

    return work


def test_a_limit_that_nothing_cut_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert RowLimit("sampling", 4).fit(9, passes_up_to(4)) == 4
    assert not caplog.records
