"""The form that Prefect's page makes of the flow's parameters, and what a run is refused for."""

from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate

from d3po.flows.form import SHOWN
from d3po.flows.presets import presets
from d3po.flows.refusing import refused
from d3po.flows.round import d3po
from d3po_core.config import CampaignConfig


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return parameter_schema(d3po).model_dump()


def shown(properties: dict[str, Any], path: str = "") -> list[str]:
    """Dotted names of the form's fields, as the page orders them: by position."""
    found = []
    for name, field in sorted(properties.items(), key=lambda item: item[1]["position"]):
        inner = field.get("properties")
        found += shown(inner, f"{path}{name}.") if inner else [f"{path}{name}"]
    return found


def test_form_begins_with_rounds_and_shows_few_fields(schema: dict[str, Any]) -> None:
    assert shown(schema["properties"]) == ["rounds", *(f"config.{name}" for name in SHOWN)]


def test_form_has_no_defaults_that_would_be_sent_as_if_they_were_chosen(schema: dict[str, Any]) -> None:
    def defaults(field: dict[str, Any]) -> list[Any]:
        return [field.get("default"), *(d for inner in field.get("properties", {}).values() for d in defaults(inner))]

    assert set(defaults(schema["properties"]["config"])) == {None}
    assert "Default: 16" in schema["properties"]["config"]["properties"]["sample"]["properties"]["groups_per_round"][
        "description"
    ]  # fmt: skip
    assert CampaignConfig().sample.groups_per_round == 16


@pytest.mark.parametrize("name", presets())
def test_parameters_of_each_preset_are_taken(schema: dict[str, Any], name: str) -> None:
    assert validate({"rounds": 1, "config": presets()[name]}, schema, ignore_required=True) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train": {"learning_rat": 1}}, "'learning_rat' was unexpected"),
        ({"sample": {"guidance_scale": 0.5}}, "0.5 is less than the minimum of 1"),  # not shown, checked all the same
        ({"judge": {"people": {"mode": "pairs"}}}, "'pairs' is not one of"),
        ({"camp": "shapes"}, "'camp' was unexpected"),
    ],
)
def test_values_are_checked_against_the_whole_configuration(
    schema: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    errors = validate({"rounds": 1, "config": config}, schema, ignore_required=True)
    assert [said in error.message for error in errors] == [True]


def test_a_refused_run_has_ended_and_has_not_failed() -> None:
    state = refused("campaign 'x': the seed changed")
    assert state.is_final()
    assert not state.is_failed()
    assert not state.is_crashed()
    assert (state.name, state.message) == ("Refused", "campaign 'x': the seed changed")
