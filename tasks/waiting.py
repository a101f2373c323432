"""Label: a round that people judge waits for them without a process or a GPU, and wakes when they are done.

Prefect suspends the run, and runs its whole flow again on resume; records on disk say what is finished. The cause of
the resume (the last judgement, an import, a person on Prefect's page, the deadline) makes no difference: the run counts
the judgements again, and goes back to sleep if it was woken too early.
"""

import contextlib
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import task
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.exceptions import NotPausedError, ObjectNotFound
from prefect.flow_runs import resume_flow_run
from prefect.runtime import deployment, flow_run
from prefect.states import State

from d3po.tasks import mirroring
from d3po.tasks.alive import revive
from d3po.tasks.announcing import announce, missing, page_url
from d3po.tasks.run_names import run_tags
from d3po.tasks.stage import STAGE_OPTIONS
from d3po.tasks.suspending import suspend
from d3po.tasks.tracking import delivery
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.paths import data_folder
from d3po_core.people.journal import export_judgements
from d3po_core.people.questions import label_progress
from d3po_core.people.tally import Progress
from d3po_core.records import LabelRecord
from d3po_core.store.campaign import round_config
from d3po_core.store.files import atomic_path
from d3po_core.store.stages import finish_stage, stage_path

WAKE = "wake/deadline"
FALLING_ASLEEP_SECONDS = 20  # from our last count of what is missing until Prefect shows the run as suspended


def wait_for_people(config: CampaignConfig, round_number: int) -> None:
    """Suspend the run until the round's judgements are in, then write them to the tables.

    With labeller 'proxy' it does nothing.

    Raises:
        D3POError: the deadline passed and the policy is to fail; or there is nothing to go on with; or the run has no
            deployment, so it cannot be suspended.
    """
    if config.judge.labeller == "proxy" or stage_path(config.folder, round_number, "label").exists():
        return
    waiting = _begin_waiting(config, round_number)
    while True:
        progress = label_progress(config, round_number)
        if ended := _how_it_ended(config, round_number, waiting, progress):
            break
        said = announce(config, round_number, waiting, progress)
        revive(UUID(str(flow_run.id)))  # Prefect cannot suspend a run that is marked as Crashed
        # Returns only when this key was answered; otherwise it raises, and the process ends.
        answer = suspend(said, key=f"labels-{round_number}-{waiting['attempt']}")
        if answer.go_on_with_what_is_there:
            ended = "asked"
            break
        waiting = _write_waiting(config, round_number, {**waiting, "attempt": waiting["attempt"] + 1})
    collect_judgements(config, round_number, ended)


@task(name="label", **STAGE_OPTIONS)
def collect_judgements(config: CampaignConfig, round_number: int, ended: str) -> LabelRecord:
    """Write the page's journal as tables, and record that the round is labelled.

    Raises:
        D3POError: people judged nothing, and the proxies are not to decide.
    """

    def collect() -> LabelRecord:
        progress = label_progress(config, round_number)
        if not progress.judgements and ended != "proxy" and config.judge.labeller == "human":
            raise D3POError(
                f"round {round_number} of campaign {config.campaign!r} has no judgement to go on with; "
                f"judge some ({page_url()} or d3po import), then run it again"
            )
        export_judgements(config.folder, round_number)
        since = datetime.fromisoformat(_read_waiting(config, round_number)["since"])
        return LabelRecord(
            ended=ended,
            groups_needed=progress.groups_needed,
            groups_done=progress.groups_done,
            num_judgements=progress.judgements,
            num_raters=progress.raters,
            waited_seconds=(datetime.now(UTC) - since).total_seconds(),
        )

    record = finish_stage(config.folder, round_number, "label", LabelRecord, collect)
    mirroring.deliver(config)
    delivery.deliver(config)
    return record


def require_deployment(config: CampaignConfig, round_numbers: list[int]) -> None:
    """Before sampling, refuse a run that would have to wait for people but cannot.

    Raises:
        D3POError: no deployment started the run, or the page cannot find the campaign's folder.
    """
    rounds = [n for n in round_numbers if n > 0]
    if config.judge.labeller == "proxy" or not rounds:
        return
    if config.folder.parent != data_folder() / "runs":
        raise D3POError(
            f"people judge this campaign and runs_dir is {config.runs_dir!r}, where neither the labelling page nor a "
            f"deadline looks; leave runs_dir out, or set D3PO_DATA (now {data_folder()}) for the servers and the run"
        )
    if deployment.id:
        return
    first_is_judged = (
        stage_path(config.folder, rounds[0], "judge").exists() and label_progress(config, rounds[0]).complete
    )
    if len(rounds) > 1 or not first_is_judged:
        raise D3POError(
            "people judge this campaign, so its run must be able to wait without a process, which needs a deployment; "
            "type: d3po up, then: d3po submit human (or your own deployment in prefect.yaml)"
        )


def require_no_sleeper(config: CampaignConfig, round_numbers: list[int]) -> None:
    """Refuse a run whose next round already waits for people in another, suspended run; hold the campaign's lock.

    Raises:
        D3POError: there is such a run.
    """
    for number in round_numbers[:2]:  # round 0 comes before the first round that people judge
        other = _read_waiting(config, number).get("flow_run_id")
        over = stage_path(config.folder, number, "label").exists()
        if other and other != str(flow_run.id) and not over and _is_suspended(other):
            raise D3POError(
                f"round {number} of campaign {config.campaign!r} waits for people in flow run {other} already; "
                "this run is not needed: judge, or resume or cancel the other one"
            )


def resume_waiting(config: CampaignConfig, round_number: int) -> str:
    """Wake the run that waits for the round's judgements, and return a line about it.

    Raises:
        D3POError: no run waits for this round, or judgements are still missing.
    """
    config = round_config(config.folder, round_number)  # the configuration that the round began with counts
    progress = label_progress(config, round_number)
    if not progress.complete:
        raise D3POError(
            f"round {round_number} of campaign {config.campaign!r} still waits: {missing(progress)} are missing; "
            "judge them, or resume the run in Prefect's page and say there that it is to go on"
        )
    run_id = _read_waiting(config, round_number).get("flow_run_id")
    awake = stage_path(config.folder, round_number, "label")  # the page may have woken the run a moment ago
    for _ in range(FALLING_ASLEEP_SECONDS):
        state = _state_of(run_id) if run_id else None
        if state is None or state.is_final() or state.is_paused() or awake.exists():
            break
        time.sleep(1)
    if run_id is None or state is None or (state.is_final() and not awake.exists()):
        raise D3POError(
            f"no run waits for round {round_number} of campaign {config.campaign!r}; the judgements are kept, "
            "and the campaign's next run goes on with them"
        )
    _resume(run_id)
    return f"round {round_number} of campaign {config.campaign}: flow run {run_id} goes on"


def _resume(run_id: str) -> None:
    """Wake a run; it is fine if somebody else woke it first."""
    with contextlib.suppress(NotPausedError):
        resume_flow_run(UUID(run_id), run_input={})


def wake(campaign: str, round_number: int) -> None:
    """Wake the run that waits for a round, if any, once people are done; safe to call again.

    Raises:
        D3POError: the run is about to suspend; call again in some seconds, or it would sleep on.
    """
    config = round_config(CampaignConfig(campaign=campaign).folder, round_number)
    run_id = _read_waiting(config, round_number).get("flow_run_id")
    if run_id is None or stage_path(config.folder, round_number, "label").exists():
        return  # the run counts the judgements before it sleeps; or it is already awake
    state = _state_of(run_id)
    if state is not None and state.is_paused():
        _resume(run_id)
    elif state is not None and not state.is_final():
        raise D3POError(f"the run of round {round_number} is {state.name}; waking it is tried again")


def _how_it_ended(config: CampaignConfig, round_number: int, waiting: dict[str, Any], progress: Progress) -> str | None:
    """The reason why waiting is over, None while it goes on."""
    if progress.complete:
        return "complete"
    if waiting["deadline"] is None or datetime.now(UTC) < datetime.fromisoformat(waiting["deadline"]):
        return None
    policy = config.judge.people.after_deadline
    if policy == "fail":
        raise D3POError(
            f"round {round_number} of campaign {config.campaign!r}: the deadline {waiting['deadline'][:16]} UTC passed "
            f"with {missing(progress)} missing; judge them and retry the run, or set judge.people.after_deadline"
        )
    return policy


def _begin_waiting(config: CampaignConfig, round_number: int) -> dict[str, Any]:
    """The wait's record on disk: its start, deadline and run, and how often the run went to sleep."""
    run_id, waiting = str(flow_run.id), _read_waiting(config, round_number)
    if waiting.get("flow_run_id") == run_id:
        return waiting
    now, hours = datetime.now(UTC), config.judge.people.deadline_hours
    fresh = {"since": now.isoformat(), "deadline": (now + timedelta(hours=hours)).isoformat() if hours else None}
    waiting = {**fresh, **waiting, "flow_run_id": run_id, "attempt": 0}
    _schedule_wake(config, round_number, waiting)  # first, so that a run that dies before the note schedules it again
    return _write_waiting(config, round_number, waiting)


def _schedule_wake(config: CampaignConfig, round_number: int, waiting: dict[str, Any]) -> None:
    """Schedule the run that wakes this one at its deadline; repeated calls schedule one."""
    deadline, run_id = waiting["deadline"], waiting["flow_run_id"]
    if deadline is None or not deployment.id:
        return
    try:
        run_deployment(
            WAKE, parameters={"campaign": config.campaign, "round_number": round_number, "flow_run_id": run_id},
            scheduled_time=datetime.fromisoformat(deadline), timeout=0, as_subflow=False, tags=run_tags(config)[:1],
            idempotency_key=f"{run_id}-{round_number}-{deadline}",
        )  # fmt: skip
    except ObjectNotFound:
        raise D3POError(
            f"judge.people.deadline_hours needs the deployment {WAKE}, which this server does not have; "
            "type: d3po up, or: prefect --no-prompt deploy --all"
        ) from None


def _is_suspended(run_id: str) -> bool:
    state = _state_of(run_id)
    return state is not None and state.is_paused()


def _state_of(run_id: str) -> State | None:
    with get_client(sync_client=True) as client:
        try:
            return client.read_flow_run(UUID(run_id)).state
        except ObjectNotFound:
            return None


def _waiting_path(config: CampaignConfig, round_number: int) -> Path:
    return stage_path(config.folder, round_number, "waiting")


def _read_waiting(config: CampaignConfig, round_number: int) -> dict[str, Any]:
    path = _waiting_path(config, round_number)
    return json.loads(path.read_text()) if path.exists() else {}


def _write_waiting(config: CampaignConfig, round_number: int, waiting: dict[str, Any]) -> dict[str, Any]:
    with atomic_path(_waiting_path(config, round_number)) as temporary:
        temporary.write_text(json.dumps(waiting, indent=1))
    return waiting
