"""Filters and orders of the gallery, against plain Python over the rows that the campaign was written from."""

import shutil
from pathlib import Path

import pytest

from d3po_core.browser.gallery import PAGE_SIZE, Filters, Gallery
from tests.core.small_campaign import DOWN, PROXY, UP, write_campaign

# What the small campaign holds: sampled images with the proxy's score, and held-out images.
TRAIN = {f"r{n}-{g}-m{m}": score for n in range(1, 5) for g, scores in PROXY.items() for m, score in enumerate(scores)}
HELD_OUT = {f"r{n}-e{k}": (*UP[n], *DOWN[n])[k] for n in range(5) for k in range(4)}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_campaign(tmp_path_factory.mktemp("data") / "runs")


@pytest.fixture(scope="module")
def gallery(campaign: Path) -> Gallery:
    return Gallery(campaign)


def shown(gallery: Gallery, **filters: object) -> list[str]:
    return [row["sample_id"] for row in gallery.page(Filters(**filters)).rows]  # type: ignore[arg-type]


def test_without_filters_every_image_is_there_once(gallery: Gallery) -> None:
    assert sorted(shown(gallery)) == sorted([*TRAIN, *HELD_OUT])
    assert gallery.page(Filters()).total == len(TRAIN) + len(HELD_OUT)
    assert shown(gallery)[:7] == [
        "r4-g0-m0", "r4-g0-m1", "r4-g0-m2", "r4-g1-m0", "r4-g1-m1", "r4-g1-m2", "r4-e0"
    ]  # fmt: skip


def test_scores_filter_and_order(gallery: Gallery) -> None:
    everything = TRAIN | HELD_OUT
    best = gallery.page(Filters(order="best")).rows
    assert [row["score"] for row in best] == sorted(everything.values(), reverse=True)
    assert all(row["score"] == everything[row["sample_id"]] for row in best)
    between = {one for one, score in everything.items() if 0.4 <= score <= 0.6}
    assert set(shown(gallery, low=0.4, high=0.6)) == between
    assert set(shown(gallery, low=1.5)) == set()


def test_round_kind_and_prompt_filter(gallery: Gallery) -> None:
    assert set(shown(gallery, round=2)) == {one for one in TRAIN | HELD_OUT if one.startswith("r2-")}
    assert set(shown(gallery, kind="held-out")) == set(HELD_OUT)
    assert set(shown(gallery, prompt="OF G1", kind="train")) == {one for one in TRAIN if "-g1-" in one}
    assert shown(gallery, prompt="%") == []  # text, not a pattern


def test_won_lost_and_judged_filter(gallery: Gallery) -> None:
    # Without people, the proxy decides: in group g0 image 0 beats 2, which beats 1; in g1 all are equal.
    round_one = {"kind": "train", "round": 1}
    assert set(shown(gallery, **round_one, won="yes")) == {"r1-g0-m0", "r1-g0-m2"}
    assert set(shown(gallery, **round_one, lost="yes", won="no")) == {"r1-g0-m1"}
    # In round 3 people compared images 0 and 1 of g0 alone.
    assert set(shown(gallery, round=3, judged="yes")) == {"r3-g0-m0", "r3-g0-m1"}


def test_pages_show_every_image_once(campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d3po_core.browser.gallery.PAGE_SIZE", 7)
    gallery = Gallery(campaign)
    seen = [row["sample_id"] for number in range(1, 8) for row in gallery.page(Filters(), number).rows]
    assert sorted(seen) == sorted([*TRAIN, *HELD_OUT])
    assert PAGE_SIZE == 60


def test_a_finished_round_appears_without_a_restart(campaign: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(campaign, tmp_path / "small"))
    shutil.move(copy / "evaluations" / "round=4", tmp_path / "kept")
    gallery = Gallery(copy)
    assert "r4-e0" not in shown(gallery)
    shutil.move(tmp_path / "kept", copy / "evaluations" / "round=4")
    assert "r4-e0" in shown(gallery)


def test_an_image_is_found_by_its_id_alone(gallery: Gallery, campaign: Path) -> None:
    assert gallery.image_path("r2-g1-m0") == campaign / "images/round=2/r2-g1-m0.png"
    for wrong in ("r9-g0-m0", "../campaign.json", "images/round=2/r2-g1-m0.png", "' OR 1=1 --"):
        assert gallery.image_path(wrong) is None
