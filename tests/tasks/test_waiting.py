"""When a round stops waiting for people, and the runs that may not wait at all."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from d3po.tasks.waiting import _how_it_ended, require_deployment
from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.people.tally import Progress


def human(**changes: Any) -> CampaignConfig:
    return load_config({"campaign": "hands", "judge": {"labeller": "human", "people": changes}}, "test")


def after(hours: float | None, config: CampaignConfig, done: int = 2) -> str | None:
    """How a wait of three groups ended whose deadline was so many hours ago, without end for None."""
    deadline = None if hours is None else (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
    progress = Progress(3, done, judgements=done, raters=1, asked=3, missing=3 - done, complete=done == 3)
    return _how_it_ended(config, 1, {"deadline": deadline}, progress)


def test_round_waits_until_all_is_judged_or_its_deadline() -> None:
    assert after(None, human()) is None
    assert after(-1, human(after_deadline="fail")) is None
    assert after(None, human(), done=3) == "complete"
    assert after(1, human(after_deadline="fail"), done=3) == "complete"


def test_deadline_does_what_the_policy_says() -> None:
    assert after(1, human(after_deadline="go_on")) == "go_on"
    assert after(1, human(after_deadline="proxy")) == "proxy"
    with pytest.raises(D3POError, match=r"round 1 of campaign 'hands': the deadline .* passed with 1 of 3 groups miss"):
        after(1, human(after_deadline="fail"))


def test_people_need_a_deployment_before_anything_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    with pytest.raises(D3POError, match=r"needs a deployment; type: d3po up, then: d3po submit human"):
        require_deployment(human(), [0, 1])
    require_deployment(human(), [0])  # the base model is judged by nobody
    require_deployment(CampaignConfig(), [0, 1])


def test_people_judge_only_where_their_page_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "data"))
    elsewhere = human().model_copy(update={"runs_dir": str(tmp_path / "disk")})
    with pytest.raises(D3POError, match=r"runs_dir is .*disk', where neither the labelling page nor .*set D3PO_DATA"):
        require_deployment(elsewhere, [1])
    require_deployment(elsewhere.model_copy(update={"judge": CampaignConfig().judge}), [1])
