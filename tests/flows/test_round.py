"""The flow d3po on real parts: a Prefect server, the embedded model, DuckDB and MLflow."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from mlflow import MlflowClient

from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.campaign import campaign_lock
from d3po_core.store.images import load_png
from d3po_core.store.stages import finished_rounds
from d3po_core.store.tables import connect
from tests.flows.real_servers import eventually
from tests.flows.test_kill import SMALL

NAME = "small"
TRAIN = PROJECT_ROOT / "data/prompts/shapes_train.txt"
D3PO = str(Path(sys.executable).with_name("d3po"))


def command(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``d3po`` as a user would, from another folder, on the tests' data."""
    environment = os.environ | {"D3PO_DATA": str(data)}
    return subprocess.run([D3PO, *arguments], cwd=data, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def campaign(run_rounds: Callable[..., int], data: Path) -> Path:
    """A campaign of two rounds, run one after the other."""
    values = {**SMALL, "campaign": NAME}
    assert run_rounds(values, 1) == 0
    assert run_rounds(values, 1) == 0
    return data / "runs" / NAME


@pytest.fixture(scope="module")
def mlflow_runs(campaign: Path, data: Path) -> list[Any]:
    client = MlflowClient(f"sqlite:///{data}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("d3po")
    runs = client.search_runs([experiment.experiment_id], f"tags.`d3po.campaign` = '{NAME}'")
    return sorted(runs, key=lambda run: int(run.data.tags["d3po.round"].replace("campaign", "-1")))


def test_second_run_continues_from_the_last_finished_round(campaign: Path) -> None:
    assert [record.round for record in finished_rounds(campaign)] == [0, 1, 2]
    with connect(campaign) as connection:
        rows = connection.sql("SELECT round, checkpoint_in, checkpoint_out FROM rounds ORDER BY round").fetchall()
    assert rows == [
        (0, None, None),
        (1, None, "checkpoints/round=1"),
        (2, "checkpoints/round=1", "checkpoints/round=2"),
    ]


def test_every_table_has_the_rows_of_its_round(campaign: Path) -> None:
    with connect(campaign) as connection:
        count = {t: connection.sql(f"SELECT count(*) FROM {t} WHERE round = 2").fetchall()[0][0] for t in
                 ("samples", "judgements", "evaluations", "preferences", "rounds", "updates")}  # fmt: skip
        beaten = connection.sql(
            """SELECT count(*) FROM preferences p
               JOIN judgements w ON w.sample_id = p.winner_id JOIN judgements l ON l.sample_id = p.loser_id
               WHERE w.value <= l.value"""
        ).fetchall()[0][0]
        groups = connection.sql(
            "SELECT count(*) FROM preferences p JOIN samples a ON a.sample_id = p.winner_id "
            "JOIN samples b ON b.sample_id = p.loser_id WHERE a.group_id != b.group_id OR a.prompt != b.prompt"
        ).fetchall()[0][0]
    assert count["samples"] == count["judgements"] == 16
    assert count["evaluations"] == 4
    assert count["rounds"] == 1
    assert count["updates"] <= 2
    assert count["preferences"] > 0
    assert beaten == 0
    assert groups == 0


def test_held_out_prompts_are_never_trained_on(campaign: Path) -> None:
    with connect(campaign) as connection:
        both = connection.sql("SELECT prompt FROM samples INTERSECT SELECT prompt FROM evaluations").fetchall()
    assert both == []


def test_mlflow_has_a_parent_run_and_a_finished_child_a_round(mlflow_runs: list[Any]) -> None:
    parent, *children = mlflow_runs
    assert parent.info.run_name.startswith(f"{NAME}: 0.")
    assert parent.data.params == {}
    names = [child.info.run_name.removeprefix("★ ") for child in children]
    assert [name.partition(":")[0] for name in names] == ["base", "round 1", "round 2"]
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == "FINISHED"
        assert child.data.params["train.beta"] == "300.0"
        assert "held_out/prompt_alignment" in child.data.metrics
        assert "seconds/evaluate" in child.data.metrics


def test_mlflow_holds_metrics_artifacts_and_lineage_of_a_round(
    campaign: Path, data: Path, mlflow_runs: list[Any]
) -> None:
    client = MlflowClient(f"sqlite:///{data}/mlflow/mlflow.db")
    child = mlflow_runs[-1]
    names = {artifact.path for artifact in client.list_artifacts(child.info.run_id)}
    assert names >= {"pytorch_lora_weights.safetensors", "contact_sheet.png", "grid.png", "config.json", "digests.json"}
    with connect(campaign) as connection:
        updates = connection.sql('SELECT "update", loss FROM updates WHERE round = 2 ORDER BY 1').fetchall()
    history = client.get_metric_history(child.info.run_id, "update/loss")
    assert [m.step for m in sorted(history, key=lambda m: m.step)] == [update for update, _ in updates]
    assert [m.value for m in sorted(history, key=lambda m: m.step)] == pytest.approx(
        [loss for _, loss in updates], rel=1e-5
    )
    inputs = {
        i.dataset.name: json.loads(i.dataset.source)["uri"]
        for i in client.get_run(child.info.run_id).inputs.dataset_inputs
    }
    assert set(inputs) == {"samples/part", "judgements/proxy", "preferences/part", "evaluations/part"}
    assert all(Path(uri).is_file() for uri in inputs.values())
    curve = client.get_metric_history(mlflow_runs[0].info.run_id, "held_out/prompt_alignment")
    assert sorted(metric.step for metric in curve) == [0, 1, 2]
    slider = [a.path for a in client.list_artifacts(mlflow_runs[0].info.run_id, "images") if a.path.endswith(".png")]
    assert len(slider) == 3


def test_mlflow_shows_training_over_the_timesteps_of_a_round(
    campaign: Path, data: Path, mlflow_runs: list[Any]
) -> None:
    client = MlflowClient(f"sqlite:///{data}/mlflow/mlflow.db")
    history = client.get_metric_history(mlflow_runs[-1].info.run_id, "timestep/margin_before")
    with connect(campaign) as connection:
        expected = connection.sql(
            "SELECT timestep, avg(margin_before) FROM update_steps WHERE round = 2 GROUP BY timestep ORDER BY timestep"
        ).fetchall()
    assert len(expected) == 10
    found = sorted((metric.step, metric.value) for metric in history)
    assert [step for step, _ in found] == [timestep for timestep, _ in expected]
    assert [value for _, value in found] == pytest.approx([margin for _, margin in expected], rel=1e-5, abs=1e-9)


def test_mlflow_s_numbers_have_few_digits(mlflow_runs: list[Any]) -> None:
    values = [value for run in mlflow_runs for value in run.data.metrics.values()]
    assert values
    assert all(value == float(f"{value:.6g}") for value in values)


def test_descriptions_say_what_a_run_and_a_version_are_and_how_to_load_it(
    campaign: Path, data: Path, mlflow_runs: list[Any]
) -> None:
    uri = f"sqlite:///{data}/mlflow/mlflow.db"
    client, (parent, *_, child) = MlflowClient(uri), mlflow_runs
    assert f"Campaign `{NAME}` aligns" in parent.data.tags["mlflow.note.content"]
    versions = client.search_model_versions(f"name = 'd3po-{NAME}' and run_id = '{child.info.run_id}'")
    (version,) = versions
    assert version.description == child.data.tags["mlflow.note.content"]
    assert f"prompt_alignment, round 2 of campaign `{NAME}`" in version.description.splitlines()[0]
    (line,) = [line for line in version.description.splitlines() if "download_artifacts" in line]
    address = line.split('"')[1]
    assert address == f"models:/d3po-{NAME}/{version.version}"
    mlflow.set_tracking_uri(uri)
    folder = Path(mlflow.artifacts.download_artifacts(address))
    stored = campaign / "checkpoints/round=2/pytorch_lora_weights.safetensors"
    assert (folder / stored.name).read_bytes() == stored.read_bytes()
    model = client.get_logged_model(child.outputs.model_outputs[0].model_id)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": version.name, "version": str(version.version)}]


def test_lora_from_mlflow_gives_the_evaluated_images(campaign: Path, data: Path, mlflow_runs: list[Any]) -> None:
    """A plain diffusers pipeline with the logged LoRA draws the held-out image again, from its row alone."""
    client = MlflowClient(f"sqlite:///{data}/mlflow/mlflow.db")
    folder = client.download_artifacts(mlflow_runs[-1].info.run_id, "pytorch_lora_weights.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(PROJECT_ROOT / "data/shapes/model").to(torch.float32)
    pipeline.load_lora_weights(Path(folder).parent, weight_name="pytorch_lora_weights.safetensors")
    pipeline.set_progress_bar_config(disable=True)
    with connect(campaign) as connection:
        prompt, seed, image_path = connection.sql(
            "SELECT prompt, seed, image_path FROM evaluations WHERE round = 2 ORDER BY sample_id LIMIT 1"
        ).fetchall()[0]
    from d3po_core.seeds import evaluation_seeds, gaussian

    image_seed = next(s for s in evaluation_seeds([prompt], 1, 0) if s.noise_seed == seed)
    noise = iter(gaussian(seed, 10, 4, 8, 8))
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    step = scheduler.step
    scheduler.step = lambda output, t, latent, **_: step(  # type: ignore[method-assign]
        output, t, latent, eta=1.0, variance_noise=next(noise)[None], return_dict=False
    )
    pipeline.scheduler = scheduler
    drawn = pipeline(
        prompt, num_inference_steps=10, guidance_scale=1.0, latents=gaussian(image_seed.initial_seed, 1, 4, 8, 8),
        output_type="np",
    ).images[0]  # fmt: skip
    stored = load_png(campaign / image_path)
    assert np.abs((drawn * 255).round() - stored).max() <= 1


def test_second_run_of_a_busy_campaign_is_refused_in_one_line(
    campaign: Path, run_rounds: Callable[..., int], data: Path
) -> None:
    with campaign_lock(campaign, who="a test"):
        assert run_rounds({**SMALL, "campaign": NAME}, 1) == 3
    message = (data / f"{NAME}.message").read_text()
    assert message.startswith(f"campaign '{NAME}' is being advanced by process {os.getpid()} (a test)")
    assert "\n" not in message
    assert len(finished_rounds(campaign)) == 3


def lines_of(campaign: str) -> list[str]:
    """What Prefect's page shows of the run of a campaign."""
    api = os.environ["PREFECT_API_URL"]
    tagged = {"flow_runs": {"tags": {"all_": [f"campaign:{campaign}"]}}}
    (run,) = httpx.post(f"{api}/flow_runs/filter", json=tagged, trust_env=False).json()
    body = {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "limit": 200}
    return [line["message"] for line in httpx.post(f"{api}/logs/filter", json=body, trust_env=False).json()]


def test_mlflow_that_is_down_costs_nothing_and_is_told_later(
    run_rounds: Callable[..., int], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The processes' environment is that of the server they were forked from; the address goes in by the path.
    folder = data / "mlflow"
    aside = data / "mlflow-aside"
    values = {**SMALL, "campaign": "unheard"}
    folder.rename(aside)
    folder.write_text("in the way of the store")
    try:
        assert run_rounds(values, 1) == 0
    finally:
        folder.unlink()
        aside.rename(folder)
    assert [record.mlflow_run_id for record in finished_rounds(data / "runs" / "unheard")] == [None, None]
    kept = "they are kept and delivered with the next one"
    assert eventually(lambda: any(kept in line for line in lines_of("unheard"))), "lines arrive a moment later"
    assert run_rounds(values, 1) == 0
    client = MlflowClient(f"sqlite:///{data}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("d3po")
    runs = client.search_runs([experiment.experiment_id], "tags.`d3po.campaign` = 'unheard'")
    assert sorted(run.data.tags["d3po.round"] for run in runs) == ["0", "1", "2", "campaign"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all("held_out/prompt_alignment" in run.data.metrics for run in runs)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--set", "train.learning_rat=1"), "train.learning_rat is not a field; did you mean 'train.learning_rate'?"),
        (("--set", "train.beta=-1"), "train.beta is -1: it must be greater than 0"),
        (("--set", "sample.prompts=missing.txt"), "missing.txt': no such file"),
        (
            ("--set", f"model.path={PROJECT_ROOT}/data/prompts"),
            "model_index.json is missing; expected a diffusers pipeline folder",
        ),
        (("--set", "judge.scorers=[beauty]"), "scorer 'beauty' is not known; expected one of jpeg_compressibility"),
        (("--set", "sample.groups_per_round=1000000"), "free some space, set runs_dir to another disk"),
        (("--set", f"evaluate.prompts={TRAIN}"), "54 prompts are in sample.prompts and in"),
        (("--set", "evaluate.prompts=data/prompts/shapes_train.txt"), f"if you mean the project's, write {TRAIN}"),
        (("--campaign", NAME, "--set", "model.lora_rank=4"), "was started with model.lora_rank = 16 (now 4)"),
    ],
)
def test_bad_input_is_one_line_that_names_what_to_do(
    arguments: tuple[str, ...], expected: str, campaign: Path, data: Path, prefect_server: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = sorted(campaign.rglob("*"))
    monkeypatch.setenv("PREFECT_API_URL", prefect_server["PREFECT_API_URL"])
    done = command(
        data, "run", "round", *arguments, "--set", "evaluate={images_per_prompt: 1, max_prompts: 4, grid_prompts: 2}"
    )
    if "evaluate.prompts" in str(arguments):
        done = command(data, "run", "round", *arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("d3po: ")]) == 1
    assert sorted(campaign.rglob("*")) == before


def test_query_prints_csv_json_and_parquet(campaign: Path, data: Path) -> None:
    sql = "SELECT round, count(*) AS n FROM evaluations GROUP BY round ORDER BY round"
    assert command(data, "query", sql, "--campaign", NAME, "--format", "csv").stdout == "round,n\n0,4\n1,4\n2,4\n"
    lines = command(data, "query", sql, "--campaign", NAME, "--format", "json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [{"round": n, "n": 4} for n in range(3)]
    done = command(data, "query", sql, "--campaign", NAME, "--format", "parquet", "--output", str(data / "q.parquet"))
    assert done.returncode == 0
    import pyarrow.parquet as pq

    assert pq.ParquetFile(data / "q.parquet").read().to_pylist() == [{"round": n, "n": 4} for n in range(3)]
    assert "round" in command(data, "query", sql, "--campaign", NAME).stdout
    wrong = command(data, "query", "SELECT * FROM nothing", "--campaign", NAME)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("d3po: query: Catalog Error")
