"""A report's answers from the facts: is it better, is it sane, which checkpoint to ship, why did it change."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from d3po_core.evaluation.comparison import (
    BETTER,
    UNCLEAR,
    WORSE,
    Comparison,
    compare_rows,
    compare_scores,
    fitted_champion,
)
from d3po_core.intervals import score_intervals
from d3po_core.people.human_win_rate import HumanWinRate
from d3po_core.records import DROWNED, ScoreSummary
from d3po_core.report.gather import Facts, Row
from d3po_core.report.pictures import RoundPictures

# Flag a campaign if diversity fell by this share, if the pairs fell below this share of the median round's, if more
# than this share of prompts is clearly worse (0.025 would be by chance), or if a round's KL is this many times the
# median.
DIVERSITY_LOSS, FEW_PAIRS, MANY_WORSE, JUMP = 0.2, 0.1, 0.1, 10


@dataclass(frozen=True)
class Check:
    """One thing that should hold; ``fine`` is None if it is for information only."""

    fine: bool | None
    title: str
    detail: str


@dataclass(frozen=True)
class Scored:
    """A scorer over all rounds: means with intervals, and each round against base, previous and champion."""

    name: str
    means: list[ScoreSummary]
    base: list[Comparison]
    previous: list[Comparison]
    champion: list[Comparison]


def scored(facts: Facts) -> list[Scored]:
    """Return every scorer's curve and paired comparisons.

    The first row of each comparison is the base against itself. ``champion`` is the reigning champion before each
    round, the one that the round had to beat.
    """
    rows = np.arange(len(facts.rounds))
    before = np.maximum(rows - 1, 0)
    reigning = np.array([0, *facts.reigns[:-1]])
    prompts = facts.held_out.prompts
    return [
        Scored(
            name,
            score_intervals(scores, prompts),
            *(compare_rows(scores, scores[others], prompts) for others in (np.zeros_like(rows), before, reigning)),
        )
        for name, scores in facts.held_out.scores.items()
    ]


def label(facts: Facts, position: int) -> str:
    """Return ``base``, or the round such as ``round 12``."""
    number = facts.rounds[position]["round"]
    return f"round {number}" if number else "base"


def is_it_better(facts: Facts, scorers: list[Scored]) -> Row:
    """Compare the champion with the base on the first scorer.

    Each prompt is scored by a champion that was chosen without that prompt.
    """
    first, champion = scorers[0], facts.champion
    scores = facts.held_out.scores[first.name]
    fitted_I = fitted_champion(scores[facts.trusted], facts.held_out.prompts)
    fitted = scores[facts.trusted][fitted_I, np.arange(scores.shape[1])]
    against = compare_scores(fitted, scores[0], facts.held_out.prompts)
    if champion == 0:
        answer = "Not yet" if len(facts.rounds) > 1 else "Nothing to compare yet"
        return {"answer": answer, "tone": "unclear", "against": None}
    answer = {BETTER: "Yes", UNCLEAR: "Not clearly", WORSE: "No"}[against.verdict]
    tone = {BETTER: "good", UNCLEAR: "unclear", WORSE: "bad"}[against.verdict]
    return {
        "answer": answer,
        "tone": tone,
        "against": against,
        "mean": float(score_intervals(fitted[None], facts.held_out.prompts)[0].mean),
    }


def pairings(facts: Facts, one: Scored) -> list[Row]:
    """Compare the champion and the latest round with the base, the round before and the champion before."""
    rows: list[Row] = []
    for position in dict.fromkeys((facts.champion, len(facts.rounds) - 1)):
        if position == 0:
            continue
        against = (
            ("", 0, one.base),
            ("the round before", position - 1, one.previous),
            ("champion until then", facts.reigns[position - 1], one.champion),
        )
        for other in dict.fromkeys(other for _, other, _ in against):
            words = [word for word, same, _ in against if same == other and word]
            rows.append(
                {
                    "checkpoint": label(facts, position) + (", champion" if position == facts.champion else ""),
                    "against": ", ".join([label(facts, other), *words]),
                    "comparison": next(found[position] for _, same, found in against if same == other),
                }
            )
    return rows


def by_prompt(facts: Facts) -> list[Row]:
    """Return each prompt's mean of the first scorer at the base and the champion, largest gain first.

    The verdict ``better`` or ``worse`` comes from the prompt's own images.
    """
    scores = next(iter(facts.held_out.scores.values()))[[0, facts.champion]]
    prompts = np.asarray(facts.held_out.prompts, dtype=object)
    rows = []
    for prompt in dict.fromkeys(facts.held_out.prompts):
        base, champion = scores[:, prompts == prompt]
        found = compare_scores(champion, base, [prompt] * len(base))
        rows.append(
            {"prompt": prompt, "base": float(base.mean()), "champion": float(champion.mean()),
             "change": found.difference.mean, "verdict": found.verdict}
        )  # fmt: skip
    return sorted(rows, key=lambda row: (-row["change"], row["prompt"]))


def checks(facts: Facts, scorers: list[Scored], pictures: list[RoundPictures], prompts: list[Row]) -> list[Check]:
    """Return the checks that a careful reader would make before shipping the champion."""
    if len(facts.rounds) < 2:
        return [Check(None, "Only the base is evaluated", "Checks begin with the first round of training.")]
    found = [
        _latest(facts, scorers[0]),
        *(_other_scorer(facts, other) for other in scorers[1:]),
        _prompts(prompts),
        _diversity(facts, pictures),
        _pairs(facts.rounds[1:]),
        _trained(facts.rounds),
        _jumps(facts.training),
        _clipping(facts.rounds[-1]),
        _drowned(facts.training),
        _people(facts.crossing_counts),
        _preferred(facts.champion_preferred),
        _same_config(facts.config_changes),
    ]
    return sorted((check for check in found if check), key=lambda check: {False: 0, None: 1, True: 2}[check.fine])


def _latest(facts: Facts, first: Scored) -> Check:
    scores = facts.held_out.scores[first.name]
    against = compare_scores(scores[-1], scores[facts.champion], facts.held_out.prompts)
    if facts.champion == len(facts.rounds) - 1:
        return Check(True, "The latest round is the champion", "Training has not passed its best.")
    text = f"{signed(against.difference)} against {label(facts, facts.champion)}: {against.verdict}."
    return Check(against.verdict != WORSE, "The latest round keeps what the champion reached", text)


def _other_scorer(facts: Facts, other: Scored) -> Check:
    against = other.base[facts.champion]
    text = f"{signed(against.difference)} against base: {against.verdict}."
    return Check(against.verdict != WORSE, f"{other.name} did not fall", text)


def _prompts(prompts: list[Row]) -> Check:
    lower, worse = [row for row in prompts if row["change"] < 0], [row for row in prompts if row["verdict"] == WORSE]
    text = f"{len(lower)} of {len(prompts)} held-out prompts score lower than at the base, {len(worse)} of them clearly"
    if lower:
        text += f"; worst: “{lower[-1]['prompt']}” ({number(lower[-1]['base'])} to {number(lower[-1]['champion'])})"
    return Check(len(worse) <= MANY_WORSE * len(prompts), "Few prompts got worse", text + ".")


def _diversity(facts: Facts, pictures: list[RoundPictures]) -> Check | None:
    base, champion = pictures[0].diversity, pictures[facts.champion].diversity
    shared = [prompt for prompt in base if prompt in champion]
    before = np.array([base[prompt] for prompt in shared])
    if not shared or before.mean() == 0:
        return None
    after = np.array([champion[prompt] for prompt in shared])
    change = compare_scores(after, before, shared).difference
    lost = change.mean < -DIVERSITY_LOSS * before.mean() and change.high < 0
    text = (
        f"Images of a prompt differ by {after.mean():.3f} of full scale per pixel, at the base by {before.mean():.3f} "
        f"({change.mean / before.mean():+.0%}).".replace("-", "\N{MINUS SIGN}")
    )
    return Check(not lost, "Images of a prompt stay diverse", text)


def _pairs(rounds: list[Row]) -> Check:
    counts = [row["num_pairs"] for row in rounds]
    judged = counts[-1] + rounds[-1]["num_ties"]
    text = f"The latest round decided {counts[-1]} of {judged} judged pairs; the median round: {np.median(counts):.0f}."
    empty = sum(count == 0 for count in counts)
    if empty:
        text += f" {empty} of {len(counts)} rounds had no pair at all and trained nothing."
    few = counts[-1] < FEW_PAIRS * np.median(counts)
    return Check(not few and not empty, "There are pairs to learn from", text)


def _trained(rounds: list[Row]) -> Check:
    hashes = [row["lora_sha256"] for row in rounds]
    same = [rounds[i]["round"] for i in range(1, len(rounds)) if hashes[i] and hashes[i] == hashes[i - 1]]
    text = (
        "Each checkpoint differs from the one before." if not same else f"Unchanged weights in rounds {listed(same)}."
    )
    return Check(not same, "Every round changed the weights", text)


_JUMPS = "The KL per round stays similar"


def _jumps(training: list[Row]) -> Check | None:
    training = [row for row in training if row["kl_after"] is not None]  # not measured, or from an older version
    if not training:
        return None
    kl = np.array([row["kl_after"] for row in training])
    median, most = number(float(np.median(kl))), number(float(kl.max()))
    wild = [row["round"] for row in training if row["kl_after"] > JUMP * np.median(kl)]
    if not wild or len(training) < 3:
        return Check(True, _JUMPS, f"No round is above {JUMP} times the median, {median} nats per element and step.")
    text = (
        f"It was more than {JUMP} times its median ({median}) in round{'s' if len(wild) > 1 else ''} {listed(wild)}, "
    )
    text += f"at most {most} nats per element and step."
    if wild[-1] == training[-1]["round"]:
        return Check(False, _JUMPS, text)
    return Check(None, "The KL jumped in a round and came back", text)


def _drowned(training: list[Row]) -> Check | None:
    if not training or training[-1]["drowned"] is None:
        return None
    share = training[-1]["drowned"]
    text = f"In the latest round {share:.0%} of the trained weights had gradients below train.adam_eps."
    return Check(share <= DROWNED, "Gradients are large enough for the optimizer", text)


def _clipping(last: Row) -> Check | None:
    if last["clip_fraction"] is None:
        return None
    share = last["clip_fraction"]
    return Check(share <= 0.5, "The clamp lets most steps through", f"{share:.0%} clamped in the latest round.")


def _people(counts: list[Row]) -> Check | None:
    agree, disagree = (sum(row[what] for row in counts) for what in ("agree", "disagree"))
    if not agree + disagree:
        return None
    share = agree / (agree + disagree)
    text = f"People and proxies agree on {share:.0%} of the {agree + disagree} pairs that both decided."
    return Check(share >= 0.6, "People and proxies agree", text)


def _preferred(rate: HumanWinRate | None) -> Check | None:
    if rate is None:
        return None
    text = f"People chose the champion in {number(rate.win_rate.mean)} {interval(rate.win_rate)} of "
    text += f"{rate.num_pairs} blind pairs, ties counted half: {rate.verdict}."
    return Check(rate.verdict != WORSE, "People do not prefer the base", text)


def _same_config(changes: list[Row]) -> Check:
    if not changes:
        return Check(True, "One configuration throughout", "No field changed between rounds.")
    rounds = listed(sorted({change["round"] for change in changes}))
    return Check(None, "The configuration changed", f"In rounds {rounds}; the changes are listed below.")


def reasons(facts: Facts, first: Scored, prompts: list[Row]) -> tuple[str, list[str]]:
    """Return what moved the first scorer's curve: a headline, then pairs, prompts, the largest steps, changed fields.

    Args:
        facts: the campaign.
        first: the first scorer's comparisons.
        prompts: from ``by_prompt``.
    """
    if len(facts.rounds) < 2:
        return "Nothing has trained yet", []
    trained = facts.rounds[1:]
    pairs, images = (sum(row[what] for row in trained) for what in ("num_pairs", "num_samples"))
    source = f"{pairs:,} pair{'s' if pairs != 1 else ''}"
    texts = [f"{source} came from {images:,} images in {len(trained)} round{'s' if len(trained) > 1 else ''}."]
    texts += _moved_prompts(prompts) if facts.champion else []
    steps = [step.difference.mean for step in first.previous[1:]]
    for wanted, row in (("gain", int(np.argmax(steps)) + 1), ("loss", int(np.argmin(steps)) + 1)):
        step = first.previous[row]
        if step.difference.mean * (1 if wanted == "gain" else -1) > 0:
            texts.append(f"Largest {wanted}: {label(facts, row)}, {signed(step.difference)}, {step.verdict}.")
    texts += [
        f"Round {change['round']}: {change['field']} {change['before']} became {change['after']}."
        for change in facts.config_changes[:5]
    ]
    learned = [row["pair_accuracy_after"] for row in facts.training if row["pair_accuracy_after"] is not None]
    if not learned:  # of an earlier version, or no round had pairs
        return f"It learned from {source}", texts
    return f"After a round, it prefers the winner in {np.mean(learned):.0%} of that round's pairs and steps", texts


def _moved_prompts(prompts: list[Row]) -> list[str]:
    """Return which prompts gained and lost most between base and champion."""
    texts = []
    for what, rows in (("gained", prompts[:2]), ("lost", prompts[:-3:-1])):
        moved = [row for row in rows if row["change"] * (1 if what == "gained" else -1) > 0]
        told = [f"“{row['prompt']}” ({number(row['base'])} to {number(row['champion'])})" for row in moved]
        texts += [f"Prompts that {what} most: {', '.join(told)}."] if told else []
    return texts


def number(value: float, sign: str = "") -> str:
    """Return a number with three decimals, or with two digits if it is too small or too large for that."""
    plain = value == 0 or 0.001 <= abs(value) < 1e5
    text = f"{value:{sign}.3f}" if plain else f"{value:{sign}.1e}"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(summary: ScoreSummary) -> str:
    """Return a difference with its sign and interval."""
    return f"{number(summary.mean, '+')} {interval(summary, '+')}"


def interval(summary: ScoreSummary, sign: str = "") -> str:
    """Return ``[low, high]``, or that there are too few to tell."""
    if None in summary.ends:
        return "[too few to tell]"
    return f"[{number(summary.low, sign)}, {number(summary.high, sign)}]"


def listed(numbers: list[Any], most: int = 8) -> str:
    """Return the first few numbers as text, with how many more there are."""
    text = ", ".join(map(str, numbers[:most]))
    return text if len(numbers) <= most else f"{text} and {len(numbers) - most} more"
