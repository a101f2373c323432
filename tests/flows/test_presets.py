"""The deployments that ``d3po run`` knows, and the command that goes on with a campaign."""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from d3po.flows import planning
from d3po.flows.commands.line import app
from d3po.flows.presets import command_that_goes_on, deployment_config, over_deployment, presets
from d3po_core.config import CampaignConfig
from d3po_core.config_values import changed_fields, load_config
from d3po_core.errors import D3POError
from d3po_core.paths import PROJECT_ROOT


@pytest.mark.parametrize("name", ["nope", "deadline", "file"])
def test_only_deployments_of_rounds_are_run(name: str) -> None:
    with pytest.raises(
        D3POError, match=f"'{name}' is no deployment of rounds in prefect.yaml; it has round, published"
    ):
        deployment_config(name, None, [])


FLOWS = ["sd35-medium", "flux-dev", "flux2-klein", "qwen-image", "z-image", "sana"]


@pytest.mark.parametrize("name", ["sd15", "sdxl", *FLOWS])
def test_models_that_people_want_learn_what_people_prefer_on_the_card_that_there_is(name: str) -> None:
    config = deployment_config(name, None, [])
    assert config.judge.scorers == config.evaluation_scorers == ("pickscore",)
    assert {config.sample.prompts, config.evaluate.prompts} == {
        "data/prompts/everyday_train.txt", "data/prompts/everyday_eval.txt",
    }  # fmt: skip
    assert config.model.memory == "auto"


@pytest.mark.parametrize("name", ["sd15", "sdxl", *FLOWS])
def test_a_run_says_first_how_far_its_preset_was_verified(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(text: str) -> None:
        raise D3POError("far enough")

    monkeypatch.setattr(planning, "announce", lambda config, rounds: None)
    monkeypatch.setattr("d3po.flows.commands.run.live_line", begin)
    result = CliRunner().invoke(app, ["run", name])
    assert result.stdout.startswith("verified  ")
    assert "full curve" not in result.stdout  # nobody ran one


@pytest.mark.parametrize("name", FLOWS)
def test_presets_of_flow_models_fit_their_family(name: str) -> None:
    config = deployment_config(name, None, [])
    assert config.model.precision == ("fp16" if name == "sd35-medium" else "bf16")  # fp16 overflows in the others
    side = 1024 if name == "sana" else 512
    assert (config.sample.height, config.sample.width) == (side, side)
    assert side % {"flux2-klein": 16, "sana": 32}.get(name, 16) == 0
    assert (config.sample.guidance_scale == 1) == (name == "z-image")  # distilled without guidance


def test_the_smoke_test_is_the_preset_without_a_scorers_weights() -> None:
    smoke, real = (deployment_config(name, None, []) for name in ("sd15-smoke", "sd15"))
    changed = {field: now for field, _, now in changed_fields(real, smoke)}
    assert changed == {"campaign": "sd15-smoke", "judge.scorers": ["jpeg_incompressibility"]}


def meant(command: str) -> CampaignConfig:
    """The configuration that a printed command stands for."""
    words = shlex.split(command)
    assert words[:2] == ["d3po", "run"]
    values = {option: [v for o, v in pairwise(words) if o == option] for option in words}
    campaign = values.get("--campaign", [None])[0]
    return deployment_config(words[2], campaign, values.get("--set", []))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"campaign": "bright", "judge": {"scorers": ["brightness", "jpeg_compressibility"]}},
        {"campaign": "b", "runs_dir": "/a disk/of 'mine'", "train": {"learning_rate": 1e-5, "max_grad_norm": 0.5}},
        {"sample": {"prompts": "data/prompts/shapes_eval.txt"}, "runs_dir": "elsewhere/runs"},
        {"model": {"path": "123", "compile": True, "lora_alpha": 2.0}, "sample": {"prompts": "null"}, "seed": 4},
    ],
)
@pytest.mark.parametrize("name", ["round", "published", "sd15", "sd15-smoke"])
def test_printed_command_goes_on_with_the_same_configuration_from_any_folder(
    name: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT_ROOT)
    config = deployment_config(name, None, [f"{field}={json.dumps(value)}" for field, value in changes.items()])
    command = command_that_goes_on(config)
    monkeypatch.chdir(tmp_path)
    assert meant(command) == config


@pytest.mark.parametrize("name", ["human", "sd15-human"])
def test_guidelines_fit_every_way_of_judging(name: str) -> None:
    guideline = deployment_config(name, None, []).judge.people.guideline.lower()
    assert guideline
    assert not set(re.findall(r"[a-z]+", guideline)) & {"mark", "pick", "choose", "rank", "compare", "every", "each"}


def test_campaign_that_follows_a_preset_is_named_by_it_alone() -> None:
    assert command_that_goes_on(deployment_config("published", None, [])) == "d3po run published --rounds 3"
    assert command_that_goes_on(CampaignConfig(), 1) == "d3po run round --rounds 1"


def test_campaign_that_people_judge_goes_on_by_its_deployment() -> None:
    human = deployment_config("human", None, [])
    assert command_that_goes_on(human) == "d3po submit human --rounds 3"
    other = load_config({**human.model_dump(), "campaign": "hands"}, "test")
    assert command_that_goes_on(other) == "d3po submit human --campaign hands --rounds 3"


def test_what_a_run_is_given_is_merged_over_its_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client import orchestration

    @contextmanager
    def client(**_: Any) -> Iterator[Any]:
        known = SimpleNamespace(name="human", parameters={"config": presets()["human"]})
        yield SimpleNamespace(read_deployment=lambda _: known)

    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "00000000-0000-0000-0000-000000000001")
    monkeypatch.setattr(orchestration, "get_client", client)
    given = CampaignConfig.model_validate({"sample": {"group_size": 3}, "judge": {"people": {"mode": "pair"}}})
    merged = over_deployment(given)
    changed = {name: new for name, _, new in changed_fields(deployment_config("human", None, []), merged)}
    assert changed == {"sample.group_size": 3, "judge.people.mode": "pair"}
    assert merged.judge.labeller == "human"
    assert over_deployment(CampaignConfig()) == deployment_config("human", None, [])
