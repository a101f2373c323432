"""What a finding of the guard does to the rounds that follow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from d3po_core.evaluation.comparison import round_named
from d3po_core.store.stages import finished_rounds
from d3po_core.store.tables import partition, read_rows

SMALL: dict[str, Any] = {
    "sample": {"groups_per_round": 4, "group_size": 4, "num_steps": 3},
    "train": {"updates_per_round": 2},
    "judge": {"scorers": ["brightness"]},  # never ties, so that every round trains
    "evaluate": {"images_per_prompt": 2, "max_prompts": 6, "unseen": ["prompt_alignment"]},
}


def run(run_rounds: Callable[..., int], data: Path, policy: str, rounds: int, **bounds: Any) -> tuple[int, str, Path]:
    """Rounds under a policy; gives the exit code, the message and the campaign's folder."""
    name = f"guard-{policy}"
    code = run_rounds({**SMALL, "campaign": name, "guard": {"policy": policy, **bounds}}, rounds)
    return code, (data / f"{name}.message").read_text(), data / "runs" / name


def row_of(campaign: Path, number: int) -> dict[str, Any]:
    return read_rows(partition(campaign, "rounds", number) / "part.parquet")[0]


def test_rejected_round_is_kept_and_the_next_starts_from_the_champion(
    run_rounds: Callable[..., int], data: Path
) -> None:
    code, _, campaign = run(run_rounds, data, "reject", 2, max_drift=1e-12)  # no training stays below that
    assert code == 0
    assert [record.verdict for record in finished_rounds(campaign)] == ["ok", "rejected", "rejected"]
    second = row_of(campaign, 2)
    assert second["checkpoint_in"] is None, "round 2 started from the rejected checkpoint"
    assert second["champion"] == 0
    assert "drift from the base" in second["findings"]
    assert {sample["checkpoint"] for sample in read_rows(partition(campaign, "samples", 2) / "part.parquet")} == {None}
    seeds = [{s["seed"] for s in read_rows(partition(campaign, "samples", n) / "part.parquet")} for n in (1, 2)]
    assert seeds[0].isdisjoint(seeds[1]), "the next try repeats the seeds that led to the rejected checkpoint"
    assert (campaign / row_of(campaign, 1)["checkpoint_out"] / "pytorch_lora_weights.safetensors").exists()
    assert round_named(campaign, "champion") == 0


def test_stopped_campaign_goes_on_only_when_told(run_rounds: Callable[..., int], data: Path) -> None:
    code, message, campaign = run(run_rounds, data, "stop", 2, max_drift=1e-12)
    assert code != 0
    assert "the guard stopped campaign 'guard-stop' in round 1" in message
    assert [record.verdict for record in finished_rounds(campaign)] == ["ok", "stopped"]
    assert run(run_rounds, data, "stop", 2, max_drift=1e-12)[0] != 0
    assert len(finished_rounds(campaign)) == 2
    values = {**SMALL, "campaign": "guard-stop", "guard": {"policy": "warn"}}
    assert run_rounds(values, 1) == 0
    assert row_of(campaign, 2)["checkpoint_in"] is None
