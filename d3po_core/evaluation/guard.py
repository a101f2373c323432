"""Whether a round's checkpoint can be trusted: what a person would look at before the next round builds on it.

A fall of the held-out score is tested twice: against the round it started from, and against the champion, each prompt
by the champion that the other half of the prompts chose. Each test flags a round only when chance alone would look so
in fewer than ``ALARM`` of all cases (for one scorer; shared between several). In simulated campaigns of 100 rounds in
which nothing gets worse, at most some 5 % are ever flagged: ``tests/benchmarks/false_alarms.py``.
"""

import math
from collections.abc import Mapping

from d3po_core.config import GuardConfig
from d3po_core.evaluation.comparison import Comparison
from d3po_core.records import DeriveRecord, EvaluateRecord, TrainRecord

ALARM = 0.04 / 100  # one-sided, per test and round


def findings_of(
    config: GuardConfig,
    derived: DeriveRecord,
    trained: TrainRecord,
    evaluated: EvaluateRecord,
    base: EvaluateRecord,
    against: Mapping[str, Mapping[str, Comparison]],
) -> list[str]:
    """What is wrong with a round, a sentence each; nothing when it can be trusted.

    Args:
        config: the bounds.
        derived: the round's preferences.
        trained: what training said.
        evaluated: the round's held-out images.
        base: those of the base model.
        against: by scorer, unseen ones too, the round against each reference that is named.
    """
    found = [f"training ended early: {trained.failure}"] if trained.failure else []
    found += _nothing_learned(derived, trained, evaluated)
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
    if derived.num_pairs == 0:
        ties = f", {derived.num_ties} ties" if derived.num_ties else ""
        found.append(f"no pairs to learn from{ties}: judges who tell images apart, or larger groups, would give some")
    elif trained.num_updates == 0 and not trained.failure:
        found.append(f"no update was made of {derived.num_pairs} pairs")
    if evaluated.diversity == 0:
        found.append("all held-out images of a prompt are equal")
    odd = [scorer for scorer, score in evaluated.scores.items() if not math.isfinite(score.mean)]
    return found + [f"held-out {scorer} is not a finite number" for scorer in odd]


def _falls(config: GuardConfig, scorer: str, comparisons: Mapping[str, Comparison], num_scorers: int) -> list[str]:
    for name, comparison in comparisons.items():
        if comparison.chance_of_as_low(-config.score_tolerance) < ALARM / num_scorers:
            return [f"held-out {scorer} fell against {name}: {comparison.difference.signed}"]
    return []
