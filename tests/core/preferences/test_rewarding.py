"""Labels of single images from judgements, against numbers worked out by hand."""

import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from d3po_core.preferences.deriving import derive_preferences
from d3po_core.preferences.rewarding import image_labels
from d3po_core.store.tables import connect, table_from_rows, write_table
from d3po_core.training.training_set import image_numbers

IDS = [f"{group}-m{member}" for group in ("g0", "g1") for member in range(3)]


def said(rater: str, values: dict[str, float], rater_kind: str = "proxy", kind: str = "score") -> list[dict[str, Any]]:
    return [
        {"rater": rater, "rater_kind": rater_kind, "kind": kind, "sample_id": image, "other_id": None, "value": value,
         "judged_at": datetime(2026, 1, 1), "source": "t", "seconds": None, "position": None}
        for image, value in values.items()
    ]  # fmt: skip


SCORES = said("a", dict(zip(IDS, [3.0, 1.0, 2.0, 5.0, 5.0, 2.0], strict=True)))


def labels(folder: Path, judgements: list[dict[str, Any]], rewards: str = "auto", **more: Any) -> dict[str, Any]:
    samples = [
        {"sample_id": image, "group_id": image[:2], "member": int(image[-1]), "prompt": "p", "split": "train",
         "seed": 0, "image_path": "", "trajectory_path": "", "trajectory_row": 0, "checkpoint": None}
        for image in IDS
    ]  # fmt: skip
    write_table(folder, "samples", 1, table_from_rows("samples", samples))
    write_table(folder, "judgements", 1, table_from_rows("judgements", judgements))
    with connect(folder) as connection:
        pairs = derive_preferences(connection, 1, "pareto", "all").table
        rows = image_labels(connection, 1, pairs, rewards, **more)
    write_table(folder, "image_labels", 1, table_from_rows("image_labels", rows))
    return {str(row["sample_id"]): (row["reward"], row["good"]) for row in rows}


def test_scores_are_standardised_over_the_round_and_added_by_weight(tmp_path: Path) -> None:
    second = said("b", dict(zip(IDS, [0.0, 0.0, 0.0, 0.0, 0.0, 6.0], strict=True)))
    found = labels(tmp_path, SCORES + second, weights={"b": 2.0})
    spread_a, spread_b = math.sqrt(68 / 6 - 9), math.sqrt(36 / 6 - 1)  # both means are 3 and 1
    assert found["g0-m1"] == (pytest.approx(-2 / spread_a - 2 / spread_b), False)
    assert found["g1-m2"] == (pytest.approx(-1 / spread_a + 2 * 5 / spread_b), True)


def test_win_rates_count_ties_and_unknown_pairs_as_half(tmp_path: Path) -> None:
    found = labels(tmp_path, SCORES, "win_rate")
    assert [found[image][0] for image in IDS] == [1.0, 0.0, 0.5, 0.75, 0.75, 0.0]
    assert [found[image][1] for image in IDS] == [True, False, None, True, True, False]


def test_strengths_explain_the_chances(tmp_path: Path) -> None:
    """In a chain of 3 with p = 3/4 the model's own equation holds: expected wins are those given."""
    found = labels(tmp_path, SCORES, "bradley_terry")
    for group, given in (("g0", [1.5, 0.5, 1.0]), ("g1", [1.25, 1.25, 0.5])):
        strength = [math.exp(found[f"{group}-m{m}"][0]) for m in range(3)]
        for i, wins in enumerate(given):
            expected = sum(strength[i] / (strength[i] + strength[k]) for k in range(3) if k != i)
            assert expected == pytest.approx(wins, abs=2e-3)


def test_people_decide_their_groups_and_their_marks_say_good_or_bad(tmp_path: Path) -> None:
    marks = said("ann", {"g0-m0": 0, "g0-m1": 1, "g0-m2": 1}, "human", "rating")
    marks += said("bob", {"g0-m0": 0, "g0-m1": 0, "g0-m2": 1}, "human", "rating")
    marks += said("eve", {"g0-m0": 1, "g0-m1": 0, "g0-m2": 0}, "human", "rating")
    found = labels(tmp_path, SCORES + marks, left_out=["eve"])
    assert [found[f"g0-m{m}"][1] for m in range(3)] == [False, None, True]  # one of two is neither
    assert found["g1-m0"] == (pytest.approx(2 / math.sqrt(68 / 6 - 9)), True)
    assert {image[:2] for image in labels(tmp_path, SCORES + marks, proxies_decide=False)} == {"g0"}


def test_a_group_whose_images_are_all_bad_has_labels_but_no_pair(tmp_path: Path) -> None:
    marks = said("ann", dict.fromkeys(IDS[:3], 0), "human", "rating")
    labels(tmp_path, SCORES + marks)
    signs = image_numbers(tmp_path, 1, "good_bad")
    assert [signs[image] for image in IDS] == [-1, -1, -1, 1, 1, -1]
    assert {image[:2] for image in image_numbers(tmp_path, 1, "numbers")} == {"g1"}  # all alike: no advantage


def test_advantages_are_standardised_within_the_group(tmp_path: Path) -> None:
    labels(tmp_path, SCORES)
    found = image_numbers(tmp_path, 1, "numbers")
    assert [found[image] for image in IDS[3:]] == pytest.approx([0.5**0.5, 0.5**0.5, -(2**0.5)], abs=1e-4)
