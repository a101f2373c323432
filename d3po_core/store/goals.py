"""What a run set out to do, so that one that was killed and is started again ends where it would have."""

import json
from pathlib import Path

from d3po_core.store.files import atomic_path
from d3po_core.store.stages import last_finished_round

TARGET_FILE = "target.json"


def rounds_to_do(campaign: Path, rounds: int, run_id: str) -> list[int]:
    """Numbers of the rounds that a run has to finish.

    What a run set out to do is kept on disk until it ends. The same run again (a retry) has the same goal, whatever it
    reached before; so has another run that asks for as many rounds as an interrupted one: the same command, given
    again, ends where the first would have ended.

    Args:
        campaign: the campaign's folder.
        rounds: how many rounds the run was asked for, at least 1.
        run_id: identity of the run, the same when it is retried.
    """
    done = last_finished_round(campaign)
    goals = _goals(campaign)
    # Of runs that asked for as many rounds and did not end; the last of them may have been killed after its last round.
    newest = next(reversed(goals), None)
    open_goals = [g for run, g in goals.items() if not g.get("over") and (g["last"] > done or run == newest)]
    before = next((g for g in reversed(open_goals) if g["rounds"] == rounds), None)
    goal = goals.get(run_id) or before or {"last": max(done, 0) + rounds, "rounds": rounds}
    _write_goals(campaign, goals | {run_id: goal})
    return list(range(done + 1, goal["last"] + 1))


def end_run(campaign: Path, run_id: str) -> None:
    """Note that a run did all that it set out to do: the same command again is a new one.

    Goals of other runs that are reached by now are over: no other run takes them up. They are kept, since a run that
    sleeps, and that this one overtook, has nothing left to do when it wakes.
    """
    done = last_finished_round(campaign)
    others = {run: goal for run, goal in _goals(campaign).items() if run != run_id}
    _write_goals(campaign, {run: g | {"over": 1} if g["last"] <= done else g for run, g in others.items()})


def has_goal(campaign: Path, run_id: str) -> bool:
    """Whether a run has not ended that set out to do something."""
    return run_id in _goals(campaign)


def _goals(campaign: Path) -> dict[str, dict[str, int]]:
    """By run: up to which round it goes, and how many rounds it was asked for."""
    path = campaign / TARGET_FILE
    content = json.loads(path.read_text()) if path.exists() else {"goals": {}}
    if "goals" not in content:  # as the first version wrote it: one goal
        reached = content["last"] <= last_finished_round(campaign)
        return {} if reached else {content["run_id"]: {key: content[key] for key in ("last", "rounds")}}
    return dict(content["goals"])


def _write_goals(campaign: Path, goals: dict[str, dict[str, int]]) -> None:
    with atomic_path(campaign / TARGET_FILE) as temporary:
        temporary.write_text(json.dumps({"goals": goals}))
