"""Pruning: only what can be made again, only of finished rounds, and a plan that says so beforehand."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.errors import D3POError
from d3po_core.store.prune import apply_prune, plan_prune
from tests.core.small_campaign import write_campaign


def fill(campaign: Path) -> None:
    """Give rounds 1 to 4 the files that runs leave, and round 5 those of a round that is under way."""
    for number in range(1, 6):
        name = f"round={number}"
        for file in (
            f"trajectories/{name}/shard-0000.safetensors",
            f"staging/{name}/shard-0000.parquet",
            f"images/{name}/contact_sheet.png",
            f"images/{name}/.r1-g0-m0.png.77.tmp",
            f"judgements/{name}/.web.77.tmp",
            f"checkpoints/{name}/pytorch_lora_weights.safetensors",
            f"checkpoints/{name}/optimizer.safetensors",
            f"checkpoints/{name}-update=000002/optimizer.safetensors",
            f"checkpoints/{name}-update=000002/unet/config.json",
            f"checkpoints/.{name}.tmp/optimizer.safetensors",
        ):
            (campaign / file).parent.mkdir(parents=True, exist_ok=True)
            (campaign / file).write_bytes(b"x" * (10 + number))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    campaign = write_campaign(tmp_path_factory.mktemp("runs"))
    fill(campaign)
    return campaign


@pytest.fixture
def campaign(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "small"))


def files(campaign: Path) -> set[str]:
    return {str(path.relative_to(campaign)) for path in campaign.rglob("*") if path.is_file()}


def remade(number: int) -> set[str]:
    name = f"round={number}"
    return {
        f"trajectories/{name}/shard-0000.safetensors",
        f"staging/{name}/shard-0000.parquet",
        f"images/{name}/.r1-g0-m0.png.77.tmp",
        f"checkpoints/{name}-update=000002/optimizer.safetensors",
        f"checkpoints/{name}-update=000002/unet/config.json",
        f"checkpoints/.{name}.tmp/optimizer.safetensors",
    }


def test_all_that_can_be_made_again_goes_and_nothing_else(campaign: Path) -> None:
    before = files(campaign)
    apply_prune(campaign, plan_prune(campaign))
    assert before - files(campaign) == set.union(*(remade(number) for number in (1, 2, 3, 4)))


def test_plan_alone_removes_nothing(campaign: Path) -> None:
    before = files(campaign)
    plan_prune(campaign)
    assert files(campaign) == before


@given(keep=st.integers(0, 7))
def test_last_rounds_are_kept(original: Path, keep: int) -> None:
    # Round 0, the base model, is finished too and has nothing to drop.
    planned = {str(path.relative_to(original)) for path in plan_prune(original, keep).files}
    assert planned == set().union(*(remade(number) for number in range(1, 5 - min(keep, 4))))


def test_round_without_its_row_is_not_touched(campaign: Path) -> None:
    shutil.rmtree(campaign / "rounds" / "round=4")
    apply_prune(campaign, plan_prune(campaign))
    assert remade(4) | remade(5) <= files(campaign)
    assert not remade(3) & files(campaign)


def test_rounds_whose_numbers_begin_alike_are_told_apart(campaign: Path) -> None:
    for path in (campaign / "trajectories" / "round=11", campaign / "checkpoints" / "round=11-update=000001"):
        path.mkdir()
        (path / "x").write_bytes(b"x")
    apply_prune(campaign, plan_prune(campaign))
    assert {"trajectories/round=11/x", "checkpoints/round=11-update=000001/x"} <= files(campaign)


def test_plan_says_how_many_bytes_of_which_kind_go(campaign: Path) -> None:
    total = sum((campaign / file).stat().st_size for file in files(campaign))
    plan = plan_prune(campaign, keep_rounds=2)
    usage = {kind.kind: kind for kind in plan.usage}
    assert sum(kind.bytes for kind in plan.usage) == total
    assert usage["trajectories"].bytes == 11 + 12 + 13 + 14 + 15
    assert usage["trajectories"].dropped_bytes == usage["staging"].dropped_bytes == 11 + 12
    assert usage["trajectories"].dropped_files == 2
    assert usage["checkpoints"].dropped_bytes == 3 * (11 + 12)
    assert usage["tables"].dropped_files == usage["other"].dropped_files == 0
    apply_prune(campaign, plan)
    left = sum((campaign / file).stat().st_size for file in files(campaign))
    assert total - left == plan.bytes


def test_empty_folders_do_not_stay_and_pruning_twice_is_pruning_once(campaign: Path) -> None:
    apply_prune(campaign, plan_prune(campaign))
    assert {path.name for path in (campaign / "trajectories").iterdir()} == {"round=5"}
    assert {path.name for path in (campaign / "staging").iterdir()} == {"round=5"}
    assert len(list((campaign / "checkpoints").iterdir())) == 5 + 2
    again = plan_prune(campaign)
    assert again.files == ()
    apply_prune(campaign, again)


def test_pruning_that_was_killed_is_finished_by_the_next(campaign: Path) -> None:
    plan = plan_prune(campaign)
    plan.files[0].unlink()
    apply_prune(campaign, plan)
    assert plan_prune(campaign).files == ()


def test_number_of_rounds_to_keep_is_not_negative(campaign: Path) -> None:
    with pytest.raises(D3POError, match="--keep-rounds is -1; expected 0 or more"):
        plan_prune(campaign, -1)
