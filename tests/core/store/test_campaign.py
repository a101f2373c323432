"""A campaign's folder: which rounds are next, one writer at a time, frozen configurations, and a full disk."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.errors import CampaignBusyError, D3POError
from d3po_core.paths import PROJECT_ROOT
from d3po_core.records import DeriveRecord, TrainRecord
from d3po_core.store import tables
from d3po_core.store.campaign import (
    begin_round,
    campaign_id,
    campaign_lock,
    campaign_named,
    open_campaign,
    round_config,
)
from d3po_core.store.goals import end_run, rounds_to_do
from d3po_core.store.leftovers import discard_round, sweep_leftovers
from d3po_core.store.stages import (
    checkpoint_path,
    finish_stage,
    finished_rounds,
    last_finished_round,
    read_record,
    stage_path,
)
from d3po_core.store.tables import SCHEMAS, write_table


def finish_round(campaign: Path, number: int) -> None:
    a_value = {pa.string(): "x", pa.int64(): number, pa.float64(): 0.5, pa.timestamp("us"): datetime(2024, 5, 1)}
    row = {field.name: a_value[field.type] for field in SCHEMAS["rounds"]}
    row["checkpoint_out"] = checkpoint_path(number)
    write_table(campaign, "rounds", number, tables.table_from_rows("rounds", [row]))


def config_in(folder: Path, **changes: Any) -> CampaignConfig:
    return load_config({"campaign": "c", "runs_dir": str(folder), **changes}, "test")


def test_new_campaign_starts_with_the_base_model(tmp_path: Path) -> None:
    assert last_finished_round(tmp_path) == -1
    assert finished_rounds(tmp_path) == []
    assert rounds_to_do(tmp_path, 3, "run") == [0, 1, 2, 3]


def test_next_run_goes_on_after_the_last_finished_round(tmp_path: Path) -> None:
    with pytest.raises(D3POError, match="rounds is 1000000000; expected at most"):
        rounds_to_do(tmp_path, 10**9, "first")
    rounds_to_do(tmp_path, 1, "first")
    for number in (0, 1):
        finish_round(tmp_path, number)
    assert rounds_to_do(tmp_path, 2, "second") == [2, 3]


def test_base_evaluation_alone_does_not_count_as_a_round(tmp_path: Path) -> None:
    finish_round(tmp_path, 0)
    assert rounds_to_do(tmp_path, 2, "run") == [1, 2]


def test_retried_run_finishes_what_it_set_out_to_do(tmp_path: Path) -> None:
    assert rounds_to_do(tmp_path, 3, "run") == [0, 1, 2, 3]
    for number in (0, 1):
        finish_round(tmp_path, number)
    assert rounds_to_do(tmp_path, 3, "run") == [2, 3]
    for number in (2, 3):
        finish_round(tmp_path, number)
    assert rounds_to_do(tmp_path, 3, "run") == []


def test_same_command_given_again_ends_where_the_interrupted_one_would_have(tmp_path: Path) -> None:
    rounds_to_do(tmp_path, 3, "killed")
    for number in (0, 1):
        finish_round(tmp_path, number)
    assert rounds_to_do(tmp_path, 3, "again") == [2, 3]
    finish_round(tmp_path, 2)
    assert rounds_to_do(tmp_path, 3, "and again") == [3]
    finish_round(tmp_path, 3)
    assert rounds_to_do(tmp_path, 3, "killed after its last round") == []
    end_run(tmp_path, "killed after its last round")
    assert rounds_to_do(tmp_path, 3, "tomorrow") == [4, 5, 6]


def test_waiting_run_that_another_overtook_has_nothing_left_to_do(tmp_path: Path) -> None:
    assert rounds_to_do(tmp_path, 1, "waits") == [0, 1]
    assert rounds_to_do(tmp_path, 1, "overtakes") == [0, 1]
    for number in (0, 1):
        finish_round(tmp_path, number)
    end_run(tmp_path, "overtakes")
    assert rounds_to_do(tmp_path, 1, "tomorrow") == [2]
    assert rounds_to_do(tmp_path, 1, "waits") == []
    end_run(tmp_path, "waits")
    assert rounds_to_do(tmp_path, 1, "tomorrow") == [2]


def test_command_for_another_number_of_rounds_sets_a_new_goal(tmp_path: Path) -> None:
    rounds_to_do(tmp_path, 3, "killed")
    for number in (0, 1):
        finish_round(tmp_path, number)
    assert rounds_to_do(tmp_path, 1, "other") == [2]
    finish_round(tmp_path, 2)
    end_run(tmp_path, "other")
    assert rounds_to_do(tmp_path, 2, "third") == [3, 4]
    assert rounds_to_do(tmp_path, 3, "the first command again") == [3]


def test_run_that_sleeps_keeps_its_goal_whatever_other_runs_ask_for(tmp_path: Path) -> None:
    finish_round(tmp_path, 0)
    assert rounds_to_do(tmp_path, 3, "asleep") == [1, 2, 3]
    finish_round(tmp_path, 1)
    assert rounds_to_do(tmp_path, 1, "refused") == [2]
    assert rounds_to_do(tmp_path, 3, "asleep") == [2, 3]


def test_goal_that_the_first_version_wrote_is_understood(tmp_path: Path) -> None:
    finish_round(tmp_path, 0)
    (tmp_path / "target.json").write_text('{"last": 3, "rounds": 3, "run_id": "old"}')
    assert rounds_to_do(tmp_path, 3, "new") == [1, 2, 3]
    for number in (1, 2, 3):
        finish_round(tmp_path, number)
    (tmp_path / "target.json").write_text('{"last": 3, "rounds": 3, "run_id": "old"}')
    assert rounds_to_do(tmp_path, 3, "tomorrow") == [4, 5, 6]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), max_size=6))
def test_rounds_are_consecutive_and_killed_runs_lose_none(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[int, int]]
) -> None:
    """Runs that ask for some rounds and finish only the first few of them."""
    campaign, done = tmp_path_factory.mktemp("campaign"), -1
    for index, (rounds, finished) in enumerate(runs):
        to_do = rounds_to_do(campaign, rounds, f"run {index}")
        assert to_do == list(range(done + 1, done + 1 + len(to_do)))
        assert 1 <= len(to_do) <= rounds + (done == -1)
        for number in to_do[:finished]:
            finish_round(campaign, number)
            done = number
        if done == to_do[-1]:
            end_run(campaign, f"run {index}")
    assert last_finished_round(campaign) == done
    assert [record.round for record in finished_rounds(campaign)] == list(range(done + 1))


def test_tenth_round_comes_after_the_ninth(tmp_path: Path) -> None:
    for number in range(11):
        finish_round(tmp_path, number)
    assert last_finished_round(tmp_path) == 10
    assert [record.checkpoint for record in finished_rounds(tmp_path)][:2] == [None, "checkpoints/round=1"]


class Holder(NamedTuple):
    process: subprocess.Popen[str]
    campaign: Path


HOLD = """
import sys, time
from pathlib import Path
from d3po_core.store.campaign import campaign_lock
with campaign_lock(Path(sys.argv[1]), "run blue-fox"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    """Another process that holds the campaign."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "c")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT_ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield Holder(process, tmp_path / "c")
        finally:
            process.kill()


def test_lock_keeps_a_second_process_out_and_says_who_holds_it(holder: Holder) -> None:
    with pytest.raises(CampaignBusyError) as caught, campaign_lock(holder.campaign, "me"):
        pass
    assert f"process {holder.process.pid} (run blue-fox)" in str(caught.value)
    assert "campaign 'c'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lock_of_a_killed_process_is_free(holder: Holder) -> None:
    os.kill(holder.process.pid, signal.SIGKILL)
    holder.process.wait()
    with campaign_lock(holder.campaign, "me"):
        assert f"process {os.getpid()} (me)" in (holder.campaign / ".lock").read_text()


def test_lock_is_free_after_an_error_and_excludes_its_own_process(tmp_path: Path) -> None:
    def fail_while_holding() -> None:
        with campaign_lock(tmp_path, "first"):
            with pytest.raises(CampaignBusyError, match="first"), campaign_lock(tmp_path, "second"):
                pass
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_holding()
    with campaign_lock(tmp_path, "third"):
        pass


def test_campaigns_are_locked_one_by_one(holder: Holder) -> None:
    with campaign_lock(holder.campaign.with_name("other"), "me"):
        pass


@pytest.mark.parametrize("blocked", ["runs", "runs/c"])
def test_file_where_the_campaign_should_be_is_a_one_line_error(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("in the way")
    with pytest.raises(D3POError, match=r"cannot write .*runs_dir") as caught, campaign_lock(tmp_path / "runs/c", "me"):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_folder_that_cannot_be_written_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(D3POError) as caught, campaign_lock(tmp_path / "c", "me"):
        pass
    assert str(tmp_path / "c") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_opening_again_with_the_same_configuration_keeps_the_campaign(tmp_path: Path) -> None:
    open_campaign(config_in(tmp_path))
    identity = campaign_id(tmp_path / "c")
    open_campaign(config_in(tmp_path))
    assert campaign_id(tmp_path / "c") == identity
    shutil.rmtree(tmp_path / "c")
    open_campaign(config_in(tmp_path))
    assert campaign_id(tmp_path / "c") != identity


@pytest.mark.parametrize(
    ("change", "name", "old", "new"),
    [
        ({"seed": 7}, "seed", "0", "7"),
        ({"model": {"lora_rank": 3}}, "model.lora_rank", str(CampaignConfig().model.lora_rank), "3"),
        ({"model": {"path": "other"}}, "model.path", "'data/shapes/model'", "'other'"),
        ({"sample": {"num_steps": 7}}, "sample.num_steps", str(CampaignConfig().sample.num_steps), "7"),
        ({"sample": {"guidance_scale": 3.0}}, "sample.guidance_scale", "1.0", "3.0"),
        ({"sample": {"eta": 0.5}}, "sample.eta", "1.0", "0.5"),
        ({"evaluate": {"images_per_prompt": 99}}, "evaluate.images_per_prompt", "8", "99"),
        ({"evaluate": {"scorers": ["brightness"]}}, "evaluate.scorers", "[]", "['brightness']"),
    ],
)
def test_change_that_breaks_a_campaign_names_the_field_with_old_and_new(
    tmp_path: Path, change: dict[str, Any], name: str, old: str, new: str
) -> None:
    open_campaign(config_in(tmp_path))
    with pytest.raises(D3POError) as caught:
        open_campaign(config_in(tmp_path, **change))
    assert f"campaign 'c' was started with {name} = {old} (now {new})" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_fields_that_changed_are_named(tmp_path: Path) -> None:
    open_campaign(config_in(tmp_path))
    with pytest.raises(D3POError, match=r"seed = 0 \(now 7\); sample.eta = 1.0 \(now 0.5\)"):
        open_campaign(config_in(tmp_path, seed=7, sample={"eta": 0.5}))


def test_held_out_scorer_cannot_change_through_the_judge(tmp_path: Path) -> None:
    # evaluate.scorers is empty: the judge's scorers decide what eval_score_mean means.
    open_campaign(config_in(tmp_path))
    with pytest.raises(D3POError, match="scorers"):
        open_campaign(config_in(tmp_path, judge={"scorers": ["brightness"]}))


def test_changes_between_rounds_that_keep_numbers_comparable_are_allowed(tmp_path: Path) -> None:
    open_campaign(config_in(tmp_path))
    open_campaign(
        config_in(
            tmp_path,
            train={"learning_rate": 1e-5, "beta": 3.0},
            sample={"groups_per_round": 5, "batch_size": 3},
            judge={"pairs": "best_worst"},
        )
    )


TASTE: dict[str, Any] = {"judge": {"scorers": ["clip_score", "taste"]}, "evaluate": {"scorers": ["taste"]}}


def scoring(taste: str, clip: str = "a/b", **options: Any) -> dict[str, Any]:
    return {"scoring": {"models": {"taste": taste, "clip_score": clip}, **options}}


def test_server_that_evaluates_may_move_and_weights_that_evaluate_may_not(tmp_path: Path) -> None:
    open_campaign(config_in(tmp_path, **TASTE, **scoring("http://a/score")))
    open_campaign(config_in(tmp_path, **TASTE, **scoring("http://b/score", clip="c/d")))  # clip_score only judges
    with pytest.raises(D3POError, match=r"scoring\.models\.taste = 'http://a/score' \(now 'c/d'\)"):
        open_campaign(config_in(tmp_path, **TASTE, **scoring("c/d")))
    without = config_in(tmp_path, **TASTE, scoring={"models": {"clip_score": "a/b"}})
    with pytest.raises(D3POError, match=r"scoring\.models\.taste = 'http://a/score' \(now None\)"):
        open_campaign(without)


def test_begun_round_goes_on_with_a_server_elsewhere_and_with_no_other_weights(tmp_path: Path) -> None:
    begin_round(config_in(tmp_path, **TASTE, **scoring("http://a/score")), 1)
    begin_round(config_in(tmp_path, **TASTE, **scoring("https://b/score", batch_size=3, tries=9)), 1)
    with pytest.raises(D3POError, match=r"scoring\.models\.clip_score = 'a/b' \(now 'c/d'\)"):
        begin_round(config_in(tmp_path, **TASTE, **scoring("http://a/score", clip="c/d")), 1)


def test_begun_round_is_finished_with_its_own_configuration(tmp_path: Path) -> None:
    begin_round(config_in(tmp_path), 1)
    begin_round(config_in(tmp_path), 1)
    begin_round(config_in(tmp_path, train={"save_every_seconds": 5}), 1)
    with pytest.raises(D3POError) as caught:
        begin_round(config_in(tmp_path, train={"beta": 0.25}), 1)
    beta = CampaignConfig().train.beta
    assert f"round 1 of campaign 'c' was begun with train.beta = {beta} (now 0.25)" in str(caught.value)
    assert "discard-round" in str(caught.value)
    begin_round(config_in(tmp_path, train={"beta": 0.25}), 2)


def test_finished_stage_is_not_worked_again(tmp_path: Path) -> None:
    calls = []

    def work() -> DeriveRecord:
        calls.append(1)
        return DeriveRecord(num_pairs=3, num_ties=1, mean_agreement=None)

    first = finish_stage(tmp_path, 2, "derive", DeriveRecord, work)
    second = finish_stage(tmp_path, 2, "derive", DeriveRecord, work)
    assert first == second
    assert first.num_pairs == 3
    assert first.finished_at is not None
    assert calls == [1]


def test_record_of_training_that_the_first_versions_wrote_is_understood(tmp_path: Path) -> None:
    path = stage_path(tmp_path, 1, "train")
    path.parent.mkdir(parents=True)
    path.write_text(
        '{"seconds": 4.5, "finished_at": "2026-01-01T00:00:00Z", "checkpoint": "checkpoints/round=1", '
        '"lora_sha256": "a", "num_updates": 4, "loss": 0.69, '
        '"margin": 0.001, "pair_accuracy": 0.51, "kl": 1e-5, "clip_fraction": 0.0, '
        '"failure": null}'
    )
    record = read_record(tmp_path, 1, "train", TrainRecord)
    assert (record.loss, record.margin_before, record.pair_accuracy_before) == (0.69, 0.001, 0.51)
    assert (record.kl_before, record.kl_after, record.pair_accuracy_after) == (None, None, None)


def test_failed_stage_leaves_no_record(tmp_path: Path) -> None:
    def work() -> DeriveRecord:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        finish_stage(tmp_path, 2, "derive", DeriveRecord, work)
    assert not stage_path(tmp_path, 2, "derive").exists()


def make_files(campaign: Path, number: int) -> set[Path]:
    names = [f"{table}/round={number}/part.parquet" for table in SCHEMAS if table != "rounds"]
    names += [
        f"stages/round={number}/config.json", f"stages/round={number}/sample.json",
        f"images/round={number}/r{number}-g0-m0.png", f"trajectories/round={number}/shard-0000.safetensors",
        f"staging/round={number}/shard-0000.parquet", f"checkpoints/round={number}/pytorch_lora_weights.safetensors",
        f"checkpoints/round={number}-update=000002/optimizer.safetensors", f"checkpoints/.round={number}.tmp/half",
    ]  # fmt: skip
    for name in names:
        (campaign / name).parent.mkdir(parents=True, exist_ok=True)
        (campaign / name).touch()
    return {campaign / name for name in names}


def test_discarded_round_leaves_the_finished_ones_whole(tmp_path: Path) -> None:
    kept = set()
    for number in (0, 1):
        finish_round(tmp_path, number)
        kept |= make_files(tmp_path, number)
    kept |= make_files(tmp_path, 20) | make_files(tmp_path, 12)  # of names that begin alike
    dropped = make_files(tmp_path, 2)
    rounds_to_do(tmp_path, 4, "killed")
    assert discard_round(tmp_path) == 2
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in dropped)
    assert last_finished_round(tmp_path) == 1
    assert rounds_to_do(tmp_path, 1, "new") == [2]
    assert list(tmp_path.rglob("*round=2")) == []


def test_nothing_is_discarded_when_no_round_was_begun(tmp_path: Path) -> None:
    for number in (0, 1):
        finish_round(tmp_path, number)
    kept = make_files(tmp_path, 1)
    assert discard_round(tmp_path) is None
    assert all(path.exists() for path in kept)
    assert last_finished_round(tmp_path) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": {}}'])
def test_damaged_campaign_file_is_a_one_line_error(tmp_path: Path, text: str) -> None:
    open_campaign(config_in(tmp_path))
    (tmp_path / "c" / "campaign.json").write_text(text)
    with pytest.raises(D3POError) as caught:
        open_campaign(config_in(tmp_path, seed=3))
    assert "\n" not in str(caught.value)
    if text != '{"config": {}}':  # readable, of another campaign
        with pytest.raises(D3POError, match=r"campaign.json: cannot be read .*; restore it"):
            campaign_named(str(tmp_path / "c"))


def test_saved_configuration_is_the_resolved_one(tmp_path: Path) -> None:
    config = config_in(tmp_path, train={"beta": 2.5})
    open_campaign(config)
    saved = json.loads((tmp_path / "c" / "campaign.json").read_text())["config"]
    assert load_config(saved, "saved") == config


def test_what_a_killed_command_left_is_swept_and_what_is_being_written_stays(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    places = ("", "report/", "judgements/round=1/", "judgements/round=3/", "comparisons/", "comparisons/round=2/")
    for pid in (gone.pid, os.getppid()):
        for place in places:
            path = tmp_path / place / f".a.{pid}.tmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    sweep_leftovers(tmp_path, 3)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(".*.tmp")}
    assert left == {f"{place}.a.{os.getppid()}.tmp" for place in places}


def test_the_same_file_typed_in_another_way_is_no_change(tmp_path: Path) -> None:
    shipped = "data/prompts/shapes_eval.txt"
    typed = load_config({"runs_dir": str(tmp_path), "evaluate": {"prompts": shipped}}, "test")
    absolute = load_config({"runs_dir": str(tmp_path), "evaluate": {"prompts": str(PROJECT_ROOT / shipped)}}, "test")
    for config in (typed, absolute):
        open_campaign(config)
        begin_round(config, 0)
    other = load_config({"runs_dir": str(tmp_path), "evaluate": {"prompts": str(tmp_path / shipped)}}, "test")
    with pytest.raises(D3POError, match=r"evaluate\.prompts = .*shapes_eval\.txt' \(now"):
        open_campaign(other)


def test_a_round_of_an_earlier_version_opens_and_its_setting_typed_today_is_refused(tmp_path: Path) -> None:
    values = CampaignConfig(campaign="old", runs_dir=str(tmp_path)).model_dump(mode="json")
    del values["compute"]
    values["model"] |= {"processes": 2, "launcher": "local"}
    path = tmp_path / "old" / "stages" / "round=1" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(values))
    assert round_config(tmp_path / "old", 1).compute.processes == 2
    with pytest.raises(D3POError, match=r"model\.processes is not a field; did you mean 'compute\.processes'\?"):
        load_config({"model": {"processes": 2}}, "test")
