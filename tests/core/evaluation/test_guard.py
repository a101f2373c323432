"""What the guard finds, and how seldom it does when nothing got worse."""

import numpy as np
import pytest

from d3po_core.config import GuardConfig
from d3po_core.evaluation.comparison import Comparison, compare_scores, fitted_champion
from d3po_core.evaluation.guard import findings_of
from d3po_core.records import DeriveRecord, EvaluateRecord, ScoreSummary, TrainRecord

PROMPTS = [f"p{n:02}" for n in range(18) for _ in range(8)]
TRAINED = TrainRecord(checkpoint="c", lora_sha256="s", num_updates=4, loss=0.7, margin=0, pair_accuracy=0.5, kl=0,
                      clip_fraction=None)  # fmt: skip


def evaluated(mean: float = 0.5, diversity: float | None = 0.3) -> EvaluateRecord:
    score = ScoreSummary(mean=mean, low=mean, high=mean)
    return EvaluateRecord(num_images=144, scores={"main": score}, grid="g", diversity=diversity)


def findings(
    against: dict[str, Comparison] | None = None, pairs: int = 9, trained: TrainRecord = TRAINED,
    round_evaluated: EvaluateRecord | None = None, config: GuardConfig | None = None,
) -> list[str]:  # fmt: skip
    derived = DeriveRecord(num_pairs=pairs, num_ties=28, mean_agreement=None)
    scores = {"main": against} if against else {}
    return findings_of(config or GuardConfig(), derived, trained, round_evaluated or evaluated(), evaluated(), scores)


def test_a_round_that_learned_is_fine() -> None:
    assert findings() == []


def test_a_judge_that_only_ties_is_found() -> None:
    (found,) = findings(pairs=0, trained=TRAINED.model_copy(update={"num_updates": 0}))
    assert found.startswith("no pairs to learn from, 28 ties")


def test_winners_and_losers_that_both_become_less_likely_are_found() -> None:
    def of(winner: float, loser: float, neutral: float = 1e-3) -> list[str]:
        measured = {"winner_error_after": winner, "loser_error_after": loser, "neutral_error_after": neutral}
        return findings(trained=TRAINED.model_copy(update=measured))

    (found,) = of(0.01, 0.02)
    assert found.startswith("winners became less likely too: their error rose by 0.01, the losers' by 0.02")
    assert of(-0.01, 0.02) == []  # what training is for
    assert of(1e-3, 1e-3) == []  # any move as far does that
    assert of(0.01, 0.02, neutral=0.02) == []


def test_groups_of_only_bad_images_can_teach_without_a_pair() -> None:
    assert findings(pairs=0) == []


def test_pairs_without_an_update_are_found() -> None:
    assert findings(trained=TRAINED.model_copy(update={"num_updates": 0})) == ["no update was made of 9 pairs"]


def test_equal_images_and_numbers_that_are_none_are_found() -> None:
    assert findings(round_evaluated=evaluated(diversity=0.0)) == ["all held-out images of a prompt are equal"]
    assert findings(round_evaluated=evaluated(float("nan"))) == ["held-out main is not a finite number"]


def campaign(seed: int, rounds: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """Rounds that are all as good as the base, each sharing most of its images with the one before."""
    drawn = np.random.default_rng(seed)
    chance_U = drawn.beta(2.4, 0.6, 18)[:, None]
    luck = drawn.random((18, 8))
    scores = []
    for _ in range(rounds + 1):
        again = drawn.random((18, 8)) < 0.1
        luck = np.where(again, drawn.random((18, 8)), luck)
        scores.append((luck < chance_U).ravel())
    return drawn, chance_U, np.array(scores, dtype=float)


def looked_at(scores_RI: np.ndarray, number: int) -> list[str]:
    before = scores_RI[:number]
    fitted_I = before[fitted_champion(before, PROMPTS), np.arange(scores_RI.shape[1])]
    return findings({
        "the round it started from": compare_scores(scores_RI[number], before[-1], PROMPTS),
        "the champion": compare_scores(scores_RI[number], fitted_I, PROMPTS),
    })  # fmt: skip


def test_rounds_that_are_all_equally_good_are_hardly_ever_flagged() -> None:
    """The whole simulation, 100 rounds, is tests/benchmarks/false_alarms.py; at 95 % a round in 30 was flagged."""
    flagged = [any(looked_at(campaign(seed, 25)[2], number) for number in range(12, 26)) for seed in range(25)]
    assert sum(flagged) <= 1


@pytest.mark.parametrize("share", [0.0, 0.55])
def test_a_true_fall_is_flagged(share: float) -> None:
    caught = 0
    for seed in range(20):
        drawn, chance_U, scores_RI = campaign(seed, 6)
        fallen = (drawn.random((18, 8)) < share * chance_U).ravel().astype(float)
        found = looked_at(np.vstack([scores_RI, fallen]), 7)
        caught += bool(found) and found[0].startswith("held-out main fell against the round it started from: -0.")
    assert caught >= 18


def test_a_fall_within_the_tolerance_is_not_flagged() -> None:
    higher = np.repeat(np.linspace(0.6, 0.8, 18), 8)
    lower = higher - np.repeat(np.linspace(0.02, 0.04, 18), 8)
    against = {"the champion": compare_scores(lower, higher, PROMPTS)}
    assert findings(against)
    assert not findings(against, config=GuardConfig(score_tolerance=0.05))
