"""Rounds of a data set, alone and beside sampled groups: from the import to a checkpoint that a replay makes again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from starlette.testclient import TestClient

from d3po.tasks.evaluating import _evaluate
from d3po.tasks.judging import _derive, _judge
from d3po.tasks.publishing import _row, note_published
from d3po.tasks.sampling import _draw_left_out, _sample
from d3po.tasks.training import _train
from d3po_core.browser.app import create_app
from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.datasets.checks import check_dataset
from d3po_core.datasets.importing import import_dataset
from d3po_core.datasets.rounds import write_imported
from d3po_core.datasets.sources import find_sources
from d3po_core.datasets.stored import open_dataset
from d3po_core.errors import D3POError
from d3po_core.evaluation.guard import judge_checkpoint
from d3po_core.export.preferences import export_preferences
from d3po_core.models.loaded import loaded_policy
from d3po_core.people.questions import count_judgements
from d3po_core.planning.preflight import check_learning
from d3po_core.records import DeriveRecord, EvaluateRecord, GuardRecord, JudgeRecord, SampleRecord, TrainRecord
from d3po_core.report.write import REPORT_FILE, write_report
from d3po_core.reproducing.regenerate import regenerate
from d3po_core.reproducing.replay import replay_round
from d3po_core.store.campaign import begin_round, open_campaign
from d3po_core.store.integrity import damages
from d3po_core.store.prune import apply_prune, plan_prune
from d3po_core.store.stages import finish_stage, read_record
from d3po_core.store.tables import connect, partition, read_rows, table_from_rows, write_table
from tests.core.datasets.tables import MeanEncoder, pairs, picture, write_parquet

STAGES: list[tuple[str, type[Any], Callable[[CampaignConfig, int], Any]]] = [
    ("sample", SampleRecord, _sample), ("judge", JudgeRecord, _judge), ("derive", DeriveRecord, _derive),
    ("train", TrainRecord, _train), ("evaluate", EvaluateRecord, _evaluate), ("guard", GuardRecord, judge_checkpoint),
]  # fmt: skip
VALUES: dict[str, Any] = {
    "seed": 3,
    "model": {"device": "cpu", "lora_rank": 4},
    "sample": {"groups_per_round": 6, "group_size": 3, "num_steps": 3, "batch_size": 6},
    "judge": {"scorers": ["brightness"]},
    "train": {"objective": "diffusion_dpo", "updates_per_round": 2, "micro_batch": 16, "learning_rate": 1e-3},
    "evaluate": {"images_per_prompt": 2, "max_prompts": 2, "grid_prompts": 1},
}


class SquareEncoder(MeanEncoder):
    """Latents of the embedded model's shape."""

    latent_shape = (4, 8, 8)
    height = width = 64

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        mean_B311 = torch.from_numpy(images).float().mean(dim=(1, 2))[:, :, None, None] / 127.5 - 1
        return torch.cat([mean_B311, mean_B311[:, :1]], dim=1).expand(-1, -1, 8, 8).contiguous()


def data_set(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Import rows as a data set; returns what ``sample.dataset`` says of it."""
    table = write_parquet(folder / "table.parquet", rows)
    import_dataset(folder / "mine", CampaignConfig(), find_sources([table], None, {}), make_encoder=SquareEncoder)
    return str(folder / "mine")


def settings(folder: Path, dataset: str, **changes: dict[str, Any]) -> CampaignConfig:
    values = json.loads(json.dumps(VALUES)) | {"campaign": "mine", "runs_dir": str(folder / "runs")}
    values["sample"]["dataset"] = dataset
    for section, fields in changes.items():
        values[section] |= fields
    return load_config(values, "test")


def do(config: CampaignConfig, number: int, until: str = "guard") -> None:
    """The stages of a round, without Prefect and MLflow."""
    begin_round(config, number)
    for name, kind, work in STAGES:
        if number or name in ("evaluate", "guard"):
            finish_stage(config.folder, number, name, kind, lambda work=work: work(config, number))
        if name == until:
            return
    row = table_from_rows("rounds", [_row(config, number)])
    write_table(config.folder, "rounds", number, row)
    note_published(config.folder, number)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> CampaignConfig:
    """Round 1 of a data set alone, round 2 of it and of sampled groups, half each."""
    folder = tmp_path_factory.mktemp("mine")
    dataset = data_set(folder, pairs(9, images=20))
    alone, mixed = settings(folder, dataset), settings(folder, dataset, sample={"dataset_share": 0.5})
    open_campaign(alone)
    for number, config in ((0, alone), (1, alone), (2, mixed)):
        do(config, number, until="")
    return mixed


@pytest.fixture
def campaign(made: CampaignConfig, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made.folder, tmp_path / "runs" / "mine"))


def samples_of(campaign: Path, number: int) -> list[dict[str, Any]]:
    return read_rows(partition(campaign, "samples", number) / "part.parquet")


def test_a_round_of_a_data_set_has_its_images_and_no_trajectory(made: CampaignConfig) -> None:
    rows = samples_of(made.folder, 1)
    assert [row["sample_id"] for row in rows] == [f"r1-g{group}-m{member}" for group in range(6) for member in (0, 1)]
    (name,) = {row["trajectory_path"] for row in rows}
    tensors = load_file(made.folder / name)
    assert tensors.keys() == {"latents"}
    assert tensors["latents"].shape == (12, 1, 4, 8, 8)
    dataset = open_dataset(str(made.sample.dataset))
    drawn = dataset.drawn(6, made.seed, 1)
    assert torch.equal(tensors["latents"][:, 0], torch.cat([dataset.latents(group) for group in drawn]))
    assert [row["prompt"] for row in rows[::2]] == [group.prompt for group in drawn]


def test_its_preferences_are_those_of_the_table_and_ties_stay_ties(made: CampaignConfig) -> None:
    drawn = open_dataset(str(made.sample.dataset)).drawn(6, made.seed, 1)
    expected = {
        (f"r1-g{g}-m{0 if group.values[0] > 0 else 1}", f"r1-g{g}-m{1 if group.values[0] > 0 else 0}")
        for g, group in enumerate(drawn) if group.values[0]
    }  # fmt: skip
    found = read_rows(partition(made.folder, "preferences", 1) / "part.parquet")
    assert {(pair["winner_id"], pair["loser_id"]) for pair in found} == expected
    record = read_record(made.folder, 1, "derive", DeriveRecord)
    assert (record.num_pairs, record.num_ties) == (len(expected), 6 - len(expected))
    assert 0 < record.num_ties < 6
    assert {row["num_pairs"] for row in read_rows(partition(made.folder, "rounds", 1) / "part.parquet")} == {
        len(expected)
    }


def test_a_mixed_round_samples_the_rest_and_measures_only_that(made: CampaignConfig) -> None:
    sampled = [row for row in samples_of(made.folder, 2) if "/shard-" in row["trajectory_path"]]
    imported = [row for row in samples_of(made.folder, 2) if "/dataset-" in row["trajectory_path"]]
    assert ({row["group_id"] for row in sampled}, len(sampled)) == ({"r2-g0", "r2-g1", "r2-g2"}, 9)
    assert ({row["group_id"] for row in imported}, len(imported)) == ({"r2-g3", "r2-g4", "r2-g5"}, 6)
    pairs_of = {row["group_id"] for row in read_rows(partition(made.folder, "preferences", 2) / "part.parquet")}
    assert pairs_of & {"r2-g0", "r2-g1", "r2-g2"}
    assert pairs_of & {"r2-g3", "r2-g4", "r2-g5"}
    alone, mixed = (read_record(made.folder, number, "train", TrainRecord) for number in (1, 2))
    assert (alone.num_updates, mixed.num_updates) == (2, 2)
    assert alone.margin_after is None
    assert mixed.margin_after is not None
    assert alone.loss is not None


def test_its_judgements_are_no_answers_that_people_would_lose(made: CampaignConfig) -> None:
    assert count_judgements(made.folder, 1) == 0
    with connect(made.folder) as connection:
        said = connection.sql("SELECT DISTINCT rater, rater_kind, source FROM judgements WHERE round = 1").fetchall()
    assert said == [("mine", "human", "data set mine")]


@pytest.mark.parametrize("number", [1, 2])
def test_a_replay_trains_the_same_weights_also_after_a_pruning(
    number: int, made: CampaignConfig, campaign: Path
) -> None:
    plan = plan_prune(campaign)
    gone = {path.relative_to(campaign).as_posix() for path in plan.files if "trajectories" in path.parts}
    assert gone == {row["trajectory_path"] for row in samples_of(campaign, 2) if "/shard-" in row["trajectory_path"]}
    apply_prune(campaign, plan)
    assert damages(campaign) == []
    again = replay_round(campaign, number, loaded_policy(made))
    assert again.identical
    assert set(again.sampled_again) == (gone if number == 2 else set())
    latents = next((campaign / "trajectories" / f"round={number}").glob("dataset-*"))
    latents.unlink()
    assert [damage.path for damage in damages(campaign)] == [latents.relative_to(campaign).as_posix()]


def test_an_image_of_a_data_set_cannot_be_drawn_again_but_its_neighbours_can(
    made: CampaignConfig, campaign: Path
) -> None:
    with pytest.raises(D3POError, match="'r1-g0-m0' comes from a data set, so no model can draw it again; its file"):
        regenerate(campaign, "r1-g0-m0", loaded_policy(made))
    assert regenerate(campaign, "r2-g0-m0", loaded_policy(made)).same_bytes


def test_the_report_shows_such_rounds(made: CampaignConfig, campaign: Path) -> None:
    write_report(made.model_copy(update={"runs_dir": str(campaign.parent)}))
    page = " ".join((campaign / REPORT_FILE).read_text().split())
    assert "judged by brightness, with the judgements of the data set mine." in page


def test_an_export_says_which_pairs_came_with_a_data_set(campaign: Path, tmp_path: Path) -> None:
    count = export_preferences(campaign, tmp_path / "out")
    (file,) = (tmp_path / "out" / "data").iterdir()
    rows = pq.read_table(file, columns=["group_id", "model_0"]).to_pylist()
    own = [row for row in rows if row["group_id"] in ("r2-g0", "r2-g1", "r2-g2")]
    assert {row["model_0"] for row in own} == {"checkpoints/round=1"}
    assert {row["model_0"] for row in rows if row not in own} == {"data set"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{count - len(own)} pairs came with a data set, which judged them too." in card
    assert "People voted on\n0 of the pairs" in card


def test_the_browser_says_that_nobody_drew_such_an_image(campaign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(campaign.parents[1]))
    client = TestClient(create_app("s" * 43), base_url="http://127.0.0.1")
    client.get(f"/enter?key={'s' * 43}")
    assert "nobody: from a data set" in client.get("/c/mine/story/r1-g0-m0").text
    assert "checkpoints/round=1" in client.get("/c/mine/story/r2-g0-m0").text
    assert client.get("/c/mine/story/r2-e0").status_code == 200


def test_a_killed_sampling_goes_on_and_files_that_a_mirror_left_out_come_again(tmp_path: Path) -> None:
    config = settings(tmp_path, data_set(tmp_path, pairs(90, images=20)), sample={"groups_per_round": 70})
    open_campaign(config)
    do(config, 1, until="sample")
    files = [path for path in config.folder.rglob("*/round=1/*") if path.suffix in (".png", ".safetensors", ".parquet")]
    before = {path: path.read_bytes() for path in files}
    names = [path.stat().st_mtime_ns for path in write_imported(config, 1)]
    write_imported(config, 1)[1].unlink()
    again = [path.stat().st_mtime_ns for path in write_imported(config, 1)]
    assert [now == then for now, then in zip(again, names, strict=True)] == [True, False, True]
    for kind in ("trajectories", "images", "staging"):  # as on a machine that has the mirror's tables only
        shutil.rmtree(config.folder / kind)
    _draw_left_out(config, 1)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert damages(config.folder) == []


SINGLES = [{"image": picture(seed), "prompt": "p", "x": (seed * 3) % 4} for seed in range(6)]


def labels(tmp_path: Path, rows: list[dict[str, Any]], objective: str) -> list[dict[str, Any]]:
    config = settings(
        tmp_path, data_set(tmp_path, rows), sample={"groups_per_round": 1}, train={"objective": objective}
    )
    check_dataset(config, [])
    open_campaign(config)
    do(config, 1, until="derive")
    return read_rows(partition(config.folder, "image_labels", 1) / "part.parquet")


def test_scores_become_rewards(tmp_path: Path) -> None:
    rows = [{"image": row["image"], "prompt": row["prompt"], "score": float(row["x"])} for row in SINGLES]
    found = labels(tmp_path, rows, "rwr")
    scores = np.array([row["score"] for row in rows])
    assert np.allclose([label["reward"] for label in found], (scores - scores.mean()) / scores.std())


def test_good_and_bad_stay_good_and_bad(tmp_path: Path) -> None:
    rows = [{"image": row["image"], "prompt": row["prompt"], "label": bool(row["x"] % 2)} for row in SINGLES]
    assert [label["good"] for label in labels(tmp_path, rows, "kto")] == [row["label"] for row in rows]


def test_a_single_image_is_good_or_bad_too(tmp_path: Path) -> None:
    (found,) = labels(tmp_path, [{"image": picture(1), "prompt": "p", "label": "bad"}], "kto")
    assert found["good"] is False


def test_ranks_become_pairs(tmp_path: Path) -> None:
    for place in range(3):
        (tmp_path / f"{place}.png").write_bytes(picture(place))
    rows = [{"generations": [f"{place}.png" for place in range(3)], "ranking": [2, 1, 2], "prompt": "p"}]
    labels(tmp_path, rows, "diffusion_dpo")
    found = pq.read_table(partition(tmp_path / "runs" / "mine", "preferences", 1) / "part.parquet").to_pylist()
    assert {(pair["winner_id"], pair["loser_id"]) for pair in found} == {
        ("r1-g0-m1", "r1-g0-m0"), ("r1-g0-m1", "r1-g0-m2"),
    }  # fmt: skip


def checked(config: CampaignConfig) -> None:
    check_learning(config)
    check_dataset(config, [])


@pytest.mark.parametrize(("changes", "why"), [
    ({"train": {"objective": "d3po"}}, "which learns from trajectories, .* have none; set it to one of alpha_dpo, awm"),
    ({"train": {"objective": "own_noise_dpo"}}, "'own_noise_dpo', which learns from trajectories"),
    ({"judge": {"labeller": "human"}}, "judge.labeller is 'human', but people do not judge rounds"),
    ({"train": {"objective": "rwr"}, "judge": {"rewards": "scores"}}, "has none for its groups of kind choice; set"),
    ({"sample": {"dataset": "/nowhere/else"}}, "no such data set in /nowhere; .* import one: d3po import-dataset"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything_is_done(
    changes: dict[str, Any], why: str, made: CampaignConfig, tmp_path: Path
) -> None:
    config = settings(tmp_path, str(made.sample.dataset), **changes)
    with pytest.raises(D3POError, match=why) as caught:
        checked(config)
    assert "\n" not in str(caught.value)
    assert not config.folder.exists()


def test_a_share_of_no_data_set_is_refused() -> None:
    with pytest.raises(D3POError, match=r"sample.dataset_share is 0.5 but sample.dataset is not set; name a data set"):
        load_config({"sample": {"dataset_share": 0.5}}, "test")


def test_held_out_prompts_and_foreign_vaes_and_names_of_scorers_are_refused(
    made: CampaignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, str(made.sample.dataset))
    check_dataset(config, ["another prompt"])
    with pytest.raises(D3POError, match=r"1 prompts of the data set 'mine' are in evaluate.prompts .'prompt 3' first"):
        check_dataset(config, ["Prompt  3"])
    named = settings(tmp_path, str(made.sample.dataset), judge={"scorers": ["mine"]})
    with pytest.raises(D3POError, match="has the name of a scorer"):
        check_dataset(named, [])
    sized = settings(tmp_path, str(made.sample.dataset), sample={"height": 32, "width": 64})
    with pytest.raises(D3POError, match=r"at the network's native size, and the campaign draws 32 x 64 pixels"):
        check_dataset(sized, [])
    monkeypatch.setattr("d3po_core.datasets.checks.vae_sha256", lambda model: "another")
    with pytest.raises(D3POError, match="was encoded by the VAE of 'data/shapes/model', which is not that of"):
        check_dataset(config, [])
