"""Training with every objective: direction, micro-batches, noise, references, resuming."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from d3po_core.config import TrainConfig
from d3po_core.config_values import load_config
from d3po_core.denoising.ddim import make_schedule
from d3po_core.denoising.flow import make_flow_schedule
from d3po_core.errors import D3POError
from d3po_core.models.checkpoint import load_checkpoint, save_checkpoint
from d3po_core.models.policy import Policy
from d3po_core.seeds import gaussian
from d3po_core.training.final_images import FinalImageLesson, RoundStart
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.objectives import OBJECTIVES, check_objective, make_objective
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.packing import shuffled_cells
from d3po_core.training.trainer import measure_learned, train_updates
from tests.core.sampling.drawing import stir_lora
from tests.core.training.test_trainer import (
    GROUPS,
    NUM_STEPS,
    assert_gradients_agree,
    lora_weights,
    one_update,
    same,
    settings,
    training_set,
)

ADVANTAGES = [(1.2, -1.3, 0.1), (-1.0, 1.0)]
# Strengths at which a tiny round is enough to see which way it goes.
STRONG: dict[str, dict[str, Any]] = {
    "dspo": {"beta": 300.0}, "ddpo": {"clip_range": 0.05}, "grpo": {"clip_range": 0.05}, "dpok": {"clip_range": 0.05},
    "rwr": {"temperature": 3.0}, "mapo": {"beta": 1.0},
}  # fmt: skip


def labelled(policy: Policy, objective: str) -> TrainingSet:
    data = training_set(policy, policy.schedule(NUM_STEPS, 1.0))
    kind = OBJECTIVES[objective]().takes()
    numbers = {"pairs": [(), ()], "numbers": ADVANTAGES, "good_bad": [(1.0, -1.0, -1.0), (-1.0, 1.0)]}[kind]
    return replace(data, groups=[replace(g, numbers=n) for g, n in zip(GROUPS, numbers, strict=True)])


# These learn from what is good far more than from the difference; test_objective_formulas has their direction.
REGRESSIONS = ("mapo", "rwr")


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in REGRESSIONS])
def test_a_round_moves_the_policy_towards_winners(policy: Policy, name: str) -> None:
    schedule, data = policy.schedule(NUM_STEPS, 1.0), labelled(policy, name)
    config = settings(objective=name, settings=STRONG.get(name, {}), updates_per_round=5, epochs=5, learning_rate=3e-3,
                      max_grad_norm=1.0, measured_share=1.0)  # fmt: skip
    updates = list(train_updates(policy, make_optimizer(policy, config), schedule, data, config, 1.0, seed=5))
    learned = measure_learned(policy, schedule, data, config, 1.0, seed=7)
    assert learned is not None
    assert learned.margin > 0
    assert learned.loser_error > learned.winner_error
    assert 0 < updates[0].gradient_factor <= 1
    assert updates[0].num_units == (3 if OBJECTIVES[name]().takes() == "pairs" else 5)
    assert updates[-1].margin_before > updates[0].margin_before


@pytest.mark.parametrize("name", REGRESSIONS)
def test_a_round_of_regression_lowers_the_winners_error(policy: Policy, name: str) -> None:
    """On the same noise, which seed 5 draws again."""
    schedule, data = policy.schedule(NUM_STEPS, 1.0), labelled(policy, name)
    config = settings(objective=name, settings=STRONG[name], updates_per_round=4, epochs=4, learning_rate=1e-3)
    before, _ = one_update(policy, schedule, data, config.model_copy(update={"updates_per_round": 1, "epochs": 1}))
    list(train_updates(policy, make_optimizer(policy, config), schedule, data, config, 1.0, seed=6))
    after, _ = one_update(policy, schedule, data, config.model_copy(update={"updates_per_round": 1, "epochs": 1}))
    assert after.loss < before.loss


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_does_not_depend_on_how_much_passes_at_once(stirred: Policy, name: str) -> None:
    """With KTO it would if z were a mean over what fits, and with few rows its sign would change with it."""
    schedule, data = stirred.schedule(NUM_STEPS, 1.0), labelled(stirred, name)
    config = settings(objective=name, settings=STRONG.get(name, {}), micro_batch=1000)
    if OBJECTIVES[name].reference == "any":
        config = config.model_copy(update={"reference": "base"})  # else on policy, where KTO's z is 0
    whole_update, whole = one_update(stirred, schedule, data, config)
    update, split = one_update(stirred, schedule, data, config.model_copy(update={"micro_batch": 2}))
    assert_gradients_agree(split, whole, 1e-3)
    assert update.loss == pytest.approx(whole_update.loss, rel=1e-3, abs=1e-5)


def test_ktos_z_is_the_mean_over_the_update(stirred: Policy) -> None:
    schedule, data = stirred.schedule(NUM_STEPS, 1.0), labelled(stirred, "kto")
    good = replace(data, groups=[replace(g, numbers=(1.0,) * len(g.images)) for g in data.groups])
    config = settings(objective="kto", settings={"beta": 1e-3}, reference="base")
    update, _ = one_update(stirred, schedule, good, config)
    # 1 - sigmoid(beta (g - z)) is linear for a small beta: with z the mean of g (if above 0) it averages to 1/2.
    rise = update.winner_error_before
    assert rise is not None
    assert update.loss == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("name", ["diffusion_dpo", "kto", "nft"])
def test_resumed_training_equals_uninterrupted_bit_for_bit(policy: Policy, tmp_path: Path, name: str) -> None:
    schedule, data = policy.schedule(NUM_STEPS, 1.0), labelled(policy, name)
    config = settings(objective=name, updates_per_round=4, epochs=2, learning_rate=1e-2, max_grad_norm=1.0)
    stir_lora(policy, seed=1)  # a round after the first
    begun = lora_weights(policy)

    def train(start: RoundStart | None, first: int, last: int, optimizer: torch.optim.Optimizer) -> None:
        updates = train_updates(policy, optimizer, schedule, data, config, 1.0, 5, first, start)
        list(itertools.islice(updates, last - first))

    optimizer = make_optimizer(policy, config)
    train(None, 0, 2, optimizer)
    save_checkpoint(tmp_path / "half", policy, optimizer, {})
    half = lora_weights(policy)
    with torch.no_grad():
        for key, parameter in policy.weights.parameters():
            parameter.copy_(begun[key])
    start = RoundStart(policy)
    optimizer = make_optimizer(policy, config)
    train(None, 0, 4, optimizer)
    expected = lora_weights(policy)
    found = {}
    for given in (start, None):
        optimizer = make_optimizer(policy, config)
        load_checkpoint(tmp_path / "half", policy, optimizer)
        assert same(lora_weights(policy), half)
        train(given, 2, 4, optimizer)
        found[given] = lora_weights(policy)
    assert same(found[start], expected)
    assert not same(found[None], expected)  # the naive reference: whatever the policy is when the process starts


def lesson_of(policy: Policy, name: str, **more: Any) -> FinalImageLesson:
    config = TrainConfig(objective=name, **more)
    data = labelled(policy, name)
    return FinalImageLesson(policy, policy.schedule(NUM_STEPS, 1.0), data, config, make_objective(config), 1.0)


def noise_of(lesson: FinalImageLesson, seed: int) -> torch.Tensor:
    """What the network of an epsilon model is asked for, ``[N, T, C, H, W]``."""
    cells = shuffled_cells(lesson.data.groups, lesson.steps, 0)
    lesson.begin(cells, seed, 64)
    image_R, step_R = torch.cartesian_prod(torch.arange(5), torch.arange(NUM_STEPS)).unbind(1)
    return lesson._target.of_rows(image_R, step_R, torch.device("cpu")).unflatten(0, (5, NUM_STEPS))


def test_pairs_share_their_noise_single_images_have_their_own_and_an_update_always_draws_the_same(
    policy: Policy,
) -> None:
    shared, own = (noise_of(lesson_of(policy, name), 1) for name in ("diffusion_dpo", "kto"))
    assert torch.equal(shared[0], shared[2])
    assert torch.equal(shared[3], shared[4])
    assert not torch.equal(shared[0], shared[3])
    assert len({tuple(noise.flatten()[:4].tolist()) for noise in own.flatten(0, 1)}) == 5 * NUM_STEPS
    assert torch.equal(noise_of(lesson_of(policy, "kto"), 1), own)
    assert not torch.equal(noise_of(lesson_of(policy, "kto"), 2), own)
    assert abs(own.mean()) < 0.05
    assert own.std().item() == pytest.approx(1, abs=0.05)


def test_own_noise_leads_from_x0_to_the_stored_latent(policy: Policy) -> None:
    lesson = lesson_of(policy, "own_noise_dpo")
    noise, scheduler = noise_of(lesson, 1), policy.family.pipeline.scheduler
    alpha_T = DDIMScheduler.from_config(scheduler.config).alphas_cumprod[policy.schedule(NUM_STEPS, 1.0).timesteps_T]
    signal, share = (x.sqrt()[:, None, None, None] for x in (alpha_T, 1 - alpha_T))
    latents = lesson.data.latents_NTCHW
    torch.testing.assert_close(signal * latents[:, -1:] + share * noise, latents[:, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_noised_images_and_targets_are_those_of_diffusers(kind: str) -> None:
    x0, noise = gaussian(1, 3, 2, 4, 4), gaussian(2, 3, 2, 4, 4)
    if kind == "flow":
        flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
        schedule = make_flow_schedule(flow, 3, 0.7)
        noised = flow.scale_noise(x0, flow.timesteps, noise)
        target = noise - x0
    else:
        ddim = DDIMScheduler(prediction_type=kind, clip_sample=False)
        schedule = make_schedule(ddim, 3, 1.0)
        noised = ddim.add_noise(x0, noise, schedule.timesteps_T)
        target = {"epsilon": noise, "sample": x0, "v_prediction": ddim.get_velocity(x0, noise, schedule.timesteps_T)}[
            kind
        ]
    signal, share, of_x0, of_noise = (x[:, None, None, None] for x in schedule.forward())
    torch.testing.assert_close(signal * x0 + share * noise, noised, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_x0 * x0 + of_noise * noise, target, rtol=1e-5, atol=1e-5)


def test_a_random_move_raises_both_errors_by_the_neutral_amount(policy: Policy) -> None:
    """E[-log pi / pi_sampler] over the sampler's own steps is their KL."""
    schedule, data = policy.schedule(NUM_STEPS, 1.0), labelled(policy, "d3po")
    stir_lora(policy, seed=3, size=0.1)
    learned = measure_learned(policy, schedule, data, settings(measured_share=1.0), 1.0, seed=7)
    assert learned is not None
    assert learned.neutral_error > 1e-3
    for error in (learned.winner_error, learned.loser_error):
        assert error == pytest.approx(learned.neutral_error, rel=0.4)


def test_fewer_steps_per_image_are_drawn_anew_and_the_mean_is_over_them(policy: Policy) -> None:
    schedule, data = policy.schedule(NUM_STEPS, 1.0), labelled(policy, "d3po")
    update, _ = one_update(policy, schedule, data, settings(steps_per_image=1))
    mean_weight = sum(weight for group in GROUPS for *_, weight in group.pairs) / 3
    assert update.loss == pytest.approx(0.6931 * mean_weight, abs=1e-3)
    assert len(update.per_step) <= 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"train": {"objective": "kt0"}}, "train.objective is 'kt0'; expected one of alpha_dpo, awm, d3po"),
    ({"train": {"objective": "kto", "settings": {"betta": 1}}}, "train.settings.betta is 1: .*settings of kto: beta, "),
    ({"train": {"objective": "kto", "settings": {"beta": -1}}}, "train.settings.beta is -1: .*greater than 0"),
    ({"train": {"settings": {"beta": 1}}}, "train.settings.beta is 1: .*settings of d3po: none"),
    ({"train": {"objective": "kto", "beta": 5}}, "train.beta is 5.0 but .*'kto', which does not read it"),
    ({"train": {"objective": "alpha_dpo", "settings": {"alpha": 1}}}, "train.settings.alpha is 1: .*must not be 1"),
    ({"train": {"objective": "mapo", "reference": "base"}}, "train.reference is 'base' but mapo has no reference"),
    ({"train": {"objective": "nft", "reference": "base"}}, "nft learns from the policy that sampled the round"),
    ({"train": {"steps_per_image": 11}}, "train.steps_per_image is 11 but an image has 10 steps"),
    (
        {"train": {"objective": "ddpo"}, "judge": {"labeller": "human", "rewards": "scores"}},
        "ddpo learns from a number per image, .* set judge.rewards to 'win_rate' or 'bradley_terry'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "told"), BAD)
def test_combinations_that_make_no_sense_are_one_line(values: dict[str, Any], told: str) -> None:
    with pytest.raises(D3POError, match=told) as caught:
        check_objective(load_config(values, "test"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_runs_with_its_defaults(name: str) -> None:
    check_objective(load_config({"train": {"objective": name}}, "test"))
