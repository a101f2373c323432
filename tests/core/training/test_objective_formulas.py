"""Every objective's loss and gradient against its paper's formula, written out image by image with plain numbers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from d3po_core.config import TrainConfig
from d3po_core.training.errors_of_pairs import loser_scale
from d3po_core.training.objective import Rows
from d3po_core.training.objectives import OBJECTIVES
from d3po_core.training.objectives.mapo import likelihood

SHAPE = (2, 3, 3)
# Two groups at one step each: images 0-2 and 3-5, their pairs and the labels of single images.
PAIRS = [(0, 1, 1.0), (0, 2, 0.5), (4, 3, 0.75)]
NUMBERS = [1.2, 0.1, -1.3, -1.0, 1.0, 0.0]
GROUPS = [[0, 1, 2], [3, 4, 5]]
SIGMA = [0.5] * 3 + [0.2] * 3
MEAN = 0.03  # of the update


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(closeness: float = 0.3, **changes: Any) -> Rows:
    """Rows of six images whose output is near the reference's."""
    target, reference = drawn(1, 6, *SHAPE), drawn(2, 6, *SHAPE)
    log_prob = drawn(6, 6)
    rows = {
        "step_R": torch.tensor([0] * 3 + [1] * 3), "cell_R": torch.tensor([0] * 3 + [1] * 3),
        "winner_P": torch.tensor([p[0] for p in PAIRS]), "loser_P": torch.tensor([p[1] for p in PAIRS]),
        "weight_P": torch.tensor([p[2] for p in PAIRS], dtype=torch.float64), "step_P": torch.tensor([0, 0, 1]),
        "number_R": torch.tensor(NUMBERS, dtype=torch.float64), "target_RCHW": target, "reference_RCHW": reference,
        "output_RCHW": (reference + closeness * drawn(3, 6, *SHAPE)).requires_grad_(),
        "base_RCHW": drawn(4, 6, *SHAPE), "mean_RCHW": drawn(5, 6, *SHAPE).requires_grad_(),
        "sampled_mean_RCHW": drawn(8, 6, *SHAPE), "sampled_log_prob_R": log_prob, "reference_log_prob_R": log_prob,
        "log_prob_R": (log_prob + 0.2 * drawn(7, 6)).requires_grad_(),
        "sigma_R": torch.tensor(SIGMA, dtype=torch.float64),
        "step_weight_R": torch.tensor([1.5] * 3 + [0.5] * 3, dtype=torch.float64),
        "kl_scale_R": torch.tensor([2.0] * 3 + [3.0] * 3, dtype=torch.float64),
        "x0_scale_R": torch.tensor([1.5] * 3 + [0.4] * 3, dtype=torch.float64),
        "noise_share_R": torch.tensor([0.6] * 3 + [0.3] * 3, dtype=torch.float64),
        "update_mean": torch.tensor(MEAN, dtype=torch.float64),
    }  # fmt: skip
    return Rows(**rows | changes)


def mse(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum() / a.numel()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def of_pairs(rows: Rows, formula: Callable[[int, int], Tensor]) -> Tensor:
    return torch.stack([weight * formula(winner, loser) for winner, loser, weight in PAIRS])


def of_images(rows: Rows, formula: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([formula(i) for i in range(6)])


def plain_u(rows: Rows, beta: float) -> Callable[[int, int], Tensor]:
    o, t, r = rows.output_RCHW, rows.target_RCHW, rows.reference_RCHW
    return lambda w, lo: -beta / 2 * ((mse(o[w], t[w]) - mse(o[lo], t[lo])) - (mse(r[w], t[w]) - mse(r[lo], t[lo])))


def d3po(rows: Rows) -> Tensor:
    c = [rows.step_weight_R[i] * (rows.log_prob_R[i] - rows.reference_log_prob_R[i]) for i in range(6)]
    return of_pairs(rows, lambda w, lo: -torch.log(sigmoid(2.0 * (c[w] - c[lo]))))


def dpo(rows: Rows) -> Tensor:
    u = plain_u(rows, 7.0)
    return of_pairs(rows, lambda w, lo: -torch.log(sigmoid(u(w, lo))))


def hinge(rows: Rows) -> Tensor:
    u = plain_u(rows, 1.5)
    return of_pairs(rows, lambda w, lo: torch.clamp(1 - u(w, lo), min=0))


def ipo(rows: Rows) -> Tensor:
    h = plain_u(rows, 1.0)  # the margin without beta; its aim is 1 / (2 beta)
    return of_pairs(rows, lambda w, lo: (h(w, lo) - 1 / (2 * 7.0)) ** 2)


def kto(rows: Rows) -> Tensor:
    o, t, r = rows.output_RCHW, rows.target_RCHW, rows.reference_RCHW

    def formula(i: int) -> Tensor:
        g = -mse(o[i], t[i]) + mse(r[i], t[i])
        s = 1 if NUMBERS[i] > 0 else -1 if NUMBERS[i] < 0 else 0
        return (2.0 if s > 0 else 0.5) * (1 - sigmoid(s * 7.0 * (g - max(MEAN, 0))))

    return of_images(rows, formula)


def mapo(rows: Rows) -> Tensor:
    e = [mse(rows.output_RCHW[i], rows.target_RCHW[i]) for i in range(6)]
    f = [0.5 * x / (torch.exp(0.5 * x) - 1) for x in e]
    return of_pairs(rows, lambda w, lo: e[w] - 0.1 * torch.log(sigmoid(1000.0 * 0.01 * (f[w] - f[lo]))))


def dspo(rows: Rows) -> Tensor:
    u, o, t, r = plain_u(rows, 0.7), rows.output_RCHW, rows.target_RCHW, rows.reference_RCHW
    return of_pairs(rows, lambda w, lo: (((o[w] - t[w]) - 0.7 * (1 - sigmoid(u(w, lo))) * (o[w] - r[w])) ** 2).mean())


def alpha_dpo(rows: Rows) -> Tensor:
    u, a = plain_u(rows, 7.0), 0.9

    def formula(w: int, lo: int) -> Tensor:
        p = sigmoid(u(w, lo))
        return (p**a - (1 - a) - a * p) / (a * (a - 1))

    return of_pairs(rows, formula)


def dmpo(rows: Rows) -> Tensor:
    u, q = plain_u(rows, 7.0), 1 - 0.01

    def formula(w: int, lo: int) -> Tensor:
        p = sigmoid(u(w, lo))
        return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))

    return of_pairs(rows, formula)


def rwr(rows: Rows) -> Tensor:
    def formula(i: int) -> Tensor:
        group = next(g for g in GROUPS if i in g)
        w = math.exp(2 * NUMBERS[i]) / sum(math.exp(2 * NUMBERS[k]) for k in group) * len(group)
        return w * mse(rows.output_RCHW[i], rows.target_RCHW[i])

    return of_images(rows, formula)


def ppo(ratio: Tensor, advantage: float, clip: float) -> Tensor:
    return torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - clip, 1 + clip))


def ddpo(rows: Rows) -> Tensor:
    return of_images(rows, lambda i: ppo(torch.exp(rows.log_prob_R[i] - rows.sampled_log_prob_R[i]), NUMBERS[i], 0.1))


def grpo_guard(rows: Rows) -> Tensor:
    def formula(i: int) -> Tensor:
        s, moved = SIGMA[i], mse(rows.mean_RCHW[i], rows.sampled_mean_RCHW[i])
        ratio = torch.exp((rows.log_prob_R[i] - rows.sampled_log_prob_R[i]) * s + moved / (2 * s))
        kl = rows.kl_scale_R[i] * mse(rows.output_RCHW[i], rows.base_RCHW[i])
        return ppo(ratio, NUMBERS[i], 0.2) + 0.04 * kl

    return of_images(rows, formula)


def dpok(rows: Rows) -> Tensor:
    def formula(i: int) -> Tensor:
        ratio = torch.clamp(torch.exp(rows.log_prob_R[i] - rows.sampled_log_prob_R[i]), 0.9, 1.1)
        return -100 * NUMBERS[i] * ratio + 0.01 * mse(rows.output_RCHW[i], rows.base_RCHW[i])

    return of_images(rows, formula)


def nft(rows: Rows) -> Tensor:
    """In the space of x_0: x_0 is x0_scale times the output plus what both share."""

    def formula(i: int) -> Tensor:
        v, old, target, s = (x[i] for x in (rows.output_RCHW, rows.reference_RCHW, rows.target_RCHW, rows.x0_scale_R))
        r, beta = min(max(min(max(NUMBERS[i], -5), 5) / 10 + 0.5, 0), 1), 0.5
        both = []
        for mixed in (beta * v + (1 - beta) * old, (1 + beta) * old - beta * v):
            missed = -s * mixed + s * target
            both.append((missed**2).mean() / missed.detach().abs().mean())
        loss = 5 * (r * both[0] / beta + (1 - r) * both[1] / beta)
        return loss + 1e-4 * mse(v, rows.base_RCHW[i])

    return of_images(rows, formula)


def awm(rows: Rows) -> Tensor:
    def formula(i: int) -> Tensor:
        e, old = (mse(x[i], rows.target_RCHW[i]) for x in (rows.output_RCHW, rows.reference_RCHW))
        lp, lp_old = (-((x + 1e-10) ** 0.25 - 1e-10**0.25) * rows.noise_share_R[i] / 0.25 for x in (e, old))
        kl = mse(rows.output_RCHW[i], rows.base_RCHW[i])
        return ppo(torch.exp(lp - lp_old), min(max(NUMBERS[i], -5), 5) / 5, 1.0) + 0.003 * kl

    return of_images(rows, formula)


def dgpo(rows: Rows) -> Tensor:
    e, ref = ([mse(x[i], rows.target_RCHW[i]) for i in range(6)] for x in (rows.output_RCHW, rows.reference_RCHW))

    def formula(i: int) -> Tensor:
        group = next(g for g in GROUPS if i in g)
        behind = sum(NUMBERS[k] * 7.0 * (e[k] - ref[k]) / len(group) for k in group)
        return sigmoid(behind).detach() * NUMBERS[i] * e[i]

    return of_images(rows, formula)


CASES = [
    ("d3po", {}, d3po), ("diffusion_dpo", {"beta": 7}, dpo), ("diffusion_dpo", {"beta": 1.5, "loss": "hinge"}, hinge),
    ("diffusion_dpo", {"beta": 7, "loss": "ipo"}, ipo), ("own_noise_dpo", {"beta": 7}, dpo),
    ("kto", {"beta": 7, "good_weight": 2, "bad_weight": 0.5}, kto), ("mapo", {"scale": 10}, mapo),
    ("dspo", {"beta": 0.7}, dspo), ("alpha_dpo", {"beta": 7, "alpha": 0.9, "reweight": False}, alpha_dpo),
    ("alpha_dpo", {"beta": 7, "alpha": 0.9 / MEAN}, alpha_dpo), ("dmpo", {"beta": 7}, dmpo),
    ("rwr", {"temperature": 2}, rwr), ("ddpo", {"clip_range": 0.1}, ddpo),
    ("grpo", {"clip_range": 0.2, "guard": True, "kl_weight": 0.04}, grpo_guard), ("dpok", {"clip_range": 0.1}, dpok),
    ("nft", {"beta": 0.5}, nft), ("awm", {}, awm), ("dgpo", {"beta": 7}, dgpo),
]  # fmt: skip
SIGNALS = ("output_RCHW", "log_prob_R", "mean_RCHW")


def gradients(loss_U: Tensor, rows: Rows) -> list[Tensor]:
    found = torch.autograd.grad(loss_U.sum(), [getattr(rows, name) for name in SIGNALS], allow_unused=True)
    return [torch.zeros((), dtype=torch.float64) if gradient is None else gradient for gradient in found]


@pytest.mark.parametrize(("name", "settings", "formula"), CASES, ids=[f"{n}-{f.__name__}" for n, _, f in CASES])
def test_loss_and_gradient_are_those_of_the_papers_formula(
    name: str, settings: dict[str, Any], formula: Callable[[Rows], Tensor]
) -> None:
    rows, again = made(), made()
    ours = OBJECTIVES[name].model_validate(settings).losses(rows, TrainConfig(beta=2.0)).loss_U
    plain = formula(again)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-7)
    pairs = list(zip(gradients(ours, rows), gradients(plain, again), strict=True))
    assert any(expected.abs().max() > 1e-3 for _, expected in pairs)
    for found, expected in pairs:
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_every_objective_has_a_formula_here() -> None:
    assert {name for name, *_ in CASES} == OBJECTIVES.keys()


def test_d3pos_logit_is_diffusion_dpos_with_the_step_taken_as_target_and_beta_scaled_by_the_step() -> None:
    """mu = a x_t + c out, so (x' - mu)^2 = c^2 (out* - out)^2, out* = (x' - a x_t) / c: beta_dpo is beta c^2 / s^2."""
    beta, c, a = 3.0, -0.7, 1.1
    now, following, output, reference = (drawn(seed, 6, *SHAPE) for seed in (11, 12, 13, 14))
    sigma = torch.tensor(SIGMA, dtype=torch.float64)[:, None, None, None]
    log_prob, of_reference = (
        torch.distributions.Normal(a * now + c * out, sigma).log_prob(following).mean(dim=(1, 2, 3))
        for out in (output, reference)
    )
    for group, pairs in ((0.5, PAIRS[:2]), (0.2, PAIRS[2:])):
        ends = {
            "winner_P": torch.tensor([p[0] for p in pairs]), "loser_P": torch.tensor([p[1] for p in pairs]),
            "weight_P": torch.ones(len(pairs), dtype=torch.float64),
        }  # fmt: skip
        rows = made(**ends, log_prob_R=log_prob, reference_log_prob_R=of_reference, output_RCHW=output,
                    reference_RCHW=reference, target_RCHW=(following - a * now) / c,
                    step_weight_R=torch.ones(6))  # fmt: skip
        step = OBJECTIVES["d3po"]().losses(rows, TrainConfig(beta=beta)).loss_U
        image = OBJECTIVES["diffusion_dpo"](beta=beta * c**2 / group**2).losses(rows, TrainConfig()).loss_U
        assert step.std() > 0 if len(step) > 1 else True
        torch.testing.assert_close(step, image, rtol=1e-9, atol=1e-9)


def test_diffusers_beta_without_its_half_is_half_of_ours() -> None:
    rows, u = made(), plain_u(made(), 2.0)  # -beta/2 with beta 2: the bare margin
    ours = OBJECTIVES["diffusion_dpo"](beta=5.0).losses(rows, TrainConfig()).loss_U
    theirs = of_pairs(rows, lambda w, lo: -torch.log(sigmoid(2.5 * u(w, lo))))
    torch.testing.assert_close(ours, theirs)


def test_mapo_is_finite_where_its_formula_is_zero_over_zero() -> None:
    error = torch.tensor([0.0, 1e-9, 1e-4], requires_grad=True)
    assert (0.5 * error / (torch.exp(0.5 * error) - 1)).isfinite().logical_not().any()  # as naively written
    value = likelihood(error)
    value.sum().backward()
    torch.testing.assert_close(value, torch.tensor([1.0, 1.0, 1 - 0.25e-4]), rtol=1e-6, atol=1e-6)
    assert error.grad is not None
    assert error.grad.isfinite().all()


def test_the_kl_of_dpok_is_to_the_base_and_counts_for_a_single_image() -> None:
    """Their published stand-in, a categorical over the batch's entries, is 0 at batch 1, whatever the base says."""
    one = slice(0, 1)
    rows = made(**{name: getattr(made(), name)[one] for name in ("base_RCHW", "number_R", "sampled_log_prob_R")},
                output_RCHW=made().output_RCHW.detach()[one].requires_grad_(),
                log_prob_R=made().sampled_log_prob_R[one])  # fmt: skip
    naive = torch.log_softmax(rows.log_prob_R, 0) - torch.log_softmax(rows.sampled_log_prob_R + 1, 0)
    assert naive.item() == 0
    loss = OBJECTIVES["dpok"]().losses(rows, TrainConfig()).loss_U
    (gradient,) = torch.autograd.grad(loss.sum(), rows.output_RCHW)
    expected = 0.01 * 2 * (rows.output_RCHW - rows.base_RCHW) / math.prod(SHAPE)
    torch.testing.assert_close(gradient, expected.detach())


def test_nft_at_the_sampler_has_a_gradient_that_its_loss_value_does_not_show() -> None:
    found = {}
    for number in (2.0, -2.0):
        start = made().reference_RCHW
        rows = made(output_RCHW=start.clone().requires_grad_(), number_R=torch.full((6,), number).double())
        loss = OBJECTIVES["nft"](kl_weight=0).losses(rows, TrainConfig()).loss_U
        found[number] = loss.detach(), torch.autograd.grad(loss.sum(), rows.output_RCHW)[0]
    torch.testing.assert_close(found[2.0][0], found[-2.0][0])
    torch.testing.assert_close(found[2.0][1], -found[-2.0][1])
    assert found[2.0][1].abs().max() > 0


def test_alpha_dpo_near_alpha_one_keeps_its_digits() -> None:
    """Its limit is p log p - p + 1, which single precision loses among cancelling terms of 1."""
    rows = made(**{n: getattr(made(), n).float() for n in ("output_RCHW", "target_RCHW", "reference_RCHW", "weight_P")})
    loss = OBJECTIVES["alpha_dpo"](beta=7, alpha=1 - 1e-7, reweight=False).losses(rows, TrainConfig()).loss_U
    u = plain_u(made(), 7.0)
    limit = of_pairs(rows, lambda w, lo: sigmoid(u(w, lo)) * torch.log(sigmoid(u(w, lo))) - sigmoid(u(w, lo)) + 1)
    torch.testing.assert_close(loss.double(), limit, rtol=1e-4, atol=1e-6)


def test_the_safeguard_keeps_the_winners_error_from_rising_and_changes_no_value() -> None:
    """One step down the loss in output space: where both gradients agree, the loser's share would raise the winner."""
    target, output = drawn(1, 6, *SHAPE), drawn(2, 6, *SHAPE)
    output[1] = target[1] + 3 * (output[0] - target[0])  # the loser pulls three times as hard, the same way
    rows = made(output_RCHW=output.clone().requires_grad_(), target_RCHW=target)
    free, held = (OBJECTIVES["diffusion_dpo"](beta=7, safeguard=on) for on in (False, True))
    assert torch.equal(free.losses(rows, TrainConfig()).loss_U, held.losses(rows, TrainConfig()).loss_U)
    scale_P = loser_scale(rows, mu=0.9)
    assert scale_P[0].item() == pytest.approx(0.1 / 3)
    g_w, g_l = output[0] - target[0], output[1] - target[1]
    assert (g_w * (g_w - g_l)).sum() < 0  # both outputs move by one shared step: the winner's error rises
    assert (g_w * (g_w - scale_P[0] * g_l)).sum() >= 0.9 * (g_w**2).sum() * (1 - 1e-6)
    apart = made(output_RCHW=torch.stack([output[0], 2 * target[1] - output[1], *output[2:]]), target_RCHW=target)
    assert loser_scale(apart, mu=0.9)[0] == 1  # gradients that point apart are left alone
