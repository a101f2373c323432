"""The loss over whole groups against Eq. 14 of the paper, written out pair by pair with a plain sigmoid and log."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d3po_core.training.loss import pair_loss

CLIPS = ("one_sided", "two_sided", "none")


def plain_loss(
    log_theta: torch.Tensor,
    log_ref: torch.Tensor,
    pairs: list[tuple[int, int, float]],
    beta: float,
    clip: str,
    c: float,
) -> torch.Tensor:
    """Sum over pairs of -w log sigmoid(beta log(ratio_w) - beta log(ratio_l)); ratios clamped, everything float64."""
    total = torch.zeros((), dtype=torch.float64)
    for winner, loser, weight in pairs:
        ratio_w = torch.exp(log_theta[winner] - log_ref[winner])
        ratio_l = torch.exp(log_theta[loser] - log_ref[loser])
        if clip == "two_sided":
            ratio_w = torch.clamp(ratio_w, 1 - c, 1 + c)
            ratio_l = torch.clamp(ratio_l, 1 - c, 1 + c)
        elif clip == "one_sided":
            ratio_w = torch.minimum(ratio_w, torch.tensor(1 + c, dtype=torch.float64))
            ratio_l = torch.maximum(ratio_l, torch.tensor(1 - c, dtype=torch.float64))
        advantage = beta * torch.log(ratio_w) - beta * torch.log(ratio_l)
        total = total - weight * torch.log(1 / (1 + torch.exp(-advantage)))
    return total


@st.composite
def groups(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, float]]]:
    """Log_probs of the rows of up to three groups and weighted pairs inside them, none or each in one direction."""
    sizes = draw(st.lists(st.integers(2, 7), min_size=1, max_size=3))
    pairs, first = [], 0
    for size in sizes:
        for a, b in itertools.combinations(range(first, first + size), 2):
            outcome = draw(st.sampled_from((-1, 0, 1)))
            if outcome:
                winner, loser = (a, b) if outcome > 0 else (b, a)
                pairs.append((winner, loser, draw(st.floats(0.01, 1))))
        first += size
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    reference = torch.randn(first, generator=generator, dtype=torch.float64) - 1
    drift = draw(st.sampled_from((0.0, 0.02, 0.1, 0.5)))
    return reference + drift * torch.randn(first, generator=generator, dtype=torch.float64), reference, pairs


@settings(max_examples=200)
@given(groups(), st.sampled_from(CLIPS), st.sampled_from((0.1, 1.0, 30.0)), st.floats(0.01, 0.5))
def test_group_arithmetic_equals_pairwise_eq_14_in_value_and_gradient(
    group: tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, float]]], clip: str, beta: float, clip_range: float
) -> None:
    log_theta, log_ref, pairs = group
    plain_theta = log_theta.clone().requires_grad_()
    plain = plain_loss(plain_theta, log_ref, pairs, beta, clip, clip_range)
    ours_theta = log_theta.clone().requires_grad_()
    winner_P, loser_P = (torch.tensor([pair[k] for pair in pairs], dtype=torch.long) for k in (0, 1))
    weight_P = torch.tensor([weight for *_, weight in pairs], dtype=torch.float64)
    result = pair_loss(
        ours_theta - log_ref, winner_P, loser_P, weight_P, beta=beta, clip=clip, clip_range=clip_range
    )  # fmt: skip
    ours = result.loss_P.sum()
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    if pairs:
        ours.backward()
        plain.backward()
        torch.testing.assert_close(ours_theta.grad, plain_theta.grad, rtol=1e-9, atol=1e-9)
    ratio = log_theta - log_ref
    torch.testing.assert_close(result.margin_P, ratio[winner_P] - ratio[loser_P])


def two_ratios(log_ratio_w: float, log_ratio_l: float, clip: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Loss, gradient and clipped share of one pair at beta 1 and clip range 0.1."""
    log_ratio_R = torch.tensor([log_ratio_w, log_ratio_l], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0]), torch.tensor([1]), torch.ones(1, dtype=torch.float64)
    result = pair_loss(log_ratio_R, *index, beta=1.0, clip=clip, clip_range=0.1)
    result.loss_P.sum().backward()
    assert log_ratio_R.grad is not None
    return result.loss_P.detach(), log_ratio_R.grad, result.clipped_P.item()


def test_on_policy_loss_is_log_two_and_pulls_apart() -> None:
    for clip in CLIPS:
        loss, gradient, clipped = two_ratios(0.0, 0.0, clip)
        assert loss.item() == pytest.approx(math.log(2))
        assert gradient.tolist() == pytest.approx([-0.5, 0.5])
        assert clipped == 0


@pytest.mark.parametrize("log_ratio_w", [-0.2, 0.2])
@pytest.mark.parametrize("log_ratio_l", [-0.2, 0.2])
def test_two_sided_clip_has_no_gradient_outside_the_band(log_ratio_w: float, log_ratio_l: float) -> None:
    _, gradient, clipped = two_ratios(log_ratio_w, log_ratio_l, "two_sided")
    assert gradient.tolist() == [0, 0]
    assert clipped == 1


def test_published_loss_stays_in_its_narrow_band() -> None:
    # d3po.md: with beta 0.1 and clamp 0.1 the published loss stays in [0.683, 0.703].
    values = torch.linspace(-3, 3, 41)
    ratios = torch.cartesian_prod(values, values).flatten()
    winner_P = torch.arange(0, len(ratios), 2)
    loss = pair_loss(
        ratios, winner_P, winner_P + 1, torch.ones(len(winner_P)), beta=0.1, clip="two_sided", clip_range=0.1
    ).loss_P
    assert loss.min().item() == pytest.approx(0.683, abs=5e-4)
    assert loss.max().item() == pytest.approx(0.703, abs=5e-4)


def test_one_sided_clip_keeps_the_gradient_of_moves_in_the_wrong_direction() -> None:
    _, gradient, clipped = two_ratios(-0.2, 0.2, "one_sided")
    assert gradient[0] < 0
    assert gradient[1] > 0
    assert clipped == 0
    _, unclipped, _ = two_ratios(-0.2, 0.2, "none")
    assert torch.equal(gradient, unclipped)


def test_one_sided_clip_stops_moves_that_are_far_enough_in_the_right_direction() -> None:
    _, gradient, clipped = two_ratios(0.2, -0.2, "one_sided")
    assert gradient.tolist() == [0, 0]
    assert clipped == 1


def test_one_sided_clip_stops_only_the_member_that_is_far_enough() -> None:
    _, gradient, clipped = two_ratios(0.2, 0.2, "one_sided")
    assert gradient[0] == 0
    assert gradient[1] > 0
    assert clipped == 0.5


def test_no_clip_never_loses_the_gradient() -> None:
    for win, lose in itertools.product((-0.5, 0.0, 0.5), repeat=2):
        _, gradient, clipped = two_ratios(win, lose, "none")
        assert gradient[0] < 0 < gradient[1]
        assert clipped == 0


@pytest.mark.parametrize(("log_ratio", "clipped"), [(0.0953, 0.0), (0.0954, 1.0), (-0.1053, 0.0), (-0.1054, 1.0)])
def test_band_is_one_plus_and_minus_the_range_of_the_ratio(log_ratio: float, clipped: float) -> None:
    # log 1.1 = 0.09531, log 0.9 = -0.10536: a band of ratios, not of log-ratios.
    assert two_ratios(log_ratio, log_ratio, "two_sided")[2] == clipped


def test_margin_is_that_of_the_unclipped_ratios_without_gradient() -> None:
    log_ratio_R = torch.tensor([0.7, -0.4], requires_grad=True)
    result = pair_loss(
        log_ratio_R, torch.tensor([0]), torch.tensor([1]), torch.ones(1), beta=1, clip="two_sided", clip_range=0.1
    )
    assert result.margin_P.item() == pytest.approx(1.1)
    assert not result.margin_P.requires_grad
    assert not result.clipped_P.requires_grad
    assert result.loss_P.requires_grad


def test_huge_margins_give_a_finite_loss_and_gradient() -> None:
    for win, lose in ((1e4, -1e4), (-1e4, 1e4)):
        loss, gradient, _ = two_ratios(win, lose, "none")
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()
