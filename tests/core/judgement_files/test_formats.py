"""Every documented format is recognised by its columns and means what its example says."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.judgement_files.delimited import clean
from d3po_core.judgement_files.formats import load_order, read_judgement_file, text_array
from d3po_core.judgement_files.importing import import_file
from d3po_core.paths import PROJECT_ROOT
from d3po_core.spreadsheets import neutralise
from d3po_core.store.tables import read_rows
from tests.core.sampled import sampled_campaign

EXAMPLES = PROJECT_ROOT / "data" / "examples" / "judgements"
M = [f"r3-g0-m{member}" for member in range(4)]
N = [f"r3-g1-m{member}" for member in range(4)]
ANNA = "anna@example.com"

# Rater, sample, other sample, value of every row of an example, as docs/judgements.md says them.
MEANING: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
    "choice.csv": ("choice", [
        ("anna", M[0], M[1], 1), ("anna", M[2], M[1], -1), ("anna", N[0], N[3], 0), ("anna", N[1], N[2], None),
        ("ben", M[0], M[1], 1),
    ]),
    "rating.csv": ("rating", [
        ("anna", M[0], None, 1), ("anna", M[1], None, 0), ("anna", M[2], None, 1), ("anna", M[3], None, None),
        ("ben", N[0], None, 1), ("ben", N[1], None, 0),
    ]),
    "rating_scale.csv": ("rating", [("anna", M[0], None, 4.5), ("anna", M[1], None, 1), ("anna", M[2], None, 3)]),
    "rank.csv": ("rank", [
        ("anna", M[0], None, 2), ("anna", M[1], None, 1), ("anna", M[2], None, 3), ("anna", M[3], None, 3),
        ("ben", N[0], None, 2), ("ben", N[1], None, 1),
    ]),
    "d3po_positional.json": ("rating", [
        *[("zoe", sample, None, value) for sample, value in zip(M + N[:3], [1, 0, 1, 1, 0, 0, 1], strict=True)]
    ]),
    "diffusion_kto.csv": ("rating", [("zoe", M[0], None, 1), ("zoe", M[1], None, 0), ("zoe", M[2], None, 1)]),
    "label_studio_pairwise.json": ("choice", [
        (ANNA, M[0], M[1], 1), ("ben@example.com", M[0], M[1], None), ("5", N[0], N[3], -1),
    ]),
    "label_studio_pairwise.csv": ("choice", [(ANNA, M[0], M[1], 1), (ANNA, N[0], N[3], -1)]),
    "label_studio_rating.csv": ("rating", [(ANNA, M[0], None, 4), (ANNA, M[1], None, 2)]),
    "label_studio_rating.json": ("rating", [("5", M[0], None, 4), ("5", M[1], None, 2)]),
}  # fmt: skip


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignConfig:
    return sampled_campaign(tmp_path)


def imported(campaign: CampaignConfig, file: Path, **options: Any) -> list[dict[str, Any]]:
    report = import_file(campaign.folder, file, **options)
    assert report.written is not None, report.summary()
    return read_rows(report.written)


def said(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["rater"], row["sample_id"], row["other_id"], row["value"]) for row in rows]


def test_every_example_is_tested_and_documented() -> None:
    files = {file.name for file in EXAMPLES.iterdir()}
    assert files - {"d3po_positional_order.json"} == MEANING.keys()
    documented = (PROJECT_ROOT / "docs" / "judgements.md").read_text()
    assert [name for name in files if name not in documented] == []


@pytest.mark.parametrize("name", MEANING)
def test_example_means_what_the_documentation_says(campaign: CampaignConfig, name: str) -> None:
    kind, expected = MEANING[name]
    order = str(EXAMPLES / "d3po_positional_order.json") if name.startswith("d3po") else None
    rows = imported(campaign, EXAMPLES / name, rater="zoe", order=order)
    assert said(rows) == expected
    assert {row["kind"] for row in rows} == {kind}
    assert {row["rater_kind"] for row in rows} == {"human"}


def test_times_durations_and_positions_are_kept(campaign: CampaignConfig) -> None:
    rows = imported(campaign, EXAMPLES / "choice.csv")
    assert rows[0]["judged_at"].isoformat() == "2024-05-01T09:00:00"
    assert rows[4]["judged_at"].isoformat() == "2024-05-01T08:30:00", "a time with a zone is turned into UTC"
    assert [row["seconds"] for row in rows] == [2.5, 3.1, 4.0, 1.2, None]
    assert {row["position"] for row in rows} == {0}
    rows = imported(campaign, EXAMPLES / "label_studio_pairwise.json")
    assert rows[0]["judged_at"].isoformat() == "2024-05-01T09:00:02.513742"
    assert [row["seconds"] for row in rows] == [4.288, 1.5, 2.0]


TEXT = "sample_id,rating,rater\n{}-m0,1,Zoë\n{}-m1,0,Zoë\n".format("r3-g0", "r3-g0")
SAME = [("Zoë", M[0], None, 1), ("Zoë", M[1], None, 0)]


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.replace(",", ";").encode(),
        TEXT.replace(",", "\t").encode("utf-16"),
        TEXT.replace(",", "|").encode(),
        ("sep=;\r\n" + TEXT.replace(",", ";")).encode(),
        ("\n\n" + TEXT).encode(),
        (TEXT + "\n,,\n").encode(),
        TEXT.rstrip("\n").encode(),
        TEXT.replace("r3-g0-m0", '"r3-g0-m0"').replace("rater", '"Rater "').encode(),
        TEXT.replace("sample_id", " Sample ID ").replace(",1,", ", 1 ,").encode(),
        TEXT.replace("ë", "e\u0308").encode(),
        json.dumps([{"sample_id": i, "rating": v, "rater": r} for r, i, _, v in SAME]).encode(),
        "\n".join(json.dumps({"sample_id": i, "rating": v, "rater": r}) for r, i, _, v in SAME).encode(),
    ],
    ids=["utf-8", "bom", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "crlf", "cr", "semicolons", "excel text", "bars",
         "sep=", "blank lines first", "blank lines last", "no newline at the end", "quotes", "spaces", "decomposed",
         "records", "json lines"],
)  # fmt: skip
def test_encodings_delimiters_and_newlines_change_nothing(
    campaign: CampaignConfig, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "labels"
    file.write_bytes(content)
    assert said(imported(campaign, file)) == SAME


def test_words_of_a_scale_are_numbers_in_their_order(campaign: CampaignConfig, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(f"sample_id,rating\n{M[0]},Fair\n{M[1]},poor\n{M[2]},good\n{M[3]},skip\n")
    rows = imported(campaign, file, rater="zoe", scale=("poor", "fair", "good"))
    assert [row["value"] for row in rows] == [1, 0, 2, None]


def test_label_studio_choices_are_ratings_and_pairs(campaign: CampaignConfig, tmp_path: Path) -> None:
    own = {"annotation_id": 1, "annotator": "anna", "created_at": "2024-05-01T09:00:00Z"}
    file = tmp_path / "export.json"
    file.write_text(json.dumps([{**own, "image": f"x/{M[0]}.png", "quality": "good"}]))
    assert said(imported(campaign, file)) == [("anna", M[0], None, 1)]
    file.write_text(json.dumps([{**own, "first_id": M[1], "second_id": M[0], "which": "right"}]))
    assert said(imported(campaign, file)) == [("anna", M[1], M[0], -1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n\t", "is empty"),
        ("sample_id,rating,rater\n", "holds no judgement"),
        ("first_id,choice,rater\n", "missing column second_id of format choice"),
        ("sample_id,rank,rater\n", "missing column group_id of format rank"),
        ("file_path,label\n", "missing column caption of format Diffusion-KTO"),
        ("name,stars\nx,5\n", "no known format; the header has 'name', 'stars'; expected choice: first_id"),
        ("group_id,sample_id,rank,rating\n", "fit rating and rank; keep the columns of one format"),
        ("sample_id,rating,rating\nr3-g0-m0,1,0\n", "the header has 'rating' more than once"),
        ('sample_id,rating,rater\nr3-g0-m0,1,"anna\nr3-g0-m1,0,anna\n', "row 2: a quote is opened and never closed"),
        ("sample_id,rating,rater\nr3-g0-m0,1,anna\nr3-g0-", r"row 3: is cut off .*is the file still being written\?"),
        ('[{"sample_id": "r3-g0-m0", "rating": 1}, {"sam', "is not JSON .*still being written"),
        ('{"sample_id": "r3-g0-m0", "rating": 1}\n{"sam', "is not JSON .*still being written"),
        ('[{"sample_id" "x"}]', "line 1: is not JSON"),
        ("[" * 100_000, "nested too deeply|is not JSON"),
        ("[" + "9" * 5000 + "]", "cannot be read as JSON"),
        ("[]", "holds no list of judgements"),
        ("[[1, 0, 1, 1]]", "is a list without ids; .*--order manifest.json"),
        ('{"order": [["r3-g0-m0"]]}', "a sheet's manifest goes to --order"),
        ("PK\x03\x04whatever", "is an Excel workbook .*save the sheet as CSV UTF-8"),
    ],
)
def test_file_that_is_wrong_as_a_whole_is_one_line_that_says_what_to_do(
    tmp_path: Path, campaign: CampaignConfig, content: str, message: str
) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(content)
    with pytest.raises(D3POError, match=message) as caught:
        import_file(campaign.folder, file, rater="zoe")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("labels.csv")


def test_file_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_bytes(TEXT.encode("latin-1"))
    with pytest.raises(D3POError, match=r"labels.csv line 2: byte 0xeb is not UTF-8; save the file as 'CSV UTF-8'"):
        read_judgement_file(file)


@pytest.mark.parametrize("what", ["folder", "missing", "unnameable"])
def test_what_is_no_file_is_a_one_line_error(tmp_path: Path, what: str) -> None:
    path = {"folder": tmp_path, "missing": tmp_path / "no.csv", "unnameable": tmp_path / ("x" * 300)}[what]
    with pytest.raises(D3POError, match=r"is no plain file|cannot be read"):
        read_judgement_file(path)


def test_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(TEXT)
    read = Path.read_bytes

    def read_while_somebody_writes(path: Path) -> bytes:
        content = read(path)
        with path.open("a") as stream:
            stream.write("r3-g0-m2,1,anna\n")
        return content

    monkeypatch.setattr(Path, "read_bytes", read_while_somebody_writes)
    with pytest.raises(D3POError, match=r"labels.csv: changed while it was read; is the file still being written\?"):
        read_judgement_file(file)


def test_row_numbers_are_those_of_a_spreadsheet(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text('sample_id,rating,rater,prompt\na,1,x,"two\nlines"\nb,1,x\nc,1,x,\n\nd,1,x,,\ne,1,x,\n')
    found = read_judgement_file(file)
    rows = dict(zip(found.table["sample_id"].to_pylist(), found.table["row"].to_pylist(), strict=True))
    assert {name: rows[name] for name in "ace"} == {"a": 2, "c": 4, "e": 7}
    assert found.problems["row"].to_pylist() == [3, 6]


@pytest.mark.parametrize(
    ("order", "message"),
    [("[]", "is no order"), ('{"order": [["x"]]}', "is no order"), ("[[1, 2]]", "is no order"), ("1", "is no order"),
     ("[[", "is not JSON")],
)  # fmt: skip
def test_order_that_names_no_samples_is_refused(tmp_path: Path, order: str, message: str) -> None:
    (tmp_path / "order.json").write_text(order)
    with pytest.raises(D3POError, match=message):
        load_order(tmp_path / "order.json")


@pytest.mark.parametrize("numbers", ["[[1, 0], [0, 1]]", "[[1, 0, 1, 1]]", "[1, 0, 1]", "[[1,0,1,1],[0,0,1]]"])
def test_positional_list_of_another_shape_than_its_order_is_refused(
    campaign: CampaignConfig, tmp_path: Path, numbers: str
) -> None:
    (tmp_path / "labels.json").write_text(numbers)
    with pytest.raises(D3POError, match="give the order of this file"):
        import_file(campaign.folder, tmp_path / "labels.json", rater="zoe", order=str(
            EXAMPLES / "d3po_positional_order.json"))  # fmt: skip


def test_sampled_order_is_groups_and_members_as_they_were_sampled(campaign: CampaignConfig, tmp_path: Path) -> None:
    values = [[group * 4 + member for member in range(4)] for group in range(4)]
    (tmp_path / "labels.json").write_text(json.dumps(values))
    rows = imported(campaign, tmp_path / "labels.json", rater="zoe", order="sampled")
    assert {row["sample_id"]: row["value"] for row in rows} == {
        f"r3-g{group}-m{member}": values[group][member] for group in range(4) for member in range(4)
    }


@given(st.text(st.characters(blacklist_categories=["Cs"]) | st.sampled_from("'=+-@\t\r\n\uff1d"), max_size=6))
def test_neutralised_cell_is_no_formula_and_reads_as_before(text: str) -> None:
    cell = neutralise(text)
    assert not cell.startswith(tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"))
    assert (clean(text_array([cell]))[0].as_py() or "") == text.strip()


def exported(tmp_path: Path, left: str, right: str, rows: list[str]) -> Path:
    """A CSV of Label Studio's pairwise template; its columns stand in the alphabet's order, as its converter writes."""
    header = f'"annotation_id","annotator","created_at","id","{left}","lead_time","{right}","pw","updated_at"'
    (tmp_path / "export.csv").write_text("\n".join([header, *rows]) + "\n")
    return tmp_path / "export.csv"


JUDGED = (
    '500,"ann@example.org","2026-11-01T09:00:00Z",100,"/data/upload/4/5ab0c1d0-{0}.png",4.2,"/data/upload/4/5ab0c1d1-{1}.png",'
    '"[{{""selected"":""left""}}]","2026-11-01T09:00:05Z"'
)
UNTOUCHED = '"","","",101,"/data/upload/4/5ab0c1d0-{0}.png","","/data/upload/4/5ab0c1d1-{1}.png","",""'


@pytest.mark.parametrize(("left", "right"), [("image1", "image2"), ("left", "right"), ("pic_a", "pic_b")])
def test_names_of_columns_tell_which_image_was_left(
    left: str, right: str, campaign: CampaignConfig, tmp_path: Path
) -> None:
    file = exported(tmp_path, left, right, [JUDGED.format(M[0], M[1])])
    assert said(imported(campaign, file)) == [("ann@example.org", M[0], M[1], 1)]


def test_an_order_of_columns_that_cannot_be_told_is_not_guessed(campaign: CampaignConfig, tmp_path: Path) -> None:
    """By alphabet `baseline` would be left, and every preference of `ours`, which was, would turn round."""
    file = exported(tmp_path, "baseline", "ours", [JUDGED.format(M[0], M[1])])
    with pytest.raises(D3POError, match=r"which of the columns .*baseline.* and .*ours.* stood on the left"):
        import_file(campaign.folder, file)


def test_a_task_that_nobody_annotated_is_no_judgement_of_anybody(campaign: CampaignConfig, tmp_path: Path) -> None:
    """As a skip of the rater who was named for the file it would take back what they said before."""
    rows = [JUDGED.format(M[0], M[1]), UNTOUCHED.format(M[1], M[2])]
    file = exported(tmp_path, "image1", "image2", rows)
    assert said(imported(campaign, file, rater="bob")) == [("ann@example.org", M[0], M[1], 1)]


@pytest.mark.parametrize(
    ("delimiter", "number"), [("\t", "1,250"), (";", "1.250"), (";", "1,250"), ("\t", "12.345.678")]
)
def test_digits_in_threes_are_not_guessed(
    delimiter: str, number: str, campaign: CampaignConfig, tmp_path: Path
) -> None:
    """Beside 980 the number 1,250 is 1250, and as 1.25 it would turn the order round."""
    rows = [("sample_id", "rating", "rater"), (M[0], number, "ann"), (M[1], "980", "ann")]
    (tmp_path / "elo.csv").write_text("\n".join(delimiter.join(row) for row in rows) + "\n")
    report = import_file(campaign.folder, tmp_path / "elo.csv")
    assert report.written is None
    told = "\n".join(report.summary())
    assert "may mean thousands or a decimal fraction" in told
    assert number in told


@pytest.mark.parametrize(("delimiter", "numbers", "values"), [
    (";", ("1,250", "0,5"), (1.25, 0.5)), ("\t", ("1.250", "0.75"), (1.25, 0.75)), (",", ("1.250", "2"), (1.25, 2)),
])  # fmt: skip
def test_a_column_that_shows_what_its_separator_is_reads_as_it_says(
    delimiter: str, numbers: tuple[str, str], values: tuple[float, float], campaign: CampaignConfig, tmp_path: Path
) -> None:
    rows = [("sample_id", "rating", "rater"), *((M[n], number, "ann") for n, number in enumerate(numbers))]
    (tmp_path / "elo.csv").write_text("\n".join(delimiter.join(row) for row in rows) + "\n")
    assert [row["value"] for row in imported(campaign, tmp_path / "elo.csv")] == list(values)
