"""What the columns of published data sets say: which image won, under every layout."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.datasets.layouts import NAMES, RowError, layout_of
from d3po_core.errors import D3POError

LABELS = st.sampled_from([0, 1, 0.0, 1.0, 0.5, "1", "0.5"])
RANKS = st.lists(st.integers(1, 5), min_size=2, max_size=6)


def read(row: dict[str, Any], name: str | None = None) -> Any:
    return layout_of(list(row), "file", name).read(row, list(row))


@given(label=LABELS)
def test_the_image_with_the_higher_label_of_pick_a_pic_won(label: Any) -> None:
    for more in ({}, {"label_1": 1 - float(label)}, {"has_label": True}):
        entry = read({"jpg_0": b"a", "jpg_1": b"b", "label_0": label, "caption": "c", **more})
        expected = {1.0: (1.0, -1.0), 0.0: (-1.0, 1.0), 0.5: (0.0, 0.0)}[float(label)]
        assert (entry.kind, entry.images, entry.values, entry.prompt) == ("choice", (b"a", b"b"), expected, "c")


@given(first=st.sampled_from([0, 1]), second=st.sampled_from([0, 1]))
def test_the_preferred_image_of_hpd_won_and_equals_are_a_tie(first: int, second: int) -> None:
    entry = read({"image_path": ["a.jpg", "b.jpg"], "human_preference": [first, second], "prompt": "p"})
    winner = {(1, 0): "a.jpg", (0, 1): "b.jpg"}.get((first, second))
    assert [image for image, value in zip(entry.images, entry.values, strict=True) if value > 0] == (
        [winner] if winner else []
    )
    assert entry.kind == "choice"


@given(ranks=RANKS, names=st.sampled_from([("generations", "ranking"), ("image_path", "rank")]))
def test_ranks_stay_as_they_are_and_the_lowest_is_best(ranks: list[int], names: tuple[str, str]) -> None:
    images = [f"{place}.png" for place in range(len(ranks))]
    entry = read({names[0]: images, names[1]: ranks, "prompt": "p"})
    assert entry.kind == "rank"
    assert [*zip(entry.images, entry.values, strict=True)] == [*zip(images, map(float, ranks), strict=True)]


@pytest.mark.parametrize("names", [("winner", "loser"), ("chosen", "rejected"), ("image_w", "image_l"),
                                   ("good_jpg", "bad_jpg")])  # fmt: skip
def test_named_winners_won(names: tuple[str, str]) -> None:
    entry = read({names[1]: "worse.png", names[0]: "better.png", "text": "p"})
    assert (entry.kind, entry.images, entry.values) == ("choice", ("better.png", "worse.png"), (1.0, -1.0))


@given(label=st.sampled_from([1, "1", True, "good", "Good "]), bad=st.sampled_from([0, "0", False, "bad", "BAD"]))
def test_good_and_bad_images(label: Any, bad: Any) -> None:
    assert read({"image": b"i", "label": label, "prompt": "p"}).values == (1.0,)
    assert read({"image": b"i", "label": bad, "prompt": "p"}).values == (0.0,)
    assert read({"image": b"i", "label": bad, "prompt": "p"}).kind == "rating"


@given(score=st.floats(-1e6, 1e6))
def test_scores(score: float) -> None:
    entry = read({"image": b"i", "score": score, "prompt": "p"})
    assert (entry.kind, entry.values) == ("score", (score,))


@pytest.mark.parametrize(("row", "why"), [
    ({"jpg_0": b"", "jpg_1": b"", "label_0": 7, "caption": "c"}, "labels are 7 and -6; expected 1, 0, or 0.5"),
    ({"jpg_0": b"", "jpg_1": b"", "label_0": None, "caption": "c"}, "label_0 is None; expected a number"),
    ({"jpg_0": b"", "jpg_1": b"", "label_0": 1, "caption": " "}, "has no prompt"),
    ({"jpg_0": b"", "jpg_1": b"", "label_0": 1, "caption": "c", "has_label": False}, "nobody compared"),
    ({"image_path": ["a", "b", "c"], "human_preference": [1, 0, 0], "prompt": "p"}, "3 images; expected a pair"),
    ({"generations": ["a", "b"], "ranking": [1], "prompt": "p"}, "no lists .* of equal length"),
    ({"image": b"", "label": "so-so", "prompt": "p"}, "label is 'so-so'; expected good or bad"),
    ({"image": b"", "score": "nan", "prompt": "p"}, "score is 'nan'; expected a number"),
])  # fmt: skip
def test_rows_that_say_nothing_say_why(row: dict[str, Any], why: str) -> None:
    with pytest.raises(RowError, match=why):
        read(row)


def test_unknown_columns_are_one_line_with_what_was_found_and_what_is_expected() -> None:
    with pytest.raises(D3POError) as caught:
        layout_of(["picture", "stars"], "data.csv")
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("data.csv: has the columns picture, stars; expected a prompt (caption or prompt or text)")
    assert all(name in said for name in NAMES)
    assert "jpg_0, jpg_1, label_0" in said
    assert "--columns ours=theirs" in said


def test_a_layout_can_be_asked_for() -> None:
    both = {"image": b"i", "score": 3.0, "label": 1, "prompt": "p"}
    assert (read(both).kind, read(both, "good-bad").kind) == ("score", "rating")
    with pytest.raises(D3POError, match="--layout 'mine': expected one of pick-a-pic, chosen, hpd,"):
        read(both, "mine")
    with pytest.raises(D3POError, match=r"expected a prompt .* and hpd: image_path, human_preference"):
        read(both, "hpd")
