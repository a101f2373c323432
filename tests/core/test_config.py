"""The configuration: what is refused and how it is said, and what identifies it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.config import PUBLISHED, CampaignConfig
from d3po_core.config_values import changed_fields, load_config, merge
from d3po_core.errors import D3POError
from d3po_core.paths import PROJECT_ROOT, data_folder, resolve_path
from d3po_core.store.campaign import campaign_named
from d3po_core.training.optimizer import check_beta
from d3po_core.training.trainer import plan_updates


def explain(values: Any) -> str:
    with pytest.raises(D3POError) as caught:
        load_config(values, "my.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "name", "nearest"),
    [
        ({"campain": "x"}, "campain", "campaign"),
        ({"train": {"learning_rat": 1e-3}}, "train.learning_rat", "train.learning_rate"),
        ({"sample": {"guidence_scale": 3}}, "sample.guidence_scale", "sample.guidance_scale"),
        ({"judge": {"scorer": ["brightness"]}}, "judge.scorer", "judge.scorers"),
        ({"trian": {}}, "trian", "train"),
        ({"learning_rate": 1e-3}, "learning_rate", "train.learning_rate"),
        ({"lerning_rate": 1e-3}, "lerning_rate", "train.learning_rate"),
        ({"judge": {"mode": "pair"}}, "judge.mode", "judge.people.mode"),
    ],
)
def test_unknown_field_is_named_with_the_nearest(values: dict[str, Any], name: str, nearest: str) -> None:
    message = explain(values)
    assert message.startswith(f"my.yaml: {name} is not a field")
    assert f"did you mean '{nearest}'?" in message


def test_a_name_that_several_sections_have_suggests_all_of_them() -> None:
    assert explain({"prompts": "a.txt"}).endswith("did you mean 'sample.prompts' or 'evaluate.prompts'?")


def test_names_may_be_one_text() -> None:
    config = load_config(
        {"judge": {"scorers": "brightness, jpeg_compressibility"}, "model": {"lora_targets": "q"}}, "a"
    )
    assert config == load_config(
        {"judge": {"scorers": ["brightness", "jpeg_compressibility"]}, "model": {"lora_targets": ["q"]}}, "b"
    )
    assert explain({"judge": {"scorers": ""}}) == "my.yaml: judge.scorers is []: give at least one"
    assert explain({"judge": {"scorers": 3}}) == "my.yaml: judge.scorers is 3: write a list, such as [a, b]"


def test_unknown_field_without_a_neighbour_lists_the_fields() -> None:
    message = explain({"judge": {"zzz": 1}})
    assert all(field in message for field in ("judge.zzz", "scorers", "combine", "pairs"))


@pytest.mark.parametrize(
    ("values", "name", "found"),
    [
        ({"sample": {"group_size": 1}}, "sample.group_size", "1"),
        ({"sample": {"eta": 0}}, "sample.eta", "0"),
        ({"sample": {"eta": 1.5}}, "sample.eta", "1.5"),
        ({"sample": {"guidance_scale": 0.5}}, "sample.guidance_scale", "0.5"),
        ({"sample": {"num_steps": "ten"}}, "sample.num_steps", "'ten'"),
        ({"sample": {"latent_dtype": "bfloat16"}}, "sample.latent_dtype", "'bfloat16'"),
        ({"train": {"beta": 0}}, "train.beta", "0"),
        ({"train": {"beta": float("inf")}}, "train.beta", "inf"),
        ({"train": {"clip": "both"}}, "train.clip", "'both'"),
        ({"train": {"clip_range": 1}}, "train.clip_range", "1"),
        ({"train": {"adam_betas": [0.9]}}, "train.adam_betas", "[0.9]"),
        ({"judge": {"scorers": []}}, "judge.scorers", "[]"),
        ({"seed": -1}, "seed", "-1"),
        ({"sample": 5}, "sample", "5"),
        ({"campaign": "../up"}, "campaign", "'../up'"),
        ({"campaign": ""}, "campaign", "''"),
    ],
)
def test_value_out_of_bounds_is_named_with_what_was_found(values: dict[str, Any], name: str, found: str) -> None:
    message = explain(values)
    assert f"{name} is {found}" in message


def test_all_wrong_fields_are_listed_at_once() -> None:
    message = explain({"seed": -1, "train": {"beta": -2, "betta": 1}, "sample": {"group_size": 0}})
    assert all(name in message for name in ("seed", "train.beta is -2", "train.betta", "sample.group_size"))


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_configuration_that_is_no_mapping_is_a_one_line_error(values: Any) -> None:
    assert explain(values).startswith("my.yaml: config is")


@pytest.mark.parametrize(("updates", "epochs"), [(3, 2), (0, 1), (-4, 2)])
def test_updates_must_fill_epochs(updates: int, epochs: int) -> None:
    message = explain({"train": {"updates_per_round": updates, "epochs": epochs}})
    assert f"updates_per_round is {updates}" in message
    assert "positive multiple of epochs" in message


def test_word_that_is_no_number_of_updates_names_the_field_itself() -> None:
    message = explain({"train": {"updates_per_round": "many"}})
    assert "train.updates_per_round is 'many'" in message


def test_configuration_cannot_be_changed_after_it_was_checked() -> None:
    config = CampaignConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.train.beta = 1.0  # type: ignore[misc]


def test_digest_is_the_same_in_any_order_and_any_process() -> None:
    first = load_config({"seed": 3, "train": {"beta": 2.0, "epochs": 2}}, "a")
    second = load_config({"train": {"epochs": 2, "beta": 2}, "seed": 3}, "b")
    assert first.sha256() == second.sha256()
    code = (
        "from d3po_core.config_values import load_config;"
        "print(load_config({'seed': 3, 'train': {'beta': 2.0, 'epochs': 2}}, 'c').sha256())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT_ROOT)
    assert other.stdout.strip() == first.sha256()


@given(st.integers(0, 2**31 - 1), st.floats(1e-6, 1e6))
def test_digest_survives_json_and_differs_for_every_change(seed: int, beta: float) -> None:
    config = load_config({"seed": seed, "train": {"beta": beta}}, "a")
    assert CampaignConfig.model_validate_json(config.model_dump_json()).sha256() == config.sha256()
    other = load_config({"seed": seed, "train": {"beta": beta * 2}}, "b")
    assert other.sha256() != config.sha256()
    assert changed_fields(config, other) == [("train.beta", beta, beta * 2)]


def test_merge_lets_the_overriding_leaves_win() -> None:
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert merge(base, {"b": {"d": {"e": 4}, "f": 5}}) == {"a": 1, "b": {"c": 2, "d": {"e": 4}, "f": 5}}
    assert base == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert merge(base, {"b": 7}) == {"a": 1, "b": 7}


def test_published_preset_is_valid_and_turns_every_switch() -> None:
    train = load_config(PUBLISHED, "PUBLISHED").train
    assert (train.reference, train.clip, train.clip_range) == ("base", "two_sided", 0.1)
    assert (train.log_prob, train.timestep_weighting, train.updates_per_round) == ("mean", "none", "one_per_group")
    assert train.beta == 0.1


def test_published_deployment_has_the_switches_of_the_preset() -> None:
    deployments = yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text())["deployments"]
    (published,) = (deployment for deployment in deployments if deployment["name"] == "published")
    values = published["parameters"]["config"]
    deployed = load_config(values, "prefect.yaml")
    for section, switches in PUBLISHED.items():
        for name, value in switches.items():
            assert getattr(getattr(deployed, section), name) == value, f"{section}.{name}"
            assert values[section][name] == value, f"{section}.{name} is not said in prefect.yaml"


def test_every_deployment_is_a_valid_configuration() -> None:
    for deployment in yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text())["deployments"]:
        load_config(deployment.get("parameters", {}).get("config", {}), deployment["name"])


def test_relative_paths_start_at_the_project_and_not_at_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("data/prompts") == PROJECT_ROOT / "data" / "prompts"
    assert resolve_path(str(tmp_path)) == tmp_path.resolve()
    assert CampaignConfig(runs_dir=str(tmp_path), campaign="a").folder == tmp_path.resolve() / "a"
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "elsewhere"))
    assert data_folder() == (tmp_path / "elsewhere").resolve()
    assert CampaignConfig(campaign="b").folder == (tmp_path / "elsewhere" / "runs" / "b").resolve()


def test_evaluation_uses_the_judges_scorers_unless_told() -> None:
    assert load_config({"judge": {"scorers": ["brightness"]}}, "a").evaluation_scorers == ("brightness",)
    told = {"judge": {"scorers": ["brightness"]}, "evaluate": {"scorers": ["prompt_alignment"]}}
    assert load_config(told, "b").evaluation_scorers == ("prompt_alignment",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"judge": {"scorer_weights": {"prompt_alignment": 2}}},
            "judge.scorer_weights is {'prompt_alignment': 2.0} but judge.combine is 'pareto'; "
            "set judge.combine to 'weighted'",
        ),
        (
            {"judge": {"combine": "weighted", "scorers": ["brightness"], "scorer_weights": {"brightnes": 2}}},
            "judge.scorer_weights names 'brightnes'; expected one of judge.scorers: brightness",
        ),
        (
            {"judge": {"combine": "weighted", "scorer_weights": {"prompt_alignment": 0}}},
            "judge.scorer_weights.prompt_alignment is 0: it must be greater than 0",
        ),
        (
            {"scoring": {"models": {"pikscore": "a/b"}}, "judge": {"scorers": ["pickscore", "brightness"]}},
            "scoring.models names 'pikscore'; expected one of the scorers that judge or evaluate: pickscore",
        ),
        (
            {"scoring": {"models": {"my taste": "http://host/"}}, "judge": {"scorers": ["my taste"]}},
            "scoring.models names 'my taste'; expected up to 64 letters, digits",
        ),
        ({"scoring": {"tries": 0}}, "scoring.tries is 0"),
        ({"scoring": {"models": {"brightness": 3}}}, "scoring.models.brightness is 3"),
    ],
)
def test_scorers_weights_and_places_that_fit_nothing_are_named(values: dict[str, Any], message: str) -> None:
    assert message in explain(values)


def test_scorers_that_only_evaluate_may_have_a_place_too() -> None:
    values = {"scoring": {"models": {"taste": "http://host/"}}, "evaluate": {"unseen": ["taste"]}}
    assert load_config(values, "a").scoring.models == {"taste": "http://host/"}


def test_entries_of_mappings_that_came_and_went_are_changes() -> None:
    old, new = (
        load_config({"judge": {"combine": "weighted", "scorers": ["a:f", "b:f"], "scorer_weights": weights}}, "a")
        for weights in ({"a:f": 2, "b:f": 3}, {"b:f": 4})
    )
    expected = [("judge.scorer_weights.a:f", 2.0, None), ("judge.scorer_weights.b:f", 3.0, 4.0)]
    assert changed_fields(old, new) == expected
    assert changed_fields(new, old) == [(name, b, a) for name, a, b in reversed(expected)]


def test_presets_for_real_models_have_the_papers_scale_and_the_published_number_of_updates() -> None:
    deployments = yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text())["deployments"]
    configs = [load_config((d.get("parameters") or {}).get("config") or {}, d["name"]) for d in deployments]
    real = [config for config in configs if config.model.path != CampaignConfig().model.path]
    assert len(real) == 10
    for config in real:
        train = config.train
        # The paper's 0.1; what Diffusion-DPO published comes to 0.1 to 0.3 (docs/presets.md).
        assert (train.log_prob, train.clip) == ("sum", "none")
        assert 0.05 <= train.beta <= 1
        assert train.adam_eps <= 1e-12
        updates = len(plan_updates(config.sample.groups_per_round, train, 0))
        assert updates / config.sample.images_per_round >= 0.5  # the published code: one for two images


@pytest.mark.parametrize(
    ("values", "beta"),
    [({}, 300), ({"log_prob": "mean"}, 300), ({"log_prob": "sum"}, 0.1), ({"log_prob": "sum", "beta": 2.0}, 2)],
)
def test_beta_that_is_not_given_is_of_the_scale_of_log_prob(values: dict[str, Any], beta: float) -> None:
    config = load_config({"train": values}, "test")
    assert config.train.beta == beta
    assert load_config(config.model_dump(), "test") == config


def test_beta_of_the_other_scale_is_refused_before_any_work() -> None:
    # Read it can be: a campaign may have been run so before this was refused.
    config = load_config({"train": {"log_prob": "sum", "beta": 300}}, "test")
    with pytest.raises(D3POError, match=r"train\.beta is 300 with train\.log_prob 'sum'; expected .* 'mean'") as caught:
        check_beta(config.train)
    assert "\n" not in str(caught.value)


def test_every_field_has_a_description() -> None:
    config = CampaignConfig()
    judge = (config.judge, config.judge.people, config.scoring)
    for section in (config.model, config.sample, *judge, config.train, config.evaluate):
        for name, field in type(section).model_fields.items():
            assert field.description or name == "people", name


def test_home_is_expanded_in_the_data_folder_and_nobodys_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("D3PO_DATA", "~/d3po data")
    assert data_folder() == tmp_path.resolve() / "d3po data"
    monkeypatch.setenv("D3PO_DATA", "~nobody-of-this-name/data")
    with pytest.raises(D3POError, match=r"D3PO_DATA '~nobody-of-this-name/data': cannot be a path \(.*home"):
        data_folder()


def test_what_cannot_be_a_path_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to(tmp_path / "gnir")
    (tmp_path / "gnir").symlink_to(tmp_path / "ring")
    for name in (f"{tmp_path}/ring/x", f"{tmp_path}/a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(D3POError, match=r"^--campaign '.*': cannot be a path \(.*\); give another$"):
            campaign_named(name)
