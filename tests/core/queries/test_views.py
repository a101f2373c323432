"""Views over a campaign's tables by hand, and every question of docs/questions.md on a campaign that has an answer."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from d3po_core.paths import PROJECT_ROOT
from d3po_core.preferences.deriving import collect_votes
from d3po_core.queries.views import VIEWS, connect_views
from d3po_core.store.tables import SCHEMAS, connect, table_from_rows, write_table
from tests.core.small_campaign import said, write_campaign

PAGE = (PROJECT_ROOT / "docs" / "questions.md").read_text()
QUESTIONS: dict[str, str] = dict(re.findall(r"^## \d+\. (.*?)\n\n```sql\n(.*?)```", PAGE, re.M | re.S))
ANSWERS: dict[str, list[tuple[Any, ...]]] = {
    "Which checkpoint is best, and is it clear of the base model?": [(3, "checkpoints/round=3", 1.0, True, "sha-3")],
    "Which prompts got worse since round 3?": [("down", 1.0, 0.25)],
    "Which held-out images did the base model draw better, from the same seed?": [
        ("down", "images/round=0/r0-e2.png", 1.0, "images/round=4/r4-e2.png", 0.0)
    ],
    "In which pairs do proxies and people disagree?": [
        (4, "r4-g0-1>0", "prompt of g0", *(f"images/round=4/r4-g0-m{member}.png" for member in (1, 0)), 2, 0, 0, 1)
    ],
    "How often do people agree with each proxy, where both prefer one image?": [
        (3, "prompt_alignment", 3, pytest.approx(2 / 3)),
        (4, "prompt_alignment", 2, 0.0),
    ],
    "Which groups taught nothing, because nobody won?": [(n, f"r{n}-g1", "prompt of g1", 3) for n in (1, 2, 3, 4)],
    "Who judged how much, and how fast?": [
        # What was replaced is the same judgement, a group that was marked or ranked is one.
        ("ann", 3, 3, 1, pytest.approx(20 / 60), pytest.approx(20 / 3)),
        ("bob", 3, 3, 0, pytest.approx(12 / 60), 4.0),
        ("cat", 1, 1, 0, 0.05, 3.0),
    ],
    "Who is outvoted most?": [("bob", 1, 0.5), ("ann", 0, 0.0), ("cat", 0, 0.0)],
    "Where do two people disagree?": [
        (3, "r3-g0", "r3-g0-m0", "r3-g0-m1", "ann", "bob"),
        (3, "r3-g0", "r3-g0-m0", "r3-g0-m1", "cat", "bob"),
        (4, "r4-g1", "r4-g1-m0", "r4-g1-m1", "ann", "bob"),
    ],
    # ann chose the image that stands first twice, and changed her mind once; bob always chose the second.
    "Does a rater favour the image that stands first?": [
        ("ann", 3, pytest.approx(2 / 3)),
        ("bob", 2, 0.0),
        ("cat", 1, 1.0),
    ],
    "Who is right on the gold questions?": [("bob", 1, 0.0), ("ann", 1, 1.0), ("cat", 1, 1.0)],
    "Which held-out prompts do people like better than the base's images, seen blind?": [
        (4, "up", 3, pytest.approx(2.5 / 3), pytest.approx(2 / 3)),
        (4, "down", 1, 0.0, 0.0),
    ],
    "Who changed their mind, and about what?": [(4, "ann", "choice", "r4-g0-m0", "r4-g0-m1", [1.0, -1.0])],
}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_campaign(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def asked(campaign: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with connect_views(campaign) as connection:
        yield connection


def test_page_asks_its_questions_in_order() -> None:
    numbers = re.findall(r"^## (\d+)\. ", PAGE, re.M)
    assert [int(number) for number in numbers] == list(range(1, 22))
    assert len(QUESTIONS) == 21
    assert ANSWERS.keys() <= QUESTIONS.keys()


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_of_the_page_has_its_answer(asked: duckdb.DuckDBPyConnection, question: str) -> None:
    rows = asked.sql(QUESTIONS[question]).fetchall()
    assert rows
    assert rows == ANSWERS.get(question, rows)


@pytest.mark.parametrize("name", [*SCHEMAS, *VIEWS])
def test_page_lists_every_column(asked: duckdb.DuckDBPyConnection, name: str) -> None:
    (listed,) = re.findall(rf"^\| `{name}` \|[^|]*\| ([^|]*) \|$", PAGE, re.M)
    there = [column for column in asked.sql(f"SELECT * FROM {name}").columns if column != "round"]
    assert listed.split(", ") == there


def test_pair_has_both_images_their_scores_and_all_votes(asked: duckdb.DuckDBPyConnection) -> None:
    (pair,) = asked.sql("SELECT * FROM pairs WHERE pair_id = 'r4-g0-1>0'").to_arrow_table().to_pylist()
    assert (pair["winner_id"], pair["loser_id"], pair["prompt"]) == ("r4-g0-m1", "r4-g0-m0", "prompt of g0")
    assert pair["winner_image"] == "images/round=4/r4-g0-m1.png"
    assert dict(pair["winner_scores"]) == {"prompt_alignment": 0.0}
    assert dict(pair["loser_scores"]) == {"prompt_alignment": 1.0}
    assert [pair[f"{who}_{how}"] for who in ("people", "proxies") for how in ("for", "against", "tied")] == [
        2, 0, 0, 0, 1, 0,
    ]  # fmt: skip
    assert pair["checkpoint"] == "checkpoints/round=3"


def test_every_preference_is_one_row_of_pairs(asked: duckdb.DuckDBPyConnection) -> None:
    kept = "SELECT round, pair_id, winner_id, loser_id, weight, num_raters, agreement FROM"
    assert asked.sql(f"{kept} pairs ORDER BY ALL").fetchall() == (
        asked.sql(f"{kept} preferences ORDER BY ALL").fetchall()
    )


def test_votes_of_all_rounds_are_those_that_preferences_are_derived_from(campaign: Path) -> None:
    columns = "group_id, first_id, second_id, first_member, second_member, rater, rater_kind, vote"
    with connect_views(campaign) as asked, connect(campaign) as derived:
        for number in range(1, 5):
            collect_votes(derived, number)
            expected = derived.sql(f"SELECT {columns} FROM votes ORDER BY ALL").fetchall()
            assert expected
            found = asked.sql(f"SELECT {columns} FROM votes WHERE round = {number} ORDER BY ALL").fetchall()
            assert found == expected


def test_equal_ids_in_two_rounds_do_not_mix(tmp_path: Path) -> None:
    for number, value in ((1, 1.0), (2, -1.0)):
        samples = [
            {
                "sample_id": f"m{member}", "group_id": "g", "member": member, "prompt": "p", "split": "train",
                "seed": 0, "image_path": "", "trajectory_path": "", "trajectory_row": 0, "checkpoint": None,
            }
            for member in range(2)
        ]  # fmt: skip
        write_table(tmp_path, "samples", number, table_from_rows("samples", samples))
        rows = [said("ann", "choice", "m0", value, other_id="m1")]
        write_table(tmp_path, "judgements", number, table_from_rows("judgements", rows))
    with connect_views(tmp_path) as asked:
        assert asked.sql("SELECT round, vote FROM votes ORDER BY round").fetchall() == [(1, 1), (2, -1)]


def test_raters_are_counted_by_round(asked: duckdb.DuckDBPyConnection) -> None:
    columns = "num_judgements, num_skipped, num_groups, num_votes, num_ties, votes_kept, votes_lost, seconds"
    found = asked.sql(f"SELECT rater, {columns} FROM raters WHERE round = 4 ORDER BY rater").fetchall()
    assert found == [
        ("ann", 2, 1, 2, 2, 0, 1, 0, 17.0),
        ("bob", 2, 0, 2, 2, 0, 1, 0, 9.0),
        ("prompt_alignment", 6, 0, 2, 6, 3, 0, 1, None),
    ]
    lost = "SELECT rater, rater_kind, votes_kept, votes_lost FROM raters WHERE round = 3 ORDER BY rater"
    assert asked.sql(lost).fetchall() == [
        ("ann", "human", 1, 0),
        ("bob", "human", 0, 1),
        ("cat", "human", 1, 0),
        ("key", "gold", 1, 0),
        ("prompt_alignment", "proxy", 1, 0),
    ]


def test_checkpoints_have_base_path_digest_and_scores(asked: duckdb.DuckDBPyConnection) -> None:
    rows = asked.sql("SELECT round, checkpoint, sha256, score, scores FROM checkpoints ORDER BY round").fetchall()
    assert rows[0] == (0, None, None, 0.25, {"prompt_alignment": 0.25})
    assert rows[4] == (4, "checkpoints/round=4", "sha-4", 0.625, {"prompt_alignment": 0.625})


def test_campaign_without_a_round_has_empty_views(tmp_path: Path) -> None:
    with connect_views(tmp_path) as asked:
        for view in VIEWS:
            assert asked.sql(f"SELECT * FROM {view}").fetchall() == []
