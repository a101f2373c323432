"""Several processes at one job: the same images and update as one process, and nobody left when one of them dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from d3po.tasks.judging import _derive, _judge
from d3po.tasks.sampling import _sample
from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.devices import check_processes
from d3po_core.errors import CampaignBusyError, D3POError, NonFiniteLossError, RankError
from d3po_core.evaluation.job import EVALUATE
from d3po_core.models.weights import LORA_FILE, weights_sha256
from d3po_core.paths import PROJECT_ROOT
from d3po_core.processes import engine
from d3po_core.processes.cluster import connect
from d3po_core.processes.engine import run_job
from d3po_core.sampling.job import SAMPLE
from d3po_core.store.campaign import begin_round, open_campaign
from d3po_core.store.tables import partition, read_rows
from d3po_core.training.job import TRAIN, train_checkpoint
from tests.tasks import rank_ends, rank_jobs
from tests.tasks.conftest import settings_in

NOT_TOLD: Callable[[int], None] = lambda count: None  # noqa: E731


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> CampaignConfig:
    """A campaign whose first round one process has sampled and judged."""
    folder = tmp_path_factory.mktemp("ranks")
    values = settings_in(folder)
    values["train"] |= {"updates_per_round": 4, "save_every_seconds": 0}
    config = load_config(values, "test")
    open_campaign(config)
    begin_round(config, 1)
    for work in (_sample, _judge, _derive):
        work(config, 1)
    return config


@pytest.fixture
def copied(sampled: CampaignConfig, tmp_path: Path) -> Callable[..., CampaignConfig]:
    """A copy of the campaign that a test may change, with other settings."""

    def copy(
        name: str, processes: int = 2, without: tuple[str, ...] = (), **sections: dict[str, Any]
    ) -> CampaignConfig:
        values = sampled.model_dump(mode="json") | {"runs_dir": str(tmp_path / name)}
        values["compute"]["processes"] = processes
        for section, changes in sections.items():
            values[section] |= changes
        config = load_config(values, "test")
        shutil.copytree(sampled.folder, config.folder, ignore=shutil.ignore_patterns(*without))
        return config

    return copy


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """The two workers that tests share end with them."""
    before = {*psutil.Process().children(recursive=True)}  # warm processes of other files' tests
    yield
    children = {*psutil.Process().children(recursive=True)} - before
    engine.end_processes()
    assert psutil.wait_procs(children, timeout=20)[1] == []


SAMPLES = ("samples", "staging", "trajectories", "images")


def drawn(config: CampaignConfig) -> dict[str, bytes]:
    """Trajectories, rows and images of round 1 by their path."""
    files = [path for name in SAMPLES for path in (config.folder / name / "round=1").glob("*")]
    return {str(path.relative_to(config.folder)): path.read_bytes() for path in files}


def test_ranks_draw_the_images_and_trajectories_of_one_process(
    sampled: CampaignConfig, copied: Callable[..., CampaignConfig]
) -> None:
    config = copied("again", without=SAMPLES)
    told: list[int] = []
    run_job(SAMPLE, config, 1, told.append)
    assert sorted(told) == [3, 6, 6]  # three shards, of two, two and one group
    expected = {k: v for k, v in drawn(sampled).items() if "contact_sheet" not in k and not k.startswith("samples")}
    assert len(expected) == 3 + 3 + 15
    assert drawn(config) == expected


def test_ranks_draw_the_held_out_images_of_one_process_and_find_its_drift(
    copied: Callable[..., CampaignConfig],
) -> None:
    several, one = copied("several"), copied("one", processes=1)
    for config in (one, several):
        run_job(TRAIN, one.model_copy(update={"runs_dir": config.runs_dir}), 1, NOT_TOLD)
    told: list[int] = []
    expected = run_job(EVALUATE, one, 1, NOT_TOLD)
    assert expected > 1e-3
    assert run_job(EVALUATE, several, 1, told.append) == pytest.approx(expected, rel=1e-5)
    assert told == [6, 6]
    images = drawn(one)
    assert sum("r1-e" in path for path in images) == 12
    assert drawn(several) == images


def relative(found: list[float], expected: list[float]) -> float:
    difference, size = torch.tensor(found) - torch.tensor(expected), torch.tensor(expected).norm()
    assert size > 0
    return float(difference.norm() / size)


@pytest.mark.parametrize(
    ("job", "changes", "tolerance"),
    [
        (rank_jobs.GRADIENT, {}, 1e-4),
        (rank_jobs.GRADIENT, {"train": {"micro_batch": 2}}, 1e-4),
        (rank_jobs.GRADIENT, {"train": {"reference": "base"}}, 1e-4),
        (rank_jobs.GRADIENT, {"train": {"objective": "kto", "settings": {"beta": 50}, "reference": "base"}}, 1e-4),
        (rank_jobs.ONE_CELL, {}, 1e-4),
        (rank_jobs.SHORT_OF_MEMORY, {}, 1e-4),
        (rank_jobs.GRADIENT, {"model": {"precision": "fp16"}, "train": {"beta": 1.0}}, 1e-2),
        (rank_jobs.GRADIENT, {"model": {"train": "full"}}, 1e-4),
    ],
    ids=["plain", "groups larger than a micro-batch", "base as reference", "a mean over the update",
         "less to do than ranks",
         "a rank short of memory", "half precision", "all weights"],
)  # fmt: skip
def test_gradient_over_ranks_is_that_of_one_process(
    job: Any, changes: dict[str, Any], tolerance: float, copied: Callable[..., CampaignConfig]
) -> None:
    changes = {**changes, "train": {**changes.get("train", {}), "updates_per_round": 1}}
    config = copied("several", **changes)
    expected, found = job.alone(config, 1, NOT_TOLD), run_job(job, config, 1, NOT_TOLD)
    assert relative(found["gradient"], expected["gradient"]) < tolerance
    assert found["seen"] == pytest.approx(expected["seen"], rel=tolerance, abs=1e-5)
    assert [row["step"] for row in found["per_step"]] == [row["step"] for row in expected["per_step"]]
    for row, other in zip(found["per_step"], expected["per_step"], strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=1e-5)


def test_overflow_on_one_rank_takes_the_update_again_on_all(copied: Callable[..., CampaignConfig]) -> None:
    changes = {"model": {"precision": "fp16"}, "train": {"beta": 1.0, "updates_per_round": 1}}
    config = copied("several", **changes)
    expected = rank_jobs.GRADIENT.alone(config, 1, NOT_TOLD)
    found = run_job(rank_jobs.OVERFLOWING_ONCE, config, 1, NOT_TOLD)
    assert found["loss_scale"] == expected["loss_scale"] / 8
    assert relative(found["gradient"], expected["gradient"]) < 1e-2
    assert found["seen"] == pytest.approx(expected["seen"], rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("train", [{}, {"micro_batch": 2}, {"reference": "base"}], ids=str)
def test_trained_lora_is_that_of_one_process_and_the_same_on_all_ranks(
    train: dict[str, Any], copied: Callable[..., CampaignConfig]
) -> None:
    one, several = copied("one", processes=1, train=train), copied("several", train=train)
    train_checkpoint(one, 1, NOT_TOLD)
    told: list[int] = []
    trained = run_job(TRAIN, several, 1, told.append)
    assert told == [1] * 4
    held = run_job(rank_jobs.DIGESTS, several, 1, NOT_TOLD)
    checkpoint = several.folder / "checkpoints/round=1"
    assert held == [trained["lora_sha256"]] * 2 == [weights_sha256(checkpoint)] * 2
    weights = [load_file(config.folder / "checkpoints/round=1" / LORA_FILE) for config in (one, several)]
    flat = [torch.cat([tensor.flatten() for tensor in of.values()]).tolist() for of in weights]
    # Adam divides by the size of a gradient: one that is only rounding moves its weight too.
    assert relative(flat[1], flat[0]) < 5e-3
    losses = [
        [row["loss"] for row in read_rows(partition(c.folder, "updates", 1) / "part.parquet")] for c in (one, several)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    made_with = [json.loads((c.folder / "checkpoints/round=1/checkpoint.json").read_text()) for c in (one, several)]
    assert [record["processes"] for record in made_with] == [1, 2]


def test_rank_that_trained_apart_is_found_and_nothing_is_kept(copied: Callable[..., CampaignConfig]) -> None:
    config = copied("apart")
    with pytest.raises(RankError, match=r"rank 1 of 2 hold.* another LoRA .*rank 0 [0-9a-f]{12}, rank 1 [0-9a-f]{12}"):
        run_job(rank_jobs.APART, config, 1, NOT_TOLD)
    assert not list((config.folder / "checkpoints").glob("*"))  # nor what was saved on the way


def killing(number: int) -> Callable[[int], None]:
    """A ``tell`` that kills a worker when it is called first."""
    left = [number]

    def tell(count: int) -> None:
        for worker in left[:]:
            left.remove(worker)
            (member,) = (member for member in engine._crews["worker"].members if member.number == worker)
            os.kill(member.pid, signal.SIGKILL)

    return tell


def test_killed_worker_loses_only_what_is_in_its_hands(
    sampled: CampaignConfig, copied: Callable[..., CampaignConfig]
) -> None:
    config = copied("killed", without=SAMPLES)
    run_job(SAMPLE, config, 1, killing(1))
    expected = {k: v for k, v in drawn(sampled).items() if "contact_sheet" not in k and not k.startswith("samples")}
    assert drawn(config) == expected


def test_training_that_lost_a_worker_goes_on_from_its_last_update_and_ends_alike(
    copied: Callable[..., CampaignConfig],
) -> None:
    config, undisturbed = copied("killed"), copied("undisturbed")
    told: list[int] = []
    kill = killing(1)
    trained = run_job(TRAIN, config, 1, lambda count: (told.append(count), kill(count))[0])
    assert trained["num_updates"] == 4
    assert 4 <= len(told) <= 5  # the update that was lost is counted again
    run_job(TRAIN, undisturbed, 1, NOT_TOLD)
    folders = [c.folder / "checkpoints/round=1" for c in (config, undisturbed)]
    for name in (LORA_FILE, "optimizer.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert [path.name for path in (config.folder / "checkpoints").iterdir()] == ["round=1"]


def test_a_round_of_two_processes_goes_on_with_one(copied: Callable[..., CampaignConfig]) -> None:
    begun, undisturbed = copied("moved"), copied("undisturbed", processes=1)
    other = begun.model_copy(update={"compute": begun.compute.model_copy(update={"processes": 1})})
    told: list[int] = []

    def stop_at_the_third(count: int) -> None:
        told.append(count)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(TRAIN, begun, 1, stop_at_the_third)
    begin_round(other, 1)
    run_job(TRAIN, other, 1, told.append)
    train_checkpoint(undisturbed, 1, NOT_TOLD)
    assert len(told) < 7  # it did not start again
    weights = [load_file(config.folder / "checkpoints/round=1" / LORA_FILE) for config in (other, undisturbed)]
    flat = [torch.cat([tensor.flatten() for tensor in of.values()]).tolist() for of in weights]
    assert relative(flat[0], flat[1]) < 5e-3


def test_unforeseen_error_is_worth_a_retry_and_shows_its_traceback(copied: Callable[..., CampaignConfig]) -> None:
    with pytest.raises(RankError, match=r"worker 0 of 2 .* failed: 'unforeseen'; its log .*worker-0\.log") as caught:
        run_job(rank_ends.FAIL, copied("failing"), 1, NOT_TOLD)
    assert "in fail" in str(caught.value)
    assert not isinstance(caught.value, D3POError)


def test_what_a_user_can_mend_comes_from_a_worker_as_it_is(copied: Callable[..., CampaignConfig]) -> None:
    with pytest.raises(CampaignBusyError, match=r"^wait for it$"):
        run_job(rank_ends.MENDABLE, copied("mendable"), 1, NOT_TOLD)


def test_collective_that_hangs_is_given_up_and_tried_again(copied: Callable[..., CampaignConfig]) -> None:
    crew = engine._crews["worker"]
    config = copied("hanging", compute={"hang_seconds": 600})
    crew.compute = config.compute.model_copy(update={"hang_seconds": 5})
    crew.config = crew.config.model_copy(update={"compute": config.compute})
    assert run_job(rank_ends.HANG, config, 1, NOT_TOLD) == 2
    assert (config.folder / "hung").exists()


def test_nothing_of_a_private_ray_listens_on_another_interface(copied: Callable[..., CampaignConfig]) -> None:
    run_job(rank_ends.SIZE, copied("listening"), 1, NOT_TOLD)
    mine = psutil.Process()
    found = [c.laddr.ip for p in (mine, *mine.children(recursive=True)) for c in p.net_connections("inet")
             if c.status == psutil.CONN_LISTEN]  # fmt: skip
    assert len(found) > 5
    assert {ip.removeprefix("::ffff:") for ip in found} == {"127.0.0.1"}


PARENT = """
import sys, psutil
from d3po_core.config_values import load_config
from d3po_core.processes.engine import run_job
from tests.tasks.rank_ends import SIZE
values = {"runs_dir": sys.argv[1], "model": {"device": "cpu"}, "compute": {"processes": 2}}
def tell(count):
    print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
if __name__ == "__main__":
    run_job(SIZE, load_config(values, "test"), 9999, tell)
"""


def test_nothing_is_left_when_the_run_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    ) as parent:
        assert parent.stdout is not None
        started = [psutil.Process(int(number)) for number in parent.stdout.readline().split()]
        parent.kill()
    assert len(started) > 5
    deadline = time.monotonic() + 60
    while any(map(_lives, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [process for process in started if _lives(process)] == []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # some containers have nobody who buries the dead
    except psutil.NoSuchProcess:
        return False


def test_one_process_never_imports_ray(tmp_path: Path) -> None:
    script = (
        "import sys; from d3po_core.config import CampaignConfig; from d3po_core.processes.engine import run_job\n"
        "from tests.tasks.rank_ends import SQUARES\n"
        "print(run_job(SQUARES, CampaignConfig(), 0, print)[2][0], 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "4 False", done.stderr


def test_missing_ray_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(D3POError, match=r"need Ray: pip install 'd3po\[cluster\]'$"):
        connect(CampaignConfig().compute, 0, 2)


def asking(processes: int, device: str = "auto", address: str | None = None) -> CampaignConfig:
    compute = {"processes": processes, "address": address}
    return load_config({"model": {"device": device}, "compute": compute}, "test")


def test_more_processes_than_gpus_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_processes(asking(2))
    check_processes(asking(8, device="cpu"))
    check_processes(asking(8, address="auto"))
    with pytest.raises(D3POError, match=r"^compute\.processes is 4 but 2 CUDA devices are visible; .*lower") as caught:
        check_processes(asking(4))
    assert "\n" not in str(caught.value)


def test_non_finite_loss_of_ranks_is_what_one_process_raises(copied: Callable[..., CampaignConfig]) -> None:
    configs = {policy: copied(policy, guard={"policy": policy}) for policy in ("warn", "reject")}
    for config in configs.values():
        for shard in (config.folder / "trajectories/round=1").iterdir():
            tensors = load_file(shard)
            tensors["log_probs"][:, 1] = torch.nan
            save_file(tensors, shard)
    trained = run_job(TRAIN, configs["reject"], 1, NOT_TOLD)
    assert trained["num_updates"] == 0
    assert trained["failure"].startswith("update 0: loss nan")
    with pytest.raises(NonFiniteLossError, match=r"^update 0: loss nan, .*learning_rate"):
        run_job(TRAIN, configs["warn"], 1, NOT_TOLD)
