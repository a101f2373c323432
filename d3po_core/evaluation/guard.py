"""Check a round's checkpoint for problems before the next round builds on it.

A fall of the held-out score is tested twice: against the round it started from, and against the champion that the other
half of the prompts chose. Each test flags a round only if chance alone gives such a fall in fewer than ``ALARM`` of
cases; several scorers share this level. Of simulated campaigns of 100 rounds in which nothing gets worse, at most some
5 % are ever flagged: ``tests/benchmarks/false_alarms.py``.
"""

import math
from collections.abc import Mapping

import numpy as np

from d3po_core.config import CampaignConfig, GuardConfig
from d3po_core.evaluation.comparison import (
    Comparison,
    HeldOut,
    champions,
    compare_scores,
    round_named,
)
from d3po_core.evaluation.halves import read_with_chosen
from d3po_core.intervals import units_of
from d3po_core.records import DeriveRecord, EvaluateRecord, GuardRecord, TrainRecord
from d3po_core.store.stages import read_record, start_of

VERDICTS = {"warn": "warned", "reject": "rejected", "stop": "stopped"}

DISPLACED = 2.0  # times what a random move as far would raise both errors by

ALARM = 0.04 / 100  # one-sided, per test and round


def findings_of(
    config: GuardConfig,
    derived: DeriveRecord,
    trained: TrainRecord,
    evaluated: EvaluateRecord,
    base: EvaluateRecord,
    against: Mapping[str, Mapping[str, Comparison]],
) -> list[str]:
    """Return one sentence per problem of a round; empty if it can be trusted.

    Args:
        config: the bounds.
        derived: the record of the round's preferences.
        trained: the training record.
        evaluated: the record of the round's held-out images.
        base: the same for the base model.
        against: by scorer, including unseen ones, the round against each named reference.
    """
    found = [f"training ended early: {trained.failure}"] if trained.failure else []
    found += _nothing_learned(derived, trained, evaluated)
    found += _displaced(trained)
    for scorer, comparisons in against.items():
        found += _falls(config, scorer, comparisons, len(against))
    if evaluated.diversity and base.diversity:
        share = evaluated.diversity / base.diversity
        if share < config.min_diversity:
            found.append(
                f"diversity within a prompt is {share:.0%} of the base model's, below {config.min_diversity:.0%}"
            )
    if config.max_drift is not None and evaluated.drift is not None and evaluated.drift > config.max_drift:
        found.append(f"drift from the base is {evaluated.drift:.3g} nats per element, above {config.max_drift:.3g}")
    if trained.clip_fraction is not None and trained.clip_fraction > config.max_clip_fraction:
        found.append(f"{trained.clip_fraction:.0%} of pairs are clipped, above {config.max_clip_fraction:.0%}")
    return found


def _nothing_learned(derived: DeriveRecord, trained: TrainRecord, evaluated: EvaluateRecord) -> list[str]:
    found = []
    if derived.num_pairs == 0 and trained.num_updates == 0:
        ties = f", {derived.num_ties} ties" if derived.num_ties else ""
        found.append(f"no pairs to learn from{ties}: judges who tell images apart, or larger groups, would give some")
    elif trained.num_updates == 0 and not trained.failure:
        found.append(f"no update was made of {derived.num_pairs} pairs")
    if evaluated.diversity == 0:
        found.append("all held-out images of a prompt are equal")
    odd = [scorer for scorer, score in evaluated.scores.items() if not math.isfinite(score.mean)]
    return found + [f"held-out {scorer} is not a finite number" for scorer in odd]


def _displaced(trained: TrainRecord) -> list[str]:
    """Find a round whose policy left winners and losers alike.

    A move in a random direction raises both errors by the neutral amount, so only a larger rise counts.
    """
    winner, loser, neutral = trained.winner_error_after, trained.loser_error_after, trained.neutral_error_after
    if winner is None or loser is None or neutral is None or min(winner, loser) <= DISPLACED * max(neutral, 0):
        return []
    return [
        f"winners became less likely too: their error rose by {winner:.3g}, the losers' by {loser:.3g}, and a random "
        f"move as far by {neutral:.3g} nats per element (likelihood displacement); lower train.learning_rate or beta, "
        "or see safeguard in docs/explanation/objectives.md"
    ]


def _falls(config: GuardConfig, scorer: str, comparisons: Mapping[str, Comparison], num_scorers: int) -> list[str]:
    for name, comparison in comparisons.items():
        if comparison.chance_of_as_low(-config.score_tolerance) < ALARM / num_scorers:
            return [f"held-out {scorer} fell against {name}: {comparison.difference.signed}"]
    return []


def judge_checkpoint(config: CampaignConfig, round_number: int) -> GuardRecord:
    """Return the guard's verdict on a round's checkpoint, and the checkpoint that the next round starts from.

    Args:
        config: the campaign's configuration.
        round_number: a round that is evaluated but not finished.

    Raises:
        D3POError: a needed record or table is missing or damaged.
    """
    folder = config.folder
    if round_number == 0:
        return GuardRecord(verdict="ok", findings=[], go_on_from=0, champion=0, win_rates={})
    champion = round_named(folder, "champion")  # of earlier rounds, since this one is not finished
    references = {"base": 0, "before": round_number - 1, "champion": champion}
    start = start_of(folder, round_number)
    scorer = config.evaluation_scorers[0]
    held_out, at, halves = read_with_chosen(folder, round_number, scorer, {*references.values(), start})
    scores_RI = held_out.scores[scorer]
    fitted_I = np.where(units_of(held_out.prompts)[0] % 2 == 0, at[halves[0]], at[halves[1]])
    findings = findings_of(
        config.guard,
        read_record(folder, round_number, "derive", DeriveRecord),
        read_record(folder, round_number, "train", TrainRecord),
        read_record(folder, round_number, "evaluate", EvaluateRecord),
        read_record(folder, 0, "evaluate", EvaluateRecord),
        _against_earlier(held_out, fitted_I, at[start]),
    )
    verdict = VERDICTS[config.guard.policy] if findings else "ok"
    refused = verdict in ("rejected", "stopped")
    if not refused and champions(scores_RI[[at[champion], -1]], held_out.prompts)[-1] == 1:
        champion = round_number
    return GuardRecord(
        verdict=verdict,
        findings=findings,
        go_on_from=champion if refused else round_number,
        champion=champion,
        win_rates={
            name: compare_scores(scores_RI[-1], scores_RI[at[number]], held_out.prompts).win_rate
            for name, number in references.items()
        },
    )


def _against_earlier(held_out: HeldOut, fitted: np.ndarray, start: int) -> dict[str, dict[str, Comparison]]:
    """Return the last row against the row it started from and against the champion, for each scorer.

    Args:
        held_out: the round in the last row, earlier ones before it.
        fitted: ``[I]``, for each image the row of the champion that the other half of the prompts chose.
        start: row of the round that the last one started from.
    """
    images_I = np.arange(len(held_out.prompts))
    references = {"the round it started from": lambda scores_RI: scores_RI[start],
                  "the champion": lambda scores_RI: scores_RI[fitted, images_I]}  # fmt: skip
    return {
        scorer: {
            name: compare_scores(scores_RI[-1], of(scores_RI), held_out.prompts) for name, of in references.items()
        }
        for scorer, scores_RI in held_out.scores.items()
    }
