"""Values that a person types: configuration files, settings over them, and what a relative path means."""

from pathlib import Path

import pytest

from d3po.flows.commands.parts import outside_campaigns
from d3po.flows.presets import deployment_config
from d3po.flows.typed import typed_values
from d3po_core.errors import D3POError
from d3po_core.paths import PROJECT_ROOT, path_from_here
from d3po_core.store.campaign import campaign_named

SHIPPED = "data/prompts/shapes_train.txt"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*settings: str, file: Path | None = None, deployment: str = "round") -> str:
    with pytest.raises(D3POError) as caught:
        deployment_config(deployment, None, settings, file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_lies_over_the_deployment_and_settings_lie_over_the_file(here: Path) -> None:
    file = here / "my.yaml"
    file.write_text("campaign: mine\nseed: 5\nsample: {group_size: 3}\ntrain.learning_rate: 1e-3\n")
    config = deployment_config("published", None, ["seed=6", "judge.scorers=brightness"], file)
    assert (config.campaign, config.seed, config.sample.group_size) == ("mine", 6, 3)
    assert (config.train.learning_rate, config.judge.scorers) == (1e-3, ("brightness",))
    assert config.train.clip == "two_sided"  # the deployment's
    assert deployment_config("published", "other", [], file).campaign == "other"


def test_a_wrong_field_is_named_with_its_file_and_line_or_its_setting(here: Path) -> None:
    file = here / "my.yaml"
    file.write_text("# mine\nseed: 5\ntrain:\n  learning_rat: 1\n  beta: -1\nsample: {group_size: 3}\n")
    said = refused("guard.policy=shout", file=file)
    assert f"{file}, line 4: train.learning_rat is not a field; did you mean 'train.learning_rate'?" in said
    assert f"{file}, line 5: train.beta is -1: it must be greater than 0" in said
    assert "--set guard.policy: guard.policy is 'shout': it must be 'warn', 'reject' or 'stop'" in said
    assert "sample" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 5\nseed: 6\n", "line 2: seed stands in line 1 already"),
        ("train.beta: 1\ntrain: {beta: 2}\n", "line 2: train.beta stands in line 1 already"),
        ("train:\n  beta: 1\n  clip: [none\n", "line 4: the value is not YAML"),
        ("a: &x [1]\nb: *x\n", "has a YAML alias"),
        ("- seed\n", "holds no fields; expected lines such as"),
        ("\x00", "is not YAML"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(here: Path, text: str, said: str) -> None:
    (here / "my.yaml").write_text(text)
    message = refused(file=Path("my.yaml"))
    assert message.startswith("my.yaml")
    assert said in message


def test_a_file_that_is_not_there_is_one_line(here: Path) -> None:
    assert refused(file=Path("my.yaml")).startswith("--config my.yaml: cannot be read (No such file")
    assert refused(file=Path("folder")).startswith("--config folder: cannot be read (Is a directory)")
    (here / "empty.yaml").write_text("# nothing yet\n")
    assert deployment_config("round", None, [], here / "empty.yaml") == deployment_config("round", None, [])


def test_a_relative_path_means_the_folder_in_which_it_is_typed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "mine.txt").write_text("a red circle")
    (here / "folder" / "my.yaml").write_text("sample: {prompts: ../mine.txt}\nruns_dir: runs\n")
    typed = deployment_config("round", None, ["sample.prompts=mine.txt", "runs_dir=new"])
    assert (typed.sample.prompts, typed.runs_dir) == (str(here / "mine.txt"), str(here / "new"))
    nested = deployment_config("round", None, ["sample={prompts: mine.txt}"])
    assert nested.sample.prompts == str(here / "mine.txt")
    filed = deployment_config("round", None, [], Path("folder/my.yaml"))
    assert (filed.sample.prompts, filed.runs_dir) == (str(here / "mine.txt"), str(here / "folder" / "runs"))
    monkeypatch.chdir(PROJECT_ROOT / "docs")
    inside = deployment_config("round", None, [f"sample.prompts=../{SHIPPED}"])
    assert inside.sample.prompts == SHIPPED  # so that the project can move


def test_what_only_the_project_has_is_refused_with_both_places(here: Path) -> None:
    said = refused(f"sample.prompts={SHIPPED}")
    assert said == (
        f"--set sample.prompts: '{SHIPPED}' is not in {here}, where it is typed; "
        f"if you mean the project's, write {PROJECT_ROOT / SHIPPED}"
    )
    assert deployment_config("round", None, [f"sample.prompts={PROJECT_ROOT / SHIPPED}"]).sample.prompts == SHIPPED


def test_a_hub_id_is_no_path_unless_there_is_such_a_folder(here: Path) -> None:
    assert typed_values(None, ["model.path=folder/name"], None)[0] == {"model": {"path": "folder/name"}}
    (here / "folder" / "name").mkdir()
    assert typed_values(None, ["model.path=folder/name"], None)[0] == {"model": {"path": f"{here}/folder/name"}}
    assert typed_values(None, ["model.start_from=a/b/c.safetensors"], None)[0] == {
        "model": {"start_from": "a/b/c.safetensors"}
    }
    models = typed_values(None, ["scoring.models.my.taste=http://host/x", "scoring.models.pickscore=./f"], None)[0]
    assert models == {"scoring": {"models": {"my.taste": "http://host/x", "pickscore": f"{here}/f"}}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 5000, "is not YAML"),
        ("[&a [x, x], &b [*a, *a], &c [*b, *b]]", "has a YAML alias"),
        ("2001-99-99", "is not YAML"),
    ],
)
def test_yaml_that_is_too_deep_or_multiplies_is_one_line(text: str, said: str) -> None:
    with pytest.raises(D3POError, match=said):
        deployment_config("round", None, [f"judge.scorers={text}"])


def test_a_folder_that_was_removed_while_one_is_in_it_matters_only_to_relative_paths(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_PROJECT", str(PROJECT_ROOT))
    monkeypatch.chdir(here / "folder")
    (here / "folder").rmdir()
    assert deployment_config("round", None, ["seed=6"]).seed == 6
    assert "'mine.txt': cannot be a path" in refused("sample.prompts=mine.txt")
    assert path_from_here(here) == str(here)
    with pytest.raises(D3POError, match=r"--campaign '\./x': cannot be a path"):
        campaign_named("./x")
    with pytest.raises(D3POError, match="--output 'x': cannot be a path"):
        outside_campaigns(Path("x"))
