"""A finished round, and a finished run, in one line of a log: what a person wants to know first."""

from collections.abc import Sequence

from prefect.runtime import flow_run

from d3po_core.config import CampaignConfig
from d3po_core.records import GuardRecord, RoundRecord, ScoreSummary
from d3po_core.store.goals import last_round_of
from d3po_core.store.stages import finished_numbers, finished_round, read_record


def round_line(config: CampaignConfig, finished: RoundRecord) -> str:
    """Return a finished round's held-out score, verdict, champion and pairs, and how many rounds the run has."""
    guarded = read_record(config.folder, finished.round, "guard", GuardRecord)
    return told(finished, guarded, last_round_of(config.folder, str(flow_run.id)))


def told(finished: RoundRecord, guarded: GuardRecord, last: int | None) -> str:
    """Return the line of a round and its guard's record; ``last`` is the run's target round."""
    score = f"held-out {finished.eval_scorer} {_in_log(finished.score)}"
    if finished.round == 0:
        return f"base model: {score}"
    champion = "the new champion" if guarded.champion == finished.round else f"champion {_name(guarded.champion)}"
    verdict = "" if guarded.verdict == "ok" else f", {guarded.verdict}"
    pairs = f"{finished.num_pairs} pairs, {finished.num_ties} ties"
    of = f" of {last}" if last else ""
    return f"round {finished.round}{of}: {score}{verdict}, {champion}, {pairs}"


def campaign_line(config: CampaignConfig, numbers: Sequence[int]) -> str:
    """Return which rounds a run finished, and the campaign's score before and after."""
    if not numbers:
        return f"campaign {config.campaign}: no round was left to do"
    finished = finished_numbers(config.folder)
    first, last = (finished_round(config.folder, number) for number in (finished[0], finished[-1]))
    done = f"round {numbers[-1]}" if len(numbers) == 1 else f"rounds {numbers[0]} to {numbers[-1]}"
    return f"campaign {config.campaign}: {done} finished, held-out {first.score.mean:.3f} -> {last.score.mean:.3f}"


def _in_log(score: ScoreSummary) -> str:
    # Prefect's --watch takes a word in brackets for markup, and drops it.
    return str(score).replace("[too few to tell]", "(too few to tell)")


def _name(round_number: int) -> str:
    return f"round {round_number}" if round_number else "the base"
