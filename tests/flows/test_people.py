"""Rounds that wait for people, on a real server and a real worker."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from d3po.flows import servers
from d3po.flows.loopback import without_proxy
from d3po.flows.server_programs import client_environment
from d3po.tasks.waiting import resume_waiting
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.judgement_files.importing import import_file
from d3po_core.paths import PROJECT_ROOT
from d3po_core.people.questions import groups_for_people
from d3po_core.store.campaign import round_config
from d3po_core.store.stages import finished_rounds, last_finished_round, stage_path
from d3po_core.store.tables import partition, read_rows
from tests.flows.real_servers import DATA, call, eventually, free_ports, get, login, post
from tests.flows.test_servers import home
from tests.flows.warm_runs import warm_runs

__all__ = ["home"]  # a fixture: this module has a data folder of its own
pytestmark = pytest.mark.timeout(420)

SMALL = {
    "sample": {"groups_per_round": 3, "group_size": 3, "num_steps": 3},
    "train": {"updates_per_round": 1},
    "evaluate": {"images_per_prompt": 1, "max_prompts": 3},
}


@pytest.fixture(scope="module")
def ports(home: Path) -> Iterator[dict[str, int]]:
    """Ports of servers that run; the runs of the deployment `human` are forked, as there are many."""
    ports = dict(zip(("prefect", "mlflow", "label"), free_ports(3), strict=True))
    servers.up(*ports.values())
    try:
        with warm_runs(home / "warm", client_environment(ports, ":".join(login(home)))) as command:
            human = f"/deployments/{get(ports, '/deployments/name/d3po/human')['id']}"
            call(ports, "PATCH", human, {"job_variables": {"command": command}})
            yield ports
    finally:
        servers.down()


def start(
    ports: dict[str, int], campaign: str, rounds: int = 1, labeller: str = "human", scorer: str = "prompt_alignment",
    **people: Any,
) -> str:  # fmt: skip
    """Start a run of the deployment `human`; gives its id."""
    judge = {"labeller": labeller, "scorers": [scorer], "people": people}
    config = {**SMALL, "campaign": campaign, "judge": judge}
    deployment = get(ports, "/deployments/name/d3po/human")["id"]
    body = {"parameters": {"config": config, "rounds": rounds}}
    return str(post(ports, f"/deployments/{deployment}/create_flow_run", body)["id"])


def state(ports: dict[str, int], run_id: str) -> str:
    return str(get(ports, f"/flow_runs/{run_id}")["state"]["name"])


def waits(ports: dict[str, int], run_id: str, campaign: Path, number: int) -> bool:
    asked = stage_path(campaign, number, "waiting").exists()
    return bool(asked and eventually(lambda: state(ports, run_id) == "Suspended", 10))


def mark(campaign: Path, number: int, groups: int, tmp_path: Path) -> Path:
    """A sheet in which the first image of each of some groups is good and the others bad."""
    path = tmp_path / f"{campaign.name}-{number}-{groups}.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["sample_id", "rating", "rater"])
        for row in read_rows(partition(campaign, "samples", number) / "part.parquet"):
            if int(row["group_id"].rpartition("g")[2]) < groups:
                writer.writerow([row["sample_id"], int(row["member"] == 0), "ann"])
    return path


def processes_of(run_id: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT__FLOW_RUN_ID") == run_id:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def resume(campaign: str, number: int, ports: dict[str, int], home: Path, labeller: str = "human") -> str:
    """As `d3po import --resume` does, against the tests' server; what it says."""
    url = f"http://127.0.0.1:{ports['prefect']}/api"
    here = {PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: ":".join(login(home))}
    with temporary_settings(here), pytest.MonkeyPatch.context() as patch:
        for name, value in without_proxy(os.environ).items():
            patch.setenv(name, value)
        try:
            return resume_waiting(CampaignConfig(campaign=campaign, judge={"labeller": labeller}), number)
        except D3POError as error:
            return str(error)


def test_two_rounds_wait_without_a_process_and_go_on_when_people_have_judged(
    ports: dict[str, int], home: Path, tmp_path: Path
) -> None:
    campaign = home / DATA / "runs" / "by-people"
    run_id = start(ports, campaign.name, rounds=2)
    assert eventually(lambda: waits(ports, run_id, campaign, 1), 120)
    assert eventually(lambda: not processes_of(run_id), 20), "a run that waits holds a process"
    artifacts = post(ports, "/artifacts/filter", {"artifacts": {"key": {"any_": ["d3po-by-people-label"]}}})
    assert "Open the labelling page" in artifacts[0]["data"]
    page = f"http://127.0.0.1:{ports['label']}"
    message = get(ports, f"/flow_runs/{run_id}")["state"]["message"]
    hint = "; nobody has a link yet, type: d3po label --rater NAME"
    assert message == f"round 1 waits for people at {page}: 3 of 3 groups to judge{hint}"

    # Woken too early it goes back to sleep, and says what is missing.
    import_file(campaign, mark(campaign, 1, 2, tmp_path))
    assert "1 of 3 groups" in resume(campaign.name, 1, ports, home)
    post(ports, f"/flow_runs/{run_id}/resume", {"run_input": {}})
    attempts = lambda: json.loads(stage_path(campaign, 1, "waiting").read_text())["attempt"]  # noqa: E731
    assert eventually(lambda: attempts() == 1, 60)
    assert eventually(lambda: waits(ports, run_id, campaign, 1), 60)

    # The last judgement wakes it; the second round waits again, with another key.
    import_file(campaign, mark(campaign, 1, 3, tmp_path))
    assert "goes on" in resume(campaign.name, 1, ports, home)
    assert eventually(lambda: waits(ports, run_id, campaign, 2), 120)
    assert last_finished_round(campaign) == 1
    pairs = read_rows(partition(campaign, "preferences", 1) / "part.parquet")
    assert {pair["winner_id"].rpartition("m")[2] for pair in pairs} == {"0"}
    assert len(pairs) == 3 * 2

    # A person may go on with what is there, by the form in Prefect's page or the call behind it.
    import_file(campaign, mark(campaign, 2, 1, tmp_path))
    assert eventually(lambda: waits(ports, run_id, campaign, 2), 60)
    post(ports, f"/flow_runs/{run_id}/resume", {"run_input": {"go_on_with_what_is_there": True}})
    assert eventually(lambda: state(ports, run_id) == "Completed", 120)
    assert [record.num_pairs for record in finished_rounds(campaign)] == [0, 6, 2]


def test_people_who_are_needed_are_an_event_to_which_an_automation_reacts(ports: dict[str, int], home: Path) -> None:
    examples = yaml.safe_load((PROJECT_ROOT / "docs" / "automation.yaml").read_text())["automations"]
    (example,) = [one for one in examples if one["trigger"]["expect"] == ["d3po.people.needed"]]
    post(ports, "/automations/", {**example, "enabled": True, "actions": [{"type": "do-nothing"}]})
    campaign = home / DATA / "runs" / "needs-people"
    run_id = start(ports, campaign.name)

    def events(name: str) -> list[dict[str, Any]]:
        return post(ports, "/events/filter", {"filter": {"event": {"name": [name]}}})["events"]

    def needed() -> list[dict[str, Any]]:
        found = events("d3po.people.needed")
        return [event for event in found if event["resource"]["prefect.resource.id"] == "d3po.campaign.needs-people"]

    (event,) = eventually(needed, 120)
    assert event["payload"]["page"] == f"http://127.0.0.1:{ports['label']}"
    assert (event["payload"]["round"], event["payload"]["groups_missing"]) == (1, 3)
    assert run_id in {one["prefect.resource.id"].rpartition(".")[2] for one in event["related"]}
    triggered = lambda: [e for e in events("prefect.automation.triggered") if example["name"] in str(e["resource"])]  # noqa: E731
    assert eventually(triggered, 60)
    assert eventually(lambda: waits(ports, run_id, campaign, 1), 60)
    post(ports, f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


def test_at_the_deadline_the_proxies_judge_if_the_policy_says_so(ports: dict[str, int], home: Path) -> None:
    campaign = home / DATA / "runs" / "late"
    run_id = start(ports, campaign.name, deadline_hours=4 / 3600, after_deadline="proxy")
    assert eventually(lambda: state(ports, run_id) == "Completed", 180)
    label = json.loads(stage_path(campaign, 1, "label").read_text())
    assert (label["ended"], label["groups_done"]) == ("proxy", 0)
    assert last_finished_round(campaign) == 1


def test_second_run_of_a_campaign_that_waits_is_refused(ports: dict[str, int], home: Path) -> None:
    campaign = home / DATA / "runs" / "waiting-twice"
    first = start(ports, campaign.name)
    assert eventually(lambda: waits(ports, first, campaign, 1), 120)
    second = start(ports, campaign.name)
    assert eventually(lambda: state(ports, second) == "Refused", 120)
    assert f"waits for people in flow run {first} already" in get(ports, f"/flow_runs/{second}")["state"]["message"]
    assert state(ports, first) == "Suspended"
    post(ports, f"/flow_runs/{first}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


def test_people_judge_the_uncertain_groups_and_proxies_the_others(
    ports: dict[str, int], home: Path, tmp_path: Path
) -> None:
    campaign = home / DATA / "runs" / "mixed"
    run_id = start(ports, campaign.name, labeller="mixed", scorer="brightness", share=0.3)
    assert eventually(lambda: waits(ports, run_id, campaign, 1), 120)
    config = round_config(campaign, 1)
    (asked,) = groups_for_people(config, 1)  # 0.3 of 3 groups, rounded up
    path = mark(campaign, 1, 3, tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(line for line in lines[1:] if line.startswith(f"{asked}-"))]) + "\n")
    import_file(campaign, path)
    assert "goes on" in resume(campaign.name, 1, ports, home, "mixed")
    assert eventually(lambda: state(ports, run_id) == "Completed", 120)
    pairs = read_rows(partition(campaign, "preferences", 1) / "part.parquet")
    of_people = [pair for pair in pairs if pair["group_id"] == asked]
    assert {pair["winner_id"] for pair in of_people} == {f"{asked}-m0"}
    assert len(of_people) == 2
    assert len(pairs) == 2 + 2 * 3  # brightness orders all three pairs of the other groups
