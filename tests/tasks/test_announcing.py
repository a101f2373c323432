"""What Prefect's lists and pages say of a run: its name, its tags, who it waits for."""

from pathlib import Path

import pytest

from d3po.tasks.announcing import waits_for
from d3po.tasks.run_names import run_name, run_tags
from d3po_core.config import CampaignConfig
from d3po_core.page.access import Raters
from d3po_core.people.tally import Progress

PROGRESS = Progress(groups_needed=24, groups_done=3, judgements=3, raters=1, asked=24, missing=21, complete=False)


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        (None, "shapes"), ([3], "shapes: round 3"), ([3, 4, 5, 6], "shapes: rounds 3-6"), ([0, 1], "shapes: round 1"),
        ([0, 1, 2], "shapes: rounds 1-2"), ([], "shapes: nothing left to do"),
    ],
)  # fmt: skip
def test_a_run_is_named_by_its_campaign_and_rounds(numbers: list[int] | None, name: str) -> None:
    assert run_name("shapes", numbers) == name


def test_a_run_without_a_deployment_is_tagged_with_campaign_and_labeller() -> None:
    assert run_tags(CampaignConfig(campaign="mine")) == ["campaign:mine", "labeller:proxy"]


def test_a_wait_says_for_whom_where_and_until_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    monkeypatch.setenv("D3PO_LABEL_URL", "http://127.0.0.1:9")
    assert waits_for(2, None, PROGRESS) == (
        "round 2 waits for people at http://127.0.0.1:9: 21 of 24 groups to judge; nobody has a link yet, "
        "type: d3po label --rater NAME"
    )
    for name in ("bob", "ann"):
        Raters(tmp_path).token(name)
    assert waits_for(2, "2026-01-02T03:04:05.678+00:00", PROGRESS) == (
        "round 2 waits for ann, bob at http://127.0.0.1:9: 21 of 24 groups to judge until 2026-01-02T03:04 UTC"
    )
    for name in ("cho", "dan", "eve"):
        Raters(tmp_path).token(name)
    assert "waits for ann, bob, cho and 2 more at" in waits_for(2, None, PROGRESS)
