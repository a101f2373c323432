"""Several processes at one job: the same images and update as one process, and nobody left when one of them dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from d3po.tasks.judging import _derive, _judge
from d3po.tasks.sampling import _sample
from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.config_values import load_config
from d3po_core.devices import check_processes
from d3po_core.errors import CampaignBusyError, D3POError, NonFiniteLossError, RankError
from d3po_core.evaluation.job import draw_held_out
from d3po_core.models.weights import LORA_FILE, weights_sha256
from d3po_core.processes import pool as ranks
from d3po_core.processes.pool import RankPool, run_job
from d3po_core.sampling.job import sample_shards
from d3po_core.store.campaign import begin_round, open_campaign
from d3po_core.store.tables import partition, read_rows
from d3po_core.training.job import train_checkpoint
from tests.tasks import rank_ends, rank_jobs
from tests.tasks.conftest import HELD_OUT, SETTINGS, TRAIN

NOT_TOLD: Callable[[int], None] = lambda count: None  # noqa: E731


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> CampaignConfig:
    """A campaign whose first round one process has sampled and judged."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, prompts in (("train", TRAIN), ("held_out", HELD_OUT)):
        (folder / f"{name}.txt").write_text("\n".join(prompts))
    values = json.loads(json.dumps(SETTINGS)) | {"runs_dir": str(folder / "runs")}
    values["sample"]["prompts"] = str(folder / "train.txt")
    values["evaluate"]["prompts"] = str(folder / "held_out.txt")
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
        values["model"]["processes"] = processes
        for section, changes in sections.items():
            values[section] |= changes
        config = load_config(values, "test")
        shutil.copytree(sampled.folder, config.folder, ignore=shutil.ignore_patterns(*without))
        return config

    return copy


@pytest.fixture(scope="module")
def pools() -> Iterator[list[RankPool]]:
    """The two ranks that tests share, for as long as none ends them."""
    pools: list[RankPool] = []
    yield pools
    for pool in pools:
        pool.close()
        assert not pool.alive


@pytest.fixture
def pool(pools: list[RankPool], tmp_path_factory: pytest.TempPathFactory) -> RankPool:
    """Two ranks."""
    if not pools or not pools[-1].alive:
        pools.append(RankPool(2, "cpu", tmp_path_factory.mktemp("logs")))
    return pools[-1]


@pytest.fixture(autouse=True)
def no_rank_is_left() -> Iterator[None]:
    yield
    started = [rank.process for pool in ranks._pools.values() for rank in pool.ranks]
    ranks.end_ranks()
    assert all(process.poll() is not None for process in started)


SAMPLES = ("samples", "staging", "trajectories", "images")


def drawn(config: CampaignConfig) -> dict[str, bytes]:
    """Trajectories, rows and images of round 1 by their path."""
    files = [path for name in SAMPLES for path in (config.folder / name / "round=1").glob("*")]
    return {str(path.relative_to(config.folder)): path.read_bytes() for path in files}


def test_ranks_draw_the_images_and_trajectories_of_one_process(
    sampled: CampaignConfig, copied: Callable[..., CampaignConfig], pool: RankPool
) -> None:
    config = copied("again", without=SAMPLES)
    told: list[int] = []
    pool.run(sample_shards, config, 1, told.append)
    assert sorted(told) == [3, 6, 6]  # three shards, of two, two and one group
    expected = {k: v for k, v in drawn(sampled).items() if "contact_sheet" not in k and not k.startswith("samples")}
    assert len(expected) == 3 + 3 + 15
    assert drawn(config) == expected


def test_ranks_draw_the_held_out_images_of_one_process_and_find_its_drift(
    copied: Callable[..., CampaignConfig], pool: RankPool
) -> None:
    several, one = copied("several"), copied("one", processes=1)
    for config in (one, several):
        run_job(train_checkpoint, one.model_copy(update={"runs_dir": config.runs_dir}), 1, NOT_TOLD)
    told: list[int] = []
    expected = draw_held_out(one, 1, NOT_TOLD)
    assert expected > 1e-3
    assert pool.run(draw_held_out, several, 1, told.append) == pytest.approx(expected, rel=1e-5)
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
        (rank_jobs.gradient, {}, 1e-4),
        (rank_jobs.gradient, {"train": {"micro_batch": 2}}, 1e-4),
        (rank_jobs.gradient, {"train": {"reference": "base"}}, 1e-4),
        (rank_jobs.gradient, {"train": {"objective": "kto", "settings": {"beta": 50}, "reference": "base"}}, 1e-4),
        (rank_jobs.gradient_of_one_cell, {}, 1e-4),
        (rank_jobs.gradient_short_of_memory, {}, 1e-4),
        (rank_jobs.gradient, {"model": {"precision": "fp16"}, "train": {"beta": 1.0}}, 1e-2),
        (rank_jobs.gradient, {"model": {"train": "full"}}, 1e-4),
    ],
    ids=["plain", "groups larger than a micro-batch", "base as reference", "a mean over the update",
         "less to do than ranks",
         "a rank short of memory", "half precision", "all weights"],
)  # fmt: skip
def test_gradient_over_ranks_is_that_of_one_process(
    job: Any, changes: dict[str, Any], tolerance: float, copied: Callable[..., CampaignConfig], pool: RankPool
) -> None:
    changes = {**changes, "train": {**changes.get("train", {}), "updates_per_round": 1}}
    config = copied("several", **changes)
    expected, found = job(config, 1, NOT_TOLD), pool.run(job, config, 1, NOT_TOLD)
    assert relative(found["gradient"], expected["gradient"]) < tolerance
    assert found["seen"] == pytest.approx(expected["seen"], rel=tolerance, abs=1e-5)
    assert [row["step"] for row in found["per_step"]] == [row["step"] for row in expected["per_step"]]
    for row, other in zip(found["per_step"], expected["per_step"], strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=1e-5)


def test_overflow_on_one_rank_takes_the_update_again_on_all(
    copied: Callable[..., CampaignConfig], pool: RankPool
) -> None:
    changes = {"model": {"precision": "fp16"}, "train": {"beta": 1.0, "updates_per_round": 1}}
    config = copied("several", **changes)
    expected = rank_jobs.gradient(config, 1, NOT_TOLD)
    found = pool.run(rank_jobs.gradient_overflowing_once, config, 1, NOT_TOLD)
    assert found["loss_scale"] == expected["loss_scale"] / 8
    assert relative(found["gradient"], expected["gradient"]) < 1e-2
    assert found["seen"] == pytest.approx(expected["seen"], rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("train", [{}, {"micro_batch": 2}, {"reference": "base"}], ids=str)
def test_trained_lora_is_that_of_one_process_and_the_same_on_all_ranks(
    train: dict[str, Any], copied: Callable[..., CampaignConfig], pool: RankPool
) -> None:
    one, several = copied("one", processes=1, train=train), copied("several", train=train)
    train_checkpoint(one, 1, NOT_TOLD)
    told: list[int] = []
    trained = pool.run(train_checkpoint, several, 1, told.append)
    assert told == [1] * 4
    pool.run(rank_jobs.save_own_lora, several, 1, NOT_TOLD)
    held = [weights_sha256(several.folder / f"of-rank-{rank}") for rank in (0, 1)]
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
        run_job(rank_jobs.train_apart, config, 1, NOT_TOLD)
    assert not list((config.folder / "checkpoints").iterdir())  # nor what was saved on the way


def killing(
    config: CampaignConfig, at: int, hold_other: bool
) -> tuple[Callable[[int], None], list[subprocess.Popen[str]]]:
    """A ``tell`` that kills rank 1 at the given call, and the ranks' processes when it has.

    Rank 0 can be held meanwhile: it could finish before it is ended.
    """
    seen: list[subprocess.Popen[str]] = []
    calls = 0

    def tell(count: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            (pool,) = ranks._pools.values()
            seen.extend(rank.process for rank in pool.ranks)
            if hold_other:
                os.kill(seen[0].pid, signal.SIGSTOP)
            os.kill(seen[1].pid, signal.SIGKILL)

    return tell, seen


@pytest.mark.parametrize("stage", ["sample", "train"])
def test_killed_rank_fails_the_job_with_its_log_and_the_retry_ends_alike(
    stage: str, copied: Callable[..., CampaignConfig], pool: RankPool
) -> None:
    # A group a shard: whoever tells of a shard first has another one to draw.
    cut = {"without": SAMPLES, "sample": {"batch_size": 3}} if stage == "sample" else {}
    config = copied("killed", **cut)
    tell, seen = killing(config, at=1, hold_other=stage == "sample")
    log = config.folder / "logs" / "rank-1.log"
    with pytest.raises(RankError, match=rf"rank 1 of 2 was ended by SIGKILL; its log {log}"):
        run_job(sample_shards if stage == "sample" else train_checkpoint, config, 1, tell)
    assert [process.poll() is not None for process in seen] == [True, True]
    if stage == "sample":
        assert len(list((config.folder / "staging/round=1").glob("*.parquet"))) < 5, "it was killed when all was done"
        undisturbed = copied("undisturbed", processes=1, **cut)
        for each in (config, undisturbed):
            _sample(each, 1)
        assert drawn(config) == drawn(undisturbed)
        return
    left = list((config.folder / "checkpoints").iterdir())
    assert [path.name for path in left if not path.name.startswith(".")] in ([], ["round=1-update=000001"])
    undisturbed = copied("undisturbed")
    for each in (config, undisturbed):
        pool.run(train_checkpoint, each, 1, NOT_TOLD)
    folders = [c.folder / "checkpoints/round=1" for c in (config, undisturbed)]
    for name in (LORA_FILE, "optimizer.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert [path.name for path in (config.folder / "checkpoints").iterdir()] == ["round=1"]


def test_dead_rank_takes_those_along_that_wait_for_it(copied: Callable[..., CampaignConfig]) -> None:
    config = copied("dead")
    half_written = config.folder / "images/round=1/.r1-e0.png.7.tmp"
    half_written.touch()
    with pytest.raises(RankError) as caught:
        run_job(rank_ends.die, config, 1, NOT_TOLD)
    assert not half_written.exists()
    message = str(caught.value)
    assert message.startswith(f"rank 1 of 2 ended with exit code 3; its log {config.folder}/logs/rank-1.log ends with:")
    assert "the last words of rank 1" in message
    assert "rank 0" not in message


def test_unforeseen_error_of_a_rank_is_worth_a_retry_and_shows_its_traceback(
    copied: Callable[..., CampaignConfig],
) -> None:
    config = copied("failing")
    with pytest.raises(
        RankError, match=r"rank 0 of 2 failed: 'unforeseen'; its log .*rank-0\.log ends with:"
    ) as caught:
        run_job(rank_ends.fail, config, 1, NOT_TOLD)
    assert "in fail" in str(caught.value)
    assert not isinstance(caught.value, D3POError)


def test_what_a_user_can_mend_comes_from_a_rank_as_it_is(copied: Callable[..., CampaignConfig]) -> None:
    config = copied("mendable")
    with pytest.raises(CampaignBusyError, match=r"^wait for it$"):
        run_job(rank_ends.meet_a_mendable_error, config, 1, NOT_TOLD)


PARENT = """
import sys, torch
from pathlib import Path
from d3po_core.config import CampaignConfig
from d3po_core.processes.pool import RankPool
from tests.tasks.rank_ends import work_without_end
torch.set_num_threads(2)
pool = RankPool(2, "cpu", Path(sys.argv[1]))
print(*(rank.process.pid for rank in pool.ranks), flush=True)
pool.run(work_without_end, CampaignConfig(), 1, lambda count: print("working", flush=True))
"""


def test_ranks_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        numbers = [int(number) for number in parent.stdout.readline().split()]
        workers = [psutil.Process(number) for number in numbers]
        assert [parent.stdout.readline().strip() for _ in workers] == ["working"] * 2
        parent.kill()
    assert len(workers) == 2
    gone, alive = psutil.wait_procs(workers, timeout=20)
    for process in alive:
        process.kill()
    assert len(gone) == 2


def test_more_processes_than_gpus_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_processes(ModelConfig(processes=2))
    check_processes(ModelConfig(processes=8, device="cpu"))
    with pytest.raises(D3POError, match=r"^model\.processes is 4 but 2 CUDA devices are visible; .*lower") as caught:
        check_processes(ModelConfig(processes=4))
    assert "\n" not in str(caught.value)


def test_non_finite_loss_of_ranks_is_what_one_process_raises(
    copied: Callable[..., CampaignConfig], pool: RankPool
) -> None:
    configs = {policy: copied(policy, guard={"policy": policy}) for policy in ("warn", "reject")}
    for config in configs.values():
        for shard in (config.folder / "trajectories/round=1").iterdir():
            tensors = load_file(shard)
            tensors["log_probs"][:, 1] = torch.nan
            save_file(tensors, shard)
    trained = pool.run(train_checkpoint, configs["reject"], 1, NOT_TOLD)
    assert trained["num_updates"] == 0
    assert trained["failure"].startswith("update 0: loss nan")
    with pytest.raises(NonFiniteLossError, match=r"^update 0: loss nan, .*learning_rate"):
        pool.run(train_checkpoint, configs["warn"], 1, NOT_TOLD)
    assert not pool.alive
