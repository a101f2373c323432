"""How long a stage took, and its rates, when a run is killed and another goes on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from d3po.tasks import stage
from d3po.tasks.stage import progress
from d3po.tasks.tracking import stages
from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.models.weights import LORA_FILE
from d3po_core.records import SampleRecord, TrainRecord
from d3po_core.store import stages as finished_stages
from d3po_core.store.stages import finish_stage, stage_path
from d3po_core.store.tables import table_from_rows, write_table

SAMPLED = SampleRecord(num_samples=24, checkpoint=None, contact_sheet="sheet.png")
TRAINED = TrainRecord(
    checkpoint="c", lora_sha256="s", num_updates=2, loss=0.7, margin_before=0.0, pair_accuracy_before=0.5,
    kl_before=0.0, clip_fraction=0.0,
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> CampaignConfig:
    return load_config({"campaign": "c", "runs_dir": str(tmp_path)}, "test")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until ``now`` is moved."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = clock.monotonic = lambda: clock.now
    monkeypatch.setattr(finished_stages, "time", clock)
    monkeypatch.setattr(stage, "time", clock)
    return clock


def kill_after(config: CampaignConfig, clock: SimpleNamespace, name: str, tells: list[float]) -> None:
    """An attempt that is killed just after it told of progress for the last time, at these seconds."""
    bar = stage.Bar(config, 1, name, 24, "image", 0)
    for seconds in tells:
        clock.now += seconds
        bar.update()


def finish(config: CampaignConfig, clock: SimpleNamespace, name: str, record: Any, seconds: float) -> Any:
    def work() -> Any:
        with progress(config, 1, name, 24, "image", done=16) as bar:
            clock.now += seconds
            bar.update(8)
        return record

    return finish_stage(config.folder, 1, name, type(record), work)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What MLflow is told of a round."""
    values: dict[str, float] = {}

    def log_both(*arguments: Any) -> None:
        for metrics in arguments[5:]:  # curves of the campaign's run, then what the round's run alone has
            values.update(metrics)

    monkeypatch.setattr(stages, "log_both", log_both)
    for name in ("log_lineage", "log_metrics"):
        monkeypatch.setattr(stages, name, lambda *_: None)
    return values


def test_seconds_and_rates_of_a_resumed_stage_are_those_of_all_attempts(
    config: CampaignConfig, clock: SimpleNamespace, logged: dict[str, float]
) -> None:
    kill_after(config, clock, "sample", [10.0, 12.0])
    clock.now += 1000  # until somebody starts it again
    kill_after(config, clock, "sample", [3.0])
    clock.now += 1000
    record = finish(config, clock, "sample", SAMPLED, 5.0)
    assert record.seconds == pytest.approx(30.0)
    client: Any = SimpleNamespace(log_artifact=lambda *_: None)
    stages._log_sample(client, config, 1, "run")
    assert logged["sample/images_per_second"] == pytest.approx(24 / 30)
    assert logged["seconds/sample"] == pytest.approx(30.0)
    assert sorted(path.name for path in stage_path(config.folder, 1, "sample").parent.iterdir()) == [
        "sample.files",
        "sample.json",
    ]


def test_pair_steps_per_second_of_a_resumed_round_count_all_its_seconds(
    config: CampaignConfig, clock: SimpleNamespace, logged: dict[str, float]
) -> None:
    kill_after(config, clock, "train", [40.0])
    finish(config, clock, "train", TRAINED, 20.0)
    numbers = {"margin_before": 0.0, "pair_accuracy_before": 0.5, "kl_before": 0.0, "clip_fraction": 0.0}
    update = numbers | {"epoch": 0, "num_pairs": 30, "loss": 0.7, "grad_norm": 1.0, "drowned": 0.0, "seconds": 1.0}
    finished = finish_stage(config.folder, 1, "train", TrainRecord, lambda: TRAINED).finished_at
    updates = [update | {"update": u, "finished_at": finished} for u in range(2)]
    write_table(config.folder, "updates", 1, table_from_rows("updates", updates))
    steps = [numbers | {"update": u, "step": s, "timestep": 10 - s} for u in range(2) for s in range(5)]
    write_table(config.folder, "update_steps", 1, table_from_rows("update_steps", steps))
    (config.folder / TRAINED.checkpoint).mkdir()
    (config.folder / TRAINED.checkpoint / LORA_FILE).touch()
    client: Any = SimpleNamespace(log_artifact=lambda *_: None, set_tag=lambda *_: None)
    stages._log_train(client, config, 1, "run")
    assert logged["train/pair_steps_per_second"] == pytest.approx(2 * 30 * 5 / 60)
    assert logged["seconds/train"] == pytest.approx(60.0)


def test_a_note_that_was_cut_off_counts_as_none(config: CampaignConfig, clock: SimpleNamespace) -> None:
    path = stage_path(config.folder, 1, "sample").with_suffix(".seconds")
    path.parent.mkdir(parents=True)
    path.write_text("1.0.")
    assert finish(config, clock, "sample", SAMPLED, 5.0).seconds == pytest.approx(5.0)
