"""Files that people bring from other programs and data sets: the rows that they must become are written out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.judgement_files.image_names import sample_id_of
from d3po_core.judgement_files.importing import import_file, renaming
from tests.core.judgement_files.test_formats import M, imported, said

__all__ = ["campaign"]
from tests.core.judgement_files.test_formats import campaign

PROMPT_FREE = {"annotator": "ann", "annotation_id": 1}


def annotated(results: list[dict[str, Any]], data: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """A raw task as Label Studio exports it, with one annotation."""
    annotation = {"id": 500, "completed_by": {"id": 7, "email": "ann"}, "result": results, "was_cancelled": False,
                  "created_at": "2026-11-01T09:00:00.5Z", "updated_at": "2026-11-01T09:00:05.5Z"}  # fmt: skip
    return [{"id": 100, "data": data, "annotations": [annotation | more]}]


def result(kind: str, value: Any, control: str, tag: str) -> dict[str, Any]:
    return {"type": kind, "value": value, "from_name": control, "to_name": tag}


def written(tmp_path: Path, content: Any, name: str = "brought.json") -> Path:
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path / name


TWO = {"image1": f"/data/upload/4/5ab0c1d0-{M[0]}.png", "image2": f"/data/upload/4/5ab0c1d1-{M[1]}.png"}
PAIRWISE = result("pairwise", {"selected": "left"}, "pw", "img1")


@pytest.mark.parametrize(
    "text",
    [
        "r1-g0-m0", "r1-g0-m0.png", "images/round=1/r1-g0-m0.png", r"C:\Users\ann\images\r1-g0-m0.png", "R1-G0-M0.PNG",
        "r1-g0-m0 (1).png", "/data/upload/4/5ab0c1d2-r1-g0-m0.png", "s3://bucket/d3po/round=1/r1-g0-m0.png",
        "https://b.example/d3po/r1-g0-m0.png?X-Amz-Algorithm=A&X-Amz-Signature=0abc", "https://b.example/r1-g0-m0.png#t=1",
        "/data/local-files/?d=shapes%2Fround1%2Fr1-g0-m0.png", "/data/local-files/?d=shapes%5Cround1%5Cr1-g0-m0.png",
        "https://app.example.org/tasks/1/resolve/?fileuri=czM6Ly9i&name=r1-g0-m0.png#t=1",
        "<img src='/data/upload/4/5ab0c1d0-r1-g0-m0.png'/>",
    ],
)  # fmt: skip
def test_every_way_to_write_an_image_means_the_same(text: str) -> None:
    assert sample_id_of(text) == "r1-g0-m0"


@pytest.mark.parametrize("text", ["", "img1.png", "xr1-g0-m0", "r1-g0", "r1-g0-m0x.png", "http://[broken"])
def test_a_name_that_is_no_image_of_a_campaign_means_none(text: str) -> None:
    assert sample_id_of(text) is None


@pytest.mark.parametrize("value", [{"rank": ["i2", "i0", "i1"]}, ["i2", "i0", "i1"]], ids=["bucket", "list"])
def test_a_ranker_is_an_order_with_the_first_the_best(value: Any, campaign: CampaignConfig, tmp_path: Path) -> None:
    items = [{"id": f"i{n}", "html": f"<img src='/data/upload/4/5ab-{M[n]}.png'/>"} for n in range(3)]
    rank = result("ranker", {"ranker": value}, "rank", "images")
    rows = imported(campaign, written(tmp_path, annotated([rank], {"images": items})))
    assert {(row["sample_id"], row["value"]) for row in rows} == {(M[2], 1), (M[0], 2), (M[1], 3)}


def test_two_ratings_are_of_the_image_at_which_each_stands(campaign: CampaignConfig, tmp_path: Path) -> None:
    ratings = [result("rating", {"rating": 4}, "rate1", "img1"), result("rating", {"rating": 2}, "rate2", "img2")]
    rows = imported(campaign, written(tmp_path, annotated(ratings, TWO)))
    assert {(row["sample_id"], row["value"]) for row in rows} == {(M[0], 4), (M[1], 2)}


def test_a_file_of_target_storage_is_one_annotation(campaign: CampaignConfig, tmp_path: Path) -> None:
    task = annotated([PAIRWISE], TWO)[0]
    stored = task["annotations"][0] | {"task": {"id": 100, "data": task["data"]}}
    assert said(imported(campaign, written(tmp_path, stored, "500"))) == [("ann", M[0], M[1], 1)]


@pytest.mark.parametrize(
    ("word", "value"), [("Good", 1), ("Bad", 0), ("Accept", 1), ("Reject", 0), ("Yes", 1), ("Not sure", None)]
)
def test_choices_have_the_words_of_the_tables(
    word: str, value: int | None, campaign: CampaignConfig, tmp_path: Path
) -> None:
    one = {"image": f"/data/upload/4/5ab0c1d0-{M[0]}.png"}
    task = annotated([result("choices", {"choices": [word]}, "quality", "image")], one)
    assert said(imported(campaign, written(tmp_path, task))) == [("ann", M[0], None, value)]


def test_choices_of_a_scale_are_ratings(campaign: CampaignConfig, tmp_path: Path) -> None:
    task = annotated([result("choices", {"choices": ["Excellent"]}, "quality", "image")], {"image": f"{M[0]}.png"})
    rows = imported(campaign, written(tmp_path, task), scale=("poor", "fair", "excellent"))
    assert said(rows) == [("ann", M[0], None, 2)]


@pytest.mark.parametrize(("word", "value"), [("Left", 1), ("Right", -1), ("Both are equal", 0)])
def test_choices_between_two_images_are_pairs(word: str, value: int, campaign: CampaignConfig, tmp_path: Path) -> None:
    task = annotated([result("choices", {"choices": [word]}, "better", "img1")], TWO)
    assert said(imported(campaign, written(tmp_path, task))) == [("ann", M[0], M[1], value)]


def test_of_two_controls_the_user_says_which_counts(campaign: CampaignConfig, tmp_path: Path) -> None:
    why = result("textarea", {"text": ["fewer fingers"]}, "why", "img1")
    safe = result("choices", {"choices": ["Yes"]}, "safe", "img1")
    assert said(imported(campaign, written(tmp_path, annotated([PAIRWISE, why], TWO)))) == [("ann", M[0], M[1], 1)]
    file = written(tmp_path, annotated([PAIRWISE, why, safe], TWO), "both.json")
    with pytest.raises(D3POError, match=r"'pw' \(pairwise: 'left'\); 'safe' .*--control NAME"):
        import_file(campaign.folder, file)
    dry = import_file(campaign.folder, file, dry_run=True, control="pw")
    assert (dry.num_good, dry.num_bad) == (1, 0)


def test_the_user_says_which_column_was_left(campaign: CampaignConfig, tmp_path: Path) -> None:
    task = annotated([PAIRWISE], {"ours": f"{M[0]}.png", "baseline": f"{M[1]}.png"})
    report = import_file(campaign.folder, written(tmp_path, task), left="ours")
    assert "left is column 'ours', right is 'baseline'" in "\n".join(report.summary())
    with pytest.raises(D3POError, match=r"--left 'there': the columns with images are 'baseline', 'ours'"):
        import_file(campaign.folder, written(tmp_path, task), left="there")


def test_an_export_that_grows_is_kept_once(campaign: CampaignConfig, tmp_path: Path) -> None:
    first = annotated([PAIRWISE], TWO)
    second = annotated(
        [PAIRWISE], {"image1": f"{M[1]}.png", "image2": f"{M[2]}.png"}, updated_at="2026-11-02T09:00:00Z"
    )
    assert import_file(campaign.folder, written(tmp_path, first, "monday.json")).num_good == 1
    friday = import_file(campaign.folder, written(tmp_path, first + second, "friday.json"))
    assert (friday.num_good, friday.num_known) == (2, 1)
    again = import_file(campaign.folder, written(tmp_path, second + first, "saturday.json"))
    assert again.written is None
    assert "on record already" in "\n".join(again.summary())


@pytest.mark.parametrize(
    "names", [("winner", "loser"), ("chosen", "rejected"), ("image_w", "image_l"), ("good_jpg", "bad_jpg")]
)
def test_a_better_and_a_worse_image_are_a_pair(
    names: tuple[str, str], campaign: CampaignConfig, tmp_path: Path
) -> None:
    file = written(tmp_path, f"{names[0]},{names[1]},rater\n{M[2]}.png,{M[1]}.png,ann\n", "pairs.csv")
    assert said(imported(campaign, file)) == [("ann", M[2], M[1], 1)]


def test_columns_are_what_the_user_says(campaign: CampaignConfig, tmp_path: Path) -> None:
    file = written(tmp_path, f"Better One,worse,who\n{M[2]},{M[1]},ann\n", "own.csv")
    rows = imported(campaign, file, columns=renaming("winner=Better One,loser=worse,rater=who"))
    assert said(rows) == [("ann", M[2], M[1], 1)]
    with pytest.raises(D3POError, match="--columns winner=nope: unknown column 'nope'; known: better_one, who, worse"):
        import_file(campaign.folder, file, columns={"winner": "nope"})
    with pytest.raises(D3POError, match="expected ours=theirs"):
        renaming("winner")


def test_pick_a_pic_is_read_and_unlabelled_rows_say_nothing(campaign: CampaignConfig, tmp_path: Path) -> None:
    header = "image_0_uid,image_1_uid,label_0,label_1,has_label,user_id"
    rows = [f"{M[0]},{M[1]},1.0,0.0,True,17", f"{M[1]},{M[2]},0.5,0.5,True,17", f"{M[0]},{M[2]},0,1,False,17"]
    file = written(tmp_path, "\n".join([header, *rows]) + "\n", "pick.csv")
    assert said(imported(campaign, file)) == [("17", M[0], M[1], 1), ("17", M[1], M[2], 0)]


def test_hpdv2_and_imagereward_are_read(campaign: CampaignConfig, tmp_path: Path) -> None:
    files = [f"{image}.png" for image in M[:3]]
    pair = [{"image_path": files[:2], "human_preference": [0, 1], "user_hash": "a"}]
    assert said(imported(campaign, written(tmp_path, pair))) == [("a", M[0], M[1], -1)]
    ranks = [{"image_path": files, "rank": [2, 1, 3], "raw_annotations": [[1, 2, 3]], "user_hash": ["b"]}]
    rows = imported(campaign, written(tmp_path, ranks, "ranks.json"))
    assert {(r["rater"], r["sample_id"], r["value"]) for r in rows if r["kind"] == "rank"} == {
        ("b", M[0], 1), ("b", M[1], 2), ("b", M[2], 3)}  # fmt: skip
    reward = [{"id": "x", "generations": files, "ranking": [2, 2, 1]}]
    rows = imported(campaign, written(tmp_path, reward, "reward.json"), rater="c")
    assert {(r["sample_id"], r["value"]) for r in rows if r["rater"] == "c"} == {(M[0], 2), (M[1], 2), (M[2], 1)}


def test_a_title_above_the_header_and_text_formulas_are_read(campaign: CampaignConfig, tmp_path: Path) -> None:
    file = written(tmp_path, f'Table 1\nfirst_id;second_id;choice;rater\n"=""{M[0]}""";{M[1]};draw;ann\n', "t.csv")
    assert said(imported(campaign, file)) == [("ann", M[0], M[1], 0)]


def test_names_that_differ_only_in_capitals_are_asked_about(campaign: CampaignConfig, tmp_path: Path) -> None:
    import_file(campaign.folder, written(tmp_path, f"first_id,second_id,choice,rater\n{M[0]},{M[1]},first,Ann\n"))
    later = written(tmp_path, f"first_id,second_id,choice,rater\n{M[0]},{M[1]},second,ann\n", "later.csv")
    report = import_file(campaign.folder, later)
    assert "differs from rater 'Ann' only in capitals" in next(report.problem_lines())


def test_the_report_says_what_follows_and_what_nothing_tells(campaign: CampaignConfig, tmp_path: Path) -> None:
    file = written(tmp_path, f"sample_id,rating,rater\n{M[0]},bad,ann\n{M[1]},bad,ann\nr3-g1-m0,good,ann\n", "bad.csv")
    told = "\n".join(import_file(campaign.folder, file, dry_run=True).summary())
    assert "puts 0 pairs of images in order, in 0 groups" in told
    assert "no pair in 2 groups: 1 with one judged image, 1 whose images are judged equal" in told
    assert "nothing in the file says which campaign it is of" in told
