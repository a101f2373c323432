"""The target round of each run, so that a killed run that is started again ends at the same round."""

import json
from pathlib import Path

from d3po_core.errors import D3POError
from d3po_core.store.files import atomic_path
from d3po_core.store.stages import last_finished_round

TARGET_FILE = "target.json"
MOST_ROUNDS = 10_000


def rounds_to_do(campaign: Path, rounds: int, run_id: str) -> list[int]:
    """Return the numbers of the rounds that a run has to finish.

    A run's goal stays on disk until the run ends. A retry keeps the goal, whatever it reached before. A new run that
    asks for as many rounds as an interrupted one takes over its goal, so the same command ends at the same round.

    Args:
        campaign: the campaign's folder.
        rounds: how many rounds the run was asked for, at least 1.
        run_id: id of the run; a retry keeps it.

    Raises:
        D3POError: more than ``MOST_ROUNDS`` are asked for.
    """
    goals = _goals(campaign)
    goal = goals.get(run_id) or _next_goal(campaign, goals, rounds)
    _write_goals(campaign, goals | {run_id: goal})
    return _rounds_up_to(campaign, goal)


def rounds_ahead(campaign: Path, rounds: int) -> list[int]:
    """Return the rounds that a new run would finish, as ``rounds_to_do``; nothing is written."""
    return _rounds_up_to(campaign, _next_goal(campaign, _goals(campaign), rounds))


def _next_goal(campaign: Path, goals: dict[str, dict[str, int]], rounds: int) -> dict[str, int]:
    """Return a new run's goal: that of an interrupted run that was asked for as many rounds, else its own."""
    if rounds > MOST_ROUNDS:
        raise D3POError(f"rounds is {rounds}; expected at most {MOST_ROUNDS}, since a later run can add more")
    done = last_finished_round(campaign)
    # The newest run stays open even if it reached its goal: it may have been killed after its last round.
    newest = next(reversed(goals), None)
    open_goals = [g for run, g in goals.items() if not g.get("over") and (g["last"] > done or run == newest)]
    before = next((g for g in reversed(open_goals) if g["rounds"] == rounds), None)
    return before or {"last": max(done, 0) + rounds, "rounds": rounds}


def _rounds_up_to(campaign: Path, goal: dict[str, int]) -> list[int]:
    return list(range(last_finished_round(campaign) + 1, goal["last"] + 1))


def end_run(campaign: Path, run_id: str) -> None:
    """Note that a run reached its goal, so that the same command starts a new one.

    Mark other runs' goals that are reached by now as over, so that no other run takes them up. Keep them, so that an
    overtaken run that still sleeps finds nothing left to do when it wakes.
    """
    done = last_finished_round(campaign)
    others = {run: goal for run, goal in _goals(campaign).items() if run != run_id}
    _write_goals(campaign, {run: g | {"over": 1} if g["last"] <= done else g for run, g in others.items()})


def nothing_more_to_do(campaign: Path) -> bool:
    """Return whether the campaign has finished a round and no run wants another one."""
    done = last_finished_round(campaign)
    return done > 0 and not any(goal["last"] > done for goal in _goals(campaign).values() if not goal.get("over"))


def has_goal(campaign: Path, run_id: str) -> bool:
    """Return whether a run has a goal and has not ended."""
    return run_id in _goals(campaign)


def last_round_of(campaign: Path, run_id: str) -> int | None:
    """Return a run's target round, None if it has none."""
    goal = _goals(campaign).get(run_id)
    return goal["last"] if goal else None


def unfinished_goal(campaign: Path) -> dict[str, int] | None:
    """Return the newest goal that is not reached: its ``last`` round and the ``rounds`` asked for; None without one."""
    done = last_finished_round(campaign)
    open_goals = [goal for goal in _goals(campaign).values() if goal["last"] > done and not goal.get("over")]
    return open_goals[-1] if open_goals else None


def _goals(campaign: Path) -> dict[str, dict[str, int]]:
    """Return each run's goal: its last round, and how many rounds it was asked for."""
    path = campaign / TARGET_FILE
    content = json.loads(path.read_text()) if path.exists() else {"goals": {}}
    if "goals" not in content:  # the first version wrote a single goal
        reached = content["last"] <= last_finished_round(campaign)
        return {} if reached else {content["run_id"]: {key: content[key] for key in ("last", "rounds")}}
    return dict(content["goals"])


def _write_goals(campaign: Path, goals: dict[str, dict[str, int]]) -> None:
    with atomic_path(campaign / TARGET_FILE) as temporary:
        temporary.write_text(json.dumps({"goals": goals}))
