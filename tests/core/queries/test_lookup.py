"""Finding campaigns, rounds and images; what is not there is named, with what is."""

import re
import shutil
from pathlib import Path

import pytest

from d3po_core.errors import D3POError
from d3po_core.queries.lookup import image_story, rejection, trained_round
from d3po_core.store.campaign import round_config
from d3po_core.store.stages import finished_numbers
from d3po_core.store.tables import partition, read_rows, table_from_rows, write_table
from tests.core.small_campaign import small_config, write_campaign


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_campaign(tmp_path_factory.mktemp("data") / "runs")


def test_rounds_are_named_by_word_or_number(campaign: Path) -> None:
    assert finished_numbers(campaign) == [0, 1, 2, 3, 4]
    assert trained_round(campaign, "latest") == 4
    assert trained_round(campaign, "2") == 2


def test_round_is_finished_by_its_row_and_nothing_else(campaign: Path, tmp_path: Path) -> None:
    shutil.copytree(campaign, tmp_path / "small")
    shutil.rmtree(tmp_path / "small" / "rounds" / "round=4")
    assert trained_round(tmp_path / "small", "latest") == 3
    with pytest.raises(D3POError, match=r"'4' is no finished round .* expected base, latest, champion or one of 0, 1"):
        trained_round(tmp_path / "small", "4")
    assert image_story(tmp_path / "small", "r4-g0-m0").run is None


def test_base_model_is_no_round_that_trained(campaign: Path, tmp_path: Path) -> None:
    for name in ("0", "base"):
        with pytest.raises(D3POError, match=f"{name} is the base model, not a round that trained; name another: 1, 2"):
            trained_round(campaign, name)
    with pytest.raises(D3POError, match="it has none yet"):
        trained_round(tmp_path, "latest")


def test_a_rejected_round_says_so_before_it_is_shipped(campaign: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(campaign, tmp_path / "small"))
    (row,) = read_rows(partition(copy, "rounds", 3) / "part.parquet")
    assert rejection(copy, 3) is None
    row |= {"verdict": "rejected", "findings": "the held-out score fell", "champion": 2}
    write_table(copy, "rounds", 3, table_from_rows("rounds", [row]))
    assert rejection(copy, 3) == (
        "round 3 was rejected by the guard (the held-out score fell); the champion is round 2"
    )


def test_configuration_of_a_round_is_the_one_it_was_begun_with(campaign: Path, tmp_path: Path) -> None:
    assert round_config(campaign, 2) == small_config(campaign.parent)
    with pytest.raises(D3POError, match=r"stages/round=9/config.json: cannot be read"):
        round_config(campaign, 9)


def test_story_of_a_training_image(campaign: Path) -> None:
    story = image_story(campaign, "r4-g0-m1")
    assert (story.round, story.held_out) == (4, False)
    assert (story.image["prompt"], story.image["seed"]) == ("prompt of g0", 1)
    assert story.image["checkpoint"] == "checkpoints/round=3"
    assert [(row["rater"], row["value"]) for row in story.judgements] == [
        ("ann", 1.0),
        ("prompt_alignment", 0.0),
        ("ann", -1.0),
        ("bob", 1.0),
    ]
    assert [pair["pair_id"] for pair in story.pairs] == ["r4-g0-1>0"]
    assert story.run is not None
    assert story.run["mlflow_run_id"] == "run-4"
    assert story.scores == []
    assert ("sample.group_size", 8, 3) in story.settings


def test_story_of_a_held_out_image_has_its_scores_in_all_rounds(campaign: Path) -> None:
    story = image_story(campaign, "r3-e2")
    assert (story.round, story.held_out) == (3, True)
    assert (story.image["prompt"], story.image["seed"]) == ("down", 102)
    assert story.image["checkpoint"] == "checkpoints/round=3"
    assert [(row["round"], row["score"]) for row in story.scores] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 0.0)]
    assert story.judgements == story.pairs == []


@pytest.mark.parametrize(
    ("sample_id", "message"),
    [
        (
            "r3-g7-m0",
            "sample 'r3-g7-m0' is not in campaign 'small': round 3 has 6 images, r3-g0-m0 to r3-g1-m2 "
            "and 4 held-out images, r3-e0 to r3-e3",
        ),
        ("r0-g0-m0", "round 0 has 4 held-out images, r0-e0 to r0-e3"),
        ("r9-e0", "it has no round 9; there are 0 to 4"),
        ("cat.png", "expected an id such as r3-g4-m1 (round 3, group 4, member 1) or r3-e17"),
        ("' OR 1=1 --", "expected an id such as"),
    ],
)
def test_missing_image_is_answered_by_those_there_are(campaign: Path, sample_id: str, message: str) -> None:
    with pytest.raises(D3POError, match=re.escape(message)) as caught:
        image_story(campaign, sample_id)
    assert "\n" not in str(caught.value)
