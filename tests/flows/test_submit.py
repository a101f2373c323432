"""`d3po submit` on a real Prefect server, and `d3po run` where people judge."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.callables import parameter_schema
from typer.testing import CliRunner

from d3po.flows.commands.line import app
from d3po.flows.presets import ENTRYPOINT, presets
from d3po.flows.round import d3po
from d3po_core.errors import D3POError


def refused(*words: str) -> str:
    done = CliRunner().invoke(app, [*words])
    assert isinstance(done.exception, D3POError), (done.output, done.exception)
    return str(done.exception)


@pytest.fixture
def client(prefect_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server that has the deployment `human`."""
    url = prefect_server["PREFECT_API_URL"]
    monkeypatch.setenv("PREFECT_API_URL", url)
    monkeypatch.setenv("D3PO_DATA", prefect_server["D3PO_DATA"])
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        flow = client.create_flow_from_name("d3po")
        client.create_deployment(
            flow, "human", entrypoint=ENTRYPOINT, parameters={"rounds": 1, "config": presets()["human"]},
            parameter_openapi_schema=parameter_schema(d3po).model_dump_for_openapi(), enforce_parameter_schema=True,
        )  # fmt: skip
        yield client


def test_a_run_gets_what_was_typed_and_the_deployment_keeps_the_rest(client: Any, tmp_path: Any) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("judge: {people: {mode: pair}}\nsample.group_size: 3\n")
    words = ["submit", "human", "--rounds", "2", "--campaign", "c", "--config", str(file), "--set"]
    done = CliRunner().invoke(app, [*words, "judge.scorers=brightness"])
    assert done.exit_code == 0, (done.output, done.exception)
    (run,) = [run for run in client.read_flow_runs() if str(run.id) in done.output]
    assert run.parameters == {
        "rounds": 2,
        "config": {
            "campaign": "c", "sample": {"group_size": 3},
            "judge": {"people": {"mode": "pair"}, "scorers": ["brightness"]},
        },
    }  # fmt: skip
    assert f"{os.environ['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/{run.id}" in done.output
    assert "d3po label --rater NAME" in done.output


def test_what_does_not_fit_is_refused_before_a_run_exists(client: Any) -> None:
    before = len(client.read_flow_runs())
    assert refused("submit", "humane").endswith("it has human")
    said = refused("submit", "human", "--set", "people.mode=pair")
    assert "people.mode is not a field" in said or "people is not a field; did you mean 'judge.people'?" in said
    assert "it must be 'pair', 'mark_bad', 'best' or 'rank'" in refused(
        "submit", "human", "--set", "judge.people.mode=x"
    )
    assert len(client.read_flow_runs()) == before


def test_without_a_server_the_next_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    assert refused("submit", "round").endswith("type: d3po up")


def test_a_terminal_refuses_a_campaign_that_waits_for_people_and_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    words = ["run", "human", "--set", "sample.group_size=3", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["d3po", *words])
    assert refused(*words).endswith(": d3po submit human --set sample.group_size=3 --rounds 2")
