"""Quotas and the split of groups, through the desk: twenty raters, random turns, somebody revoked in the middle."""

import random
import uuid
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from d3po_core.config import CampaignConfig
from d3po_core.page.desk import Desk, UnfitError
from d3po_core.people.invitations import invite, revoke, set_assignment, set_quota
from d3po_core.people.journal import active, read_entries, sampling_of
from tests.core.people.labelling import NOON, bring_in, waiting_campaign

TWENTY = [f"rater {number}" for number in range(20)]


@pytest.fixture(autouse=True)
def _look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d3po_core.page.desk.LOOK_SECONDS", 0.0)


def a_desk(config: CampaignConfig) -> Desk:
    return Desk(config.folder, lambda *_: None)


def judge(desk: Desk, rater: str) -> bool:
    """Answer what the rater is asked; return whether anything was asked."""
    view = desk.view(rater)
    if view.state != "question" or view.question is None:
        return False
    desk.judge(rater, view.ticket, uuid.uuid4().hex, [0.0, *[1.0] * (len(view.shown) - 1)], 1.0)
    return True


def judged(config: CampaignConfig) -> dict[str, set[str]]:
    """The groups that each rater has answered."""
    found = defaultdict(set)
    for entry in active(read_entries(config.folder, str(sampling_of(config.folder, 1)))):
        assert entry.action == "answer"
        found[entry.rater].add(entry.question_id.split(":")[1])
    return found


@pytest.mark.parametrize("seed", range(3))
def test_every_group_gets_its_raters_and_every_quota_holds(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    groups, needed = 24, 3
    config = waiting_campaign(tmp_path, groups=groups, pixels=1, raters_per_group=needed)
    quotas = {name: draw.choice([2, 4, 9, None]) for name in TWENTY}
    for name, quota in quotas.items():
        invite(config.folder, name, quota)
    set_assignment(config.folder, "split")
    desk = a_desk(config)
    gone = TWENTY[0] if quotas[TWENTY[0]] is None else TWENTY[1]
    asked, turns = list(TWENTY), 0
    while asked:
        rater = draw.choice(asked)
        if not judge(desk, rater):
            asked.remove(rater)
        turns += 1
        if turns == 20:
            revoke(config.folder, gone)
            asked = [name for name in TWENTY if name != gone]  # who was done may get something of the one who left
    desk.close()
    found = judged(config)
    assert all(len(found[name]) <= quota for name, quota in quotas.items() if quota)
    counts = Counter(group for of_rater in found.values() for group in of_rater)
    assert set(counts.values()) == {needed}
    assert len(counts) == groups


def test_a_split_is_even_and_a_restart_keeps_it(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=8, pixels=1)
    for name in ("ann", "bob"):
        invite(config.folder, name)
    set_assignment(config.folder, "split")
    first = a_desk(config)
    assert first.view("ann").asked == 4
    judge(first, "ann")
    ticket = first.view("bob").ticket
    first.close()
    second = a_desk(config)
    assert second.view("bob").ticket == ticket
    while judge(second, "ann"):
        pass
    assert second.view("ann").state == "idle"
    assert len(judged(config)["ann"]) == 4
    second.close()


def test_a_quota_ends_a_raters_questions_and_a_higher_one_brings_more(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=5, pixels=1)
    invite(config.folder, "ann", 2)
    desk = a_desk(config)
    assert [judge(desk, "ann") for _ in range(3)] == [True, True, False]
    assert (desk.view("ann").given, desk.view("ann").asked) == (2, 2)
    set_quota(config.folder, "ann", 3)
    assert [judge(desk, "ann") for _ in range(2)] == [True, False]
    desk.close()


def test_in_pair_mode_a_begun_group_is_finished_within_the_quota(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=4, pixels=1, mode="pair")
    invite(config.folder, "ann", 1)
    desk = a_desk(config)
    view, answered = desk.view("ann"), 0
    while view.state == "question":
        desk.judge("ann", view.ticket, uuid.uuid4().hex, [1.0, -1.0], 1.0)
        answered, view = answered + 1, desk.view("ann")
    assert answered == 3  # the pairs of one group of three images
    assert len(judged(config)["ann"]) == 1
    desk.close()


def test_an_answer_beyond_the_quota_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=3, pixels=1)
    invite(config.folder, "ann", 1)
    desk = a_desk(config)
    view = desk.view("ann")
    judge(desk, "ann")
    other = next(f"r1-g{n}" for n in range(3) if view.question and view.question.group_id != f"r1-g{n}")
    number, sampling, *_ = view.ticket.split(".")
    with pytest.raises(UnfitError, match="all the groups"):
        desk.judge("ann", f"{number}.{sampling}.0.mark_bad:{other}", uuid.uuid4().hex, [0.0, 1.0, 1.0], 1.0)
    assert len(judged(config)["ann"]) == 1
    desk.close()


def test_taking_back_gives_the_place_in_the_quota_back(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=3, pixels=1)
    invite(config.folder, "ann", 1)
    desk = a_desk(config)
    judge(desk, "ann")
    undo = desk.view("ann").undo
    assert undo is not None
    desk.undo("ann", undo, uuid.uuid4().hex)
    assert desk.view("ann").state == "question"
    desk.close()


def test_gold_comes_on_top_of_the_quota(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=4, pixels=1, labeller="mixed", share=0.5)
    scores = [
        {"rater": "p", "rater_kind": "proxy", "kind": "score", "sample_id": f"r1-g{g}-m{m}", "value": float(g * m)}
        for g in range(4)
        for m in range(3)
    ]
    gold = [
        {"rater": "key", "rater_kind": "gold", "sample_id": f"r1-g3-m{m}", "value": float(m > 0), "judged_at": NOON}
        for m in range(3)
    ]
    bring_in(config, [*scores, *gold])
    invite(config.folder, "ann", 1)
    desk = a_desk(config)
    while judge(desk, "ann"):
        pass
    assert len(judged(config)["ann"] - {"r1-g3"}) == 1
    assert "r1-g3" in judged(config)["ann"]
    desk.close()
