"""What a person finds on MLflow's untouched pages: scores, one champion, images, and links to exactly this campaign."""

import json
import re
import shutil
import sqlite3
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from mlflow.entities import Run
from PIL import Image

from d3po.flows import servers
from d3po.tasks.tracking import delivery, store, texts
from d3po.tasks.tracking.standing import standings
from d3po.tasks.tracking.store import campaign_page, forget_runs, mlflow_client
from d3po.tasks.tracking.views import saved_view
from d3po.tasks.tracking.wording import model_name, round_name
from d3po_core.config import CampaignConfig
from d3po_core.people.blind import begin_comparison
from d3po_core.records import RoundRecord, ScoreSummary
from d3po_core.store.campaign import campaign_id
from d3po_core.store.stages import finished_numbers, finished_rounds
from d3po_core.store.tables import connect, partition, read_rows, table_from_rows, write_table
from tests.core.evaluation.compared import say_all

DIGEST = re.compile(r"\b[0-9a-f]{40,64}\b")


@pytest.fixture
def own(own: CampaignConfig, monkeypatch: pytest.MonkeyPatch) -> CampaignConfig:
    """The same with a known address of MLflow's page, before anything was told."""
    monkeypatch.setenv("D3PO_MLFLOW_URL", "http://127.0.0.1:5000/")
    forget_runs()
    return own


def everything() -> dict[str, Run]:
    """The store's runs by what they stand for: a round's number, or the campaign."""
    client = mlflow_client()
    found = client.search_runs([client.get_experiment_by_name("d3po").experiment_id])
    return {run.data.tags["d3po.round"]: run for run in found}


def means(campaign: Path) -> dict[int, float]:
    """Held-out means from the images' scores, each prompt weighing the same."""
    query = "SELECT round, avg(m) FROM (SELECT round, prompt, avg(score) AS m FROM evaluations GROUP BY ALL) GROUP BY 1"
    with connect(campaign) as connection:
        return dict(connection.sql(query).fetchall())


def as_champion(campaign: Path, champion: int) -> None:
    """Rewrite the last round's row, as a guard that chose this champion leaves it."""
    last = finished_rounds(campaign)[-1].round
    row = read_rows(partition(campaign, "rounds", last) / "part.parquet")[0] | {"champion": champion}
    write_table(campaign, "rounds", last, table_from_rows("rounds", [row]))


def test_names_carry_round_score_and_exactly_one_champion(own: CampaignConfig) -> None:
    as_champion(own.folder, 1)
    delivery.deliver(own)
    found, scores = everything(), means(own.folder)
    names = {which: run.info.run_name for which, run in found.items()}
    assert names["1"] == f"★ round 1: {scores[1]:.3f} [too few to tell] champion · tiny"
    assert names["2"] == f"round 2: {scores[2]:.3f} [too few to tell] {scores[2] - scores[1]:+.3f} to champion · tiny"
    assert names["0"].startswith(f"base: {scores[0]:.3f} ")
    assert names["campaign"] == f"tiny: {scores[1]:.3f} [too few to tell] round 1"
    notes = {which: run.data.tags["mlflow.note.content"].splitlines() for which, run in found.items()}
    assert notes["1"][0] == f"{scores[1]:.3f} [too few to tell] brightness, round 1 of campaign `tiny`; the champion."
    assert notes["campaign"][2].startswith(
        f"{scores[1]:.3f} [too few to tell] brightness: the champion is round 1 of 2"
    )


def test_a_new_champion_changes_the_names_of_earlier_rounds(own: CampaignConfig, tmp_path: Path) -> None:
    as_champion(own.folder, 2)
    held = shutil.move(own.folder / "rounds/round=2", tmp_path / "round 2 is not finished")
    delivery.deliver(own)
    scores = means(own.folder)
    before = max((0, 1), key=lambda number: scores[number])  # nobody has recorded a champion: the best so far
    assert everything()[str(before)].info.run_name.startswith("★ ")
    assert everything()["2"].info.run_name == "round 2: not finished · tiny"
    shutil.move(held, own.folder / "rounds/round=2")
    delivery.deliver(own)
    starred = [which for which, run in everything().items() if run.info.run_name.startswith("★ ")]
    assert starred == ["2"]
    earlier = everything()[str(before)]
    assert f"{scores[before] - scores[2]:+.3f} to champion" in earlier.info.run_name
    assert "the champion is round 2." in earlier.data.tags["mlflow.note.content"]


def test_a_round_that_is_no_longer_recent_gets_a_last_text_without_the_champion(
    own: CampaignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "RECENT", 1)
    as_champion(own.folder, 2)
    held = shutil.move(own.folder / "rounds/round=2", tmp_path / "round 2 is not finished")
    delivery.deliver(own)
    assert "champion" in everything()["1"].data.tags["mlflow.note.content"]
    shutil.move(held, own.folder / "rounds/round=2")
    delivery.deliver(own)
    early = everything()["1"]
    assert early.info.run_name == f"round 1: {means(own.folder)[1]:.3f} [too few to tell] · tiny"
    assert "champion" not in early.data.tags["mlflow.note.content"].partition("```")[0]
    assert "the champion is round 2." in everything()["0"].data.tags["mlflow.note.content"]  # the base is told again


def test_texts_are_written_when_they_change_and_only_then(own: CampaignConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    delivery.deliver(own)
    written: list[str] = []
    monkeypatch.setattr(texts, "describe", lambda _, run_id, *__: written.append(run_id))
    delivery.deliver(own)
    assert written == []
    say_all(own.folder, begin_comparison(own.folder, 2, 0, pairs=12).comparison, lambda _: 1)
    delivery.deliver_comparisons(own)
    found = everything()
    assert found["2"].info.run_id in written
    assert found["1"].info.run_id not in written
    monkeypatch.undo()


def test_a_description_says_what_people_prefer(own: CampaignConfig) -> None:
    say_all(own.folder, begin_comparison(own.folder, 2, 0, pairs=12).comparison, lambda _: 1)
    delivery.deliver(own)
    note = everything()["2"].data.tags["mlflow.note.content"]
    assert "people, asked blind, prefer it to the base in 100% of 12 pairs" in note


def test_a_campaign_s_run_has_curves_images_and_no_parameters_digests_or_ends_of_intervals(own: CampaignConfig) -> None:
    delivery.deliver(own)
    client, found = mlflow_client(), everything()
    parent = found.pop("campaign")
    assert parent.data.params == {}
    assert {"held_out/brightness", "held_out/sanity/diversity"} <= parent.data.metrics.keys()
    assert not [name for name in parent.data.metrics if name.endswith(("_low", "_high"))]
    assert min(name.rpartition("/")[0] for name in parent.data.metrics) == "held_out"  # the first group of charts
    images = [file.path for file in client.list_artifacts(parent.info.run_id, "images") if file.path.endswith(".png")]
    assert len(images) == 3
    with Image.open(client.download_artifacts(parent.info.run_id, images[0])) as image:
        assert image.width == image.height
        assert image.getpixel((image.width // 2, 1))[3] == 255
    for run in found.values():
        shown = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
        assert not DIGEST.search(json.dumps(shown))
        assert run.data.params
        kept = json.loads(Path(client.download_artifacts(run.info.run_id, "digests.json")).read_text())
        assert DIGEST.fullmatch(kept["config_sha256"])
        number = run.data.tags["d3po.round"]
        files = {f"{file.parent.parent.name}/part": file for file in own.folder.glob(f"*/round={number}/part.parquet")}
        assert kept["files_sha256"]["evaluations/part"] == sha256(files["evaluations/part"].read_bytes()).hexdigest()
        assert not [data for data in run.inputs.dataset_inputs if re.search("[0-9a-f]{9}", data.dataset.digest)]


def test_another_campaign_of_the_same_name_has_other_names(
    own: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery.deliver(own)
    for mark in own.folder.rglob("*.delivered"):
        mark.unlink()
    for module in (store, texts):
        monkeypatch.setattr(module, "campaign_id", lambda folder: "f" * 32)
    delivery.deliver(own)
    client = mlflow_client()
    names = [run.info.run_name for run in client.search_runs([client.get_experiment_by_name("d3po").experiment_id])]
    assert len(names) == 8
    assert len(set(names)) == 8
    assert sum("tiny (2)" in name for name in names) == 4


def test_the_link_opens_a_saved_view_of_exactly_this_campaign(own: CampaignConfig, tmp_path: Path) -> None:
    database = tmp_path / "data" / "mlflow" / "mlflow.db"
    assert saved_view(database) is None
    assert servers._mlflow_line("http://x") == "MLflow: http://x/#/experiments?workflowType=machine_learning"
    delivery.deliver(own)
    link = campaign_page(own)
    assert link
    assert delivery.pages(own)["rounds in MLflow"] == link
    address, _, asked = urlsplit(link).fragment.partition("?")
    experiment = mlflow_client().get_experiment_by_name("d3po")
    assert address == f"/experiments/{experiment.experiment_id}/runs"
    (key,) = parse_qs(asked)["viewStateShareKey"]
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
    state = json.loads(view["state"])
    parent = everything()["campaign"].info.run_id
    rounds = mlflow_client().search_runs(
        [experiment.experiment_id], state["searchFilter"], order_by=[f"{state['orderByKey']} DESC"]
    )
    scores = means(own.folder)
    assert [int(run.data.tags["d3po.round"]) for run in rounds] == sorted(scores, key=lambda n: -scores[n])
    assert {run.data.tags["mlflow.parentRunId"] for run in rounds} == {parent}
    assert saved_view(database) == (view["name"], f"/#{urlsplit(link).fragment}")
    assert servers._mlflow_line("http://127.0.0.1:5000") == f"MLflow, rounds of tiny: {link}"
    assert saved_view(database, campaign_id(own.folder)) == saved_view(database)
    assert saved_view(database, "0" * 32) is None


def test_views_that_people_save_are_not_taken_for_ours(own: CampaignConfig, tmp_path: Path) -> None:
    delivery.deliver(own)
    database = tmp_path / "data" / "mlflow" / "mlflow.db"
    ours = saved_view(database)
    client = mlflow_client()
    experiment = client.get_experiment_by_name("d3po").experiment_id
    theirs = json.dumps({"name": "mine", "createdAt": 9e15, "updatedAt": 9e15, "state": "{}"})
    client.set_experiment_tag(experiment, "mlflow.sharedViewState.theirs", theirs)
    client.set_experiment_tag(experiment, "mlflow.sharedViewState.older", "deflate;x")
    assert saved_view(database) == ours
    database.write_bytes(b"")
    with sqlite3.connect(database) as store:
        store.execute("CREATE TABLE half (made INTEGER)")
    assert saved_view(database) is None


def record(number: int, **values: Any) -> RoundRecord:
    score = ScoreSummary(mean=0.74314, low=0.667, high=0.812)
    kept = {
        "num_pairs": 1,
        "num_ties": 0,
        "eval_scorer": "x",
        "score": score,
        "checkpoint": None,
        "mlflow_run_id": None,
    }
    return RoundRecord(round=number, stage_seconds={}, **kept, **values)


def test_a_refused_round_says_so_and_a_model_s_name_is_one_that_mlflow_takes(own: CampaignConfig) -> None:
    first = standings(own.folder, [], finished_numbers(own.folder), finished_numbers(own.folder))[0]
    refused = type(first)(record(11, verdict="rejected"), 12, None, None, None)
    assert round_name(refused, "shapes") == "round 11: 0.743 [0.667, 0.812] rejected · shapes"
    name = model_name(record(12), "shapes")
    assert name == "round 12 0·743 [0·667, 0·812] shapes"
    assert not set(name) & set("/:.%\"'")
