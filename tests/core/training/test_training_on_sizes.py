"""An update on images of several sizes: its gradient is the mean of the sizes' own, and each pass has one size."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from d3po_core.config import TrainConfig
from d3po_core.models.policy import Policy
from d3po_core.sampling.rollout import sample_trajectories
from d3po_core.seeds import ImageSeed
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.packing import PairedGroup
from d3po_core.training.trainer import Part, Update, measure_learned, train_updates

STEPS, GUIDANCE = 3, 2.0
PROMPT = "a red circle on a gray background"
SIZES = ((64, 96), (32, 48))
# Two pairs of the first size, one of the second.
GROUPS = ([PairedGroup((0, 1, 2), ((0, 1, 1.0), (2, 1, 0.5)), (1.0, -1.0, 0.5))],
          [PairedGroup((0, 1), ((1, 0, 1.0),), (-1.0, 1.0))])  # fmt: skip


@pytest.fixture
def parts(stirred: Policy) -> list[Part]:
    made = []
    for size, groups in zip(SIZES, GROUPS, strict=True):
        seeds = [ImageSeed(PROMPT, 1, member, size) for member in groups[0].images]
        schedule = stirred.schedule(STEPS, 1.0, size)
        drawn = sample_trajectories(stirred, schedule, seeds, GUIDANCE, torch.float32)
        noise = [seed.noise_seed for seed in seeds]
        data = TrainingSet([PROMPT] * len(seeds), drawn.latents_BTCHW, drawn.log_probs_BT, groups, noise, size)
        made.append((schedule, data))
    return made


def settings(**changes: Any) -> TrainConfig:
    usual = {"updates_per_round": 1, "max_grad_norm": 1e12, "micro_batch": 64, "reference": "base"}
    return TrainConfig.model_validate({**usual, **changes})


def updated(policy: Policy, parts: list[Part], config: TrainConfig) -> tuple[torch.Tensor, Update]:
    """The gradient of one update and its metrics; no weight moves."""
    weights = [parameter for _, parameter in policy.weights.parameters()]
    (schedule, data), *more = parts
    (update,) = train_updates(
        policy, torch.optim.SGD(weights, lr=0.0), schedule, data, config, GUIDANCE, seed=5, more=more
    )
    return torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]), update


@pytest.fixture
def shapes_passed(stirred: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    seen: list[torch.Size] = []
    predict = stirred.predict

    def watched(latent: torch.Tensor, *more: Any) -> torch.Tensor:
        seen.append(latent.shape)
        return predict(latent, *more)

    monkeypatch.setattr(stirred, "predict", watched)
    return seen


@pytest.mark.parametrize("objective", ["d3po", "diffusion_dpo"])
def test_the_gradient_is_the_mean_over_pairs_of_all_sizes(
    objective: str, stirred: Policy, parts: list[Part], shapes_passed: list[torch.Size]
) -> None:
    config = settings(objective=objective)
    alone = [updated(stirred, [part], config) for part in parts]
    shapes_passed.clear()
    gradient, update = updated(stirred, parts, config)
    assert {shape[-2:] for shape in shapes_passed} == {(8, 12), (4, 6)}
    assert (update.num_pairs, update.num_units) == (3, 3)
    mean = (2 * alone[0][0] + alone[1][0]) / 3
    torch.testing.assert_close(gradient, mean, rtol=1e-3, atol=1e-5 * float(mean.abs().max()))
    assert update.loss == pytest.approx((2 * alone[0][1].loss + alone[1][1].loss) / 3, rel=1e-4)
    smaller, _ = updated(stirred, parts, config.model_copy(update={"micro_batch": 1}))
    torch.testing.assert_close(smaller, gradient, rtol=1e-3, atol=1e-4 * float(mean.abs().max()))


def test_what_was_learned_is_measured_over_all_sizes(stirred: Policy, parts: list[Part]) -> None:
    config = settings(measured_share=1.0)

    def seen(*some: Part) -> Any:
        (schedule, data), *more = some
        return measure_learned(stirred, schedule, data, config, GUIDANCE, 7, more)

    first, second, both = seen(parts[0]), seen(parts[1]), seen(*parts)
    assert both.margin == pytest.approx((2 * first.margin + second.margin) / 3, abs=1e-6)
    empty = (parts[1][0], replace(parts[1][1], groups=[]))
    assert seen(parts[0], empty) == first
