"""The line of a finished round."""

import math
from pathlib import Path
from typing import Any

import pytest

from d3po.tasks import round_line as round_line_module
from d3po.tasks.round_line import campaign_line, round_line, told
from d3po_core.config import CampaignConfig
from d3po_core.records import GuardRecord, RoundRecord, ScoreSummary
from d3po_core.store.goals import rounds_to_do
from d3po_core.store.stages import finished_rounds, stage_path

SCORE = ScoreSummary(mean=0.7126, low=0.6, high=0.8)


def finished(number: int) -> RoundRecord:
    return RoundRecord(
        round=number, num_pairs=58, num_ties=4, eval_scorer="taste", score=SCORE, checkpoint=None, mlflow_run_id=None,
        stage_seconds={},
    )  # fmt: skip


def guarded(verdict: Any, champion: int) -> GuardRecord:
    return GuardRecord(verdict=verdict, findings=[], go_on_from=champion, champion=champion, win_rates={})


@pytest.mark.parametrize(
    ("number", "guard", "line"),
    [
        (0, guarded("ok", 0), "base model: held-out taste 0.713 [0.600, 0.800]"),
        (3, guarded("ok", 3), "round 3 of 12: held-out taste 0.713 [0.600, 0.800], the new champion, 58 pairs, 4 ties"),
        (
            3,
            guarded("rejected", 0),
            "round 3 of 12: held-out taste 0.713 [0.600, 0.800], rejected, champion the base, 58 pairs, 4 ties",
        ),
    ],
)
def test_a_round_is_told_with_score_verdict_and_champion(number: int, guard: GuardRecord, line: str) -> None:
    assert told(finished(number), guard, 12) == line


def test_the_target_is_the_runs(config: CampaignConfig, campaign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = config.model_copy(update={"runs_dir": str(campaign.parent)})
    rounds_to_do(here.folder, 7, "run")
    path = stage_path(here.folder, 2, "guard")
    path.write_text(guarded("warned", 1).model_dump_json())
    monkeypatch.setattr(round_line_module, "read_record", lambda *_: GuardRecord.model_validate_json(path.read_text()))
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "run")
    line = round_line(here, finished(2))
    assert line.startswith("round 2 of 9: held-out taste 0.713 [0.600, 0.800], warned, champion round 1, 58 pairs")


def test_a_run_is_told_with_the_scores_before_and_after(config: CampaignConfig) -> None:
    records = finished_rounds(config.folder)
    change = f"held-out {records[0].score.mean:.3f} -> {records[-1].score.mean:.3f}"
    assert campaign_line(config, [1, 2]) == f"campaign tiny: rounds 1 to 2 finished, {change}"
    assert campaign_line(config, [2]) == f"campaign tiny: round 2 finished, {change}"
    assert campaign_line(config, []) == "campaign tiny: no round was left to do"


def test_a_score_without_an_interval_survives_prefects_watch() -> None:
    from rich.text import Text

    few = finished(0).model_copy(update={"score": ScoreSummary(mean=0.7, low=-math.inf, high=math.inf)})
    line = told(few, guarded("ok", 0), 1)
    assert Text.from_markup(line).plain == line
    assert line.endswith("0.700 (too few to tell)")
