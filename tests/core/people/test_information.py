from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.people.information import expected_information, group_information
from d3po_core.people.journal import Journal, Submission, sampling_of
from d3po_core.store.images import dissimilarity
from d3po_core.store.tables import table_from_rows, write_table
from tests.core.people.labelling import waiting_campaign


def flat(*levels: int, size: int = 8) -> np.ndarray:
    return np.stack([np.full((size, size, 3), level, dtype=np.uint8) for level in levels])


def test_dissimilarity_is_the_mean_difference_of_all_pairs() -> None:
    # Pairs 0-51, 0-255, 51-255 differ by 0.2, 1 and 0.8.
    assert dissimilarity(flat(0, 51, 255)) == pytest.approx((0.2 + 1 + 0.8) / 3)
    assert dissimilarity(flat(7, 7)) == 0


def test_dissimilarity_does_not_depend_on_the_resolution() -> None:
    assert dissimilarity(flat(0, 100, size=512)) == pytest.approx(dissimilarity(flat(0, 100, size=8)))


def one(**facts: float) -> float:
    values = {"dissimilarity": 0.2, "decided": 0.0, "pairs": 0.0, "raters": 0.0, "disagreement": 0.0} | facts
    return float(expected_information(*(np.array([value]) for value in values.values()))[0])


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_different_images_tell_no_less(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert one(dissimilarity=low) <= one(dissimilarity=high)


def test_prompt_whose_pairs_are_never_decided_tells_less() -> None:
    assert one(decided=0, pairs=30) < one() < one(decided=28, pairs=30)


@given(st.integers(1, 20), st.floats(0, 1))
def test_judged_group_waits_behind_one_that_nobody_judged(raters: int, disagreement: float) -> None:
    assert one(raters=raters, disagreement=disagreement) < one()


def test_contrary_raters_call_for_another_one() -> None:
    assert one(raters=2, disagreement=1) > one(raters=2, disagreement=0)


def rows_of(group: str, prompt: str) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": f"{group}-m{m}", "group_id": group, "member": m, "prompt": prompt, "split": "train", "seed": 0,
            "image_path": "i", "trajectory_path": "t", "trajectory_row": m, "checkpoint": None,
        }
        for m in range(2)
    ]  # fmt: skip


def choice(rater: str, group: str, value: float) -> dict[str, Any]:
    return {
        "rater": rater, "rater_kind": "human", "kind": "choice", "sample_id": f"{group}-m0", "other_id": f"{group}-m1",
        "value": value, "judged_at": datetime(2024, 1, 1), "source": "csv", "seconds": None, "position": None,
    }  # fmt: skip


def test_information_of_a_round_comes_from_its_tables(tmp_path: Path) -> None:
    write_table(tmp_path, "samples", 1, table_from_rows("samples", rows_of("r1-g0", "a") + rows_of("r1-g1", "b")))
    pair = {"pair_id": "p", "group_id": "r1-g0", "winner_id": "r1-g0-m0", "loser_id": "r1-g0-m1", "weight": 1.0,
            "num_raters": 1, "agreement": 1.0}  # fmt: skip
    write_table(tmp_path, "preferences", 1, table_from_rows("preferences", [pair]))
    groups = {"r2-g0": "a", "r2-g1": "b", "r2-g2": "c", "r2-g3": "c", "r2-g4": "c"}
    write_table(
        tmp_path, "samples", 2, table_from_rows("samples", [row for g, p in groups.items() for row in rows_of(g, p)])
    )
    same = [{"group_id": group, "dissimilarity": 0.2} for group in groups]
    write_table(tmp_path, "groups", 2, table_from_rows("groups", same))
    said = [choice("ann", "r2-g3", 1), choice("ann", "r2-g4", 1), choice("bob", "r2-g4", -1)]
    write_table(tmp_path, "judgements", 2, table_from_rows("judgements", said))
    found = group_information(tmp_path, 2)
    assert list(found) == sorted(groups)
    assert found["r2-g0"] == pytest.approx(one(decided=1, pairs=1))
    assert found["r2-g1"] == pytest.approx(one(pairs=1))
    assert found["r2-g2"] == pytest.approx(one())
    assert found["r2-g3"] == pytest.approx(one(raters=1))
    assert found["r2-g4"] == pytest.approx(one(raters=2, disagreement=1))


def test_what_was_judged_on_the_page_counts_before_it_is_exported(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=2, size=2)
    before = group_information(config.folder, 1)
    submission = Submission(
        submission="0" * 32, sampling=str(sampling_of(config.folder, 1)), rater="ann", question_id="mark_bad:r1-g0",
        attempt=0, action="answer", mode="mark_bad", shown=("r1-g0-m0", "r1-g0-m1"), answer=(1.0, 0.0), seconds=1.0,
    )  # fmt: skip
    Journal(config.folder).append(submission)
    after = group_information(config.folder, 1)
    assert after["r1-g0"] < before["r1-g0"]
    assert after["r1-g1"] == before["r1-g1"]
