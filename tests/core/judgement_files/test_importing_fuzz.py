"""Hostile files: whatever is in them, an import ends in a report or a D3POError, and writes all or nothing.

``D3PO_FUZZ_EXAMPLES=10000`` runs as many; without it a few dozen.
"""

import json
import math
import os
from collections import Counter
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.judgement_files.importing import import_file
from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.tables import check_table
from tests.core.sampled import sampled_campaign, samples

EXAMPLES = int(os.environ.get("D3PO_FUZZ_EXAMPLES", "60"))
VALID = [file.read_bytes() for file in sorted((PROJECT_ROOT / "data/examples/judgements").iterdir())]
KNOWN = {row["sample_id"]: row["group_id"] for row in samples(3).to_pylist()}
OUTCOMES: Counter[str] = Counter()

CELLS = [
    "", " ", "\0", "1e999", "-1e999", "nan", "inf", "NaN", "Infinity", "\u0661\u0662", "\u00bd", "1_000", "0x10", "--1",
    "=1+1", "+cmd|' /C calc'!A0", "@SUM(A1)", "'=1", "''=1", "-2", "\t=x", "\uff1d1", "null", "None", "true", "TRUE",
    "[]", "{}", '[{"rating": 4}]', '[{"rating": 4}, {"rating": 5}]', '[{"selected": "left"}]', '{"choices": ["good"]}',
    "first", "second", "tie", "skip", "FIRST", "good", "bad", "3", "1", "2.5", "1,5", "1e-400", "r3-g0-m0", "r3-g0-m1",
    "r3-g1-m0", "r3-g0-m99", "r2-g0-m0", "r9-g0-m0", "r3-g99999999999999999999-m0", "r" + "9" * 400 + "-g0-m0",
    "R3-G0-M0", "r3-g0-m0 ", "r3-g0-m0\u200b", "r\u0663-g0-m0", "2024-05-01", "2024-13-45T99:99:99Z", "1e5",
    "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+99:99", "2024-05-01T00:00:00-00:99", "infinity", "epoch", "anna",
    "A\u0301nna", "x" * 200, "x" * 200_000, "\u202ereversed", "\x1b[31mred", "a\nb", "a\r\nb", '"', '""', '"a', 'a"b',
    "'; DROP TABLE said; --", "$rater", "{value}", "%s", "\ufeff", "\U0001f388", "9" * 5000, "\xed\xa0\x80",
]  # fmt: skip
BYTES = [
    b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\x80", b"\xc3\x28", b'"', b"'", b",", b";", b"\t", b"\n", b"\r",
    b"\r\n", b"\n\n", b"{", b"}", b"[", b"]", b":", b"\\", b"\\u0000", b"\\ud800", b"NaN", b"1e999", b"\x1a",
    b"\x0c", b"\xe2\x80\xa8", b"sep=;\n", b"r3-g0-m0", b"[" * 5000, b'{"a":' * 3000, b"," * 1000,
]  # fmt: skip
HEADERS = [
    "first_id", "second_id", "choice", "rater", "sample_id", "rating", "rank", "group_id", "judged_at", "seconds",
    "position", "prompt", "campaign", "round", "file_path", "caption", "label", "annotation_id", "annotator",
    "lead_time", "image1", "image2", "pw", "", "Sample ID", "c0", "row", "said", "value", "\0", "x" * 70_000,
]  # fmt: skip
ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "shift_jis", "utf-7"]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with some bytes or lines damaged."""
    content = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        to = min(len(content), at + draw(st.sampled_from([0, 1, 1, 4, 30, 100_000])))
        lines = content.splitlines(keepends=True) or [b""]
        line = draw(st.integers(0, len(lines) - 1))
        content = draw(
            st.sampled_from(
                [
                    content[:at] + draw(st.sampled_from(BYTES)) + content[to:],
                    content[:at],
                    content[:at] + draw(st.binary(max_size=8)) + content[to:],
                    b"".join([*lines[:line], lines[line], *lines[line:]]),
                    b"".join([*lines[:line], *lines[line + 1 :]]),
                    b"".join(lines[::-1]),
                    content + draw(st.sampled_from(VALID)),
                    content.replace(b",", draw(st.sampled_from([b";", b"\t", b"|", b"\0", b",,"]))),
                    content.replace(b"\n", draw(st.sampled_from([b"\r", b"\r\n", b"\n\r", b"\n\n"])), line + 1),
                    content.replace(b"r3-", draw(st.sampled_from([b"r2-", b"r9-", b"=r3-", b"'r3-"])), line + 1),
                    content * draw(st.sampled_from([2, 50])),
                ]
            )
        )
    return content


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """A table with plausible columns and hostile cells, in any encoding, with any delimiter, quoting and newline."""
    shapes = [["first_id", "second_id", "choice"], ["sample_id", "rating"], ["group_id", "sample_id", "rank"],
              ["file_path", "caption", "label"], ["annotation_id", "annotator", "image1", "image2", "pw"]]  # fmt: skip
    header = draw(st.sampled_from(shapes)) + draw(
        st.lists(st.sampled_from(HEADERS[:14]) | st.sampled_from(HEADERS), max_size=4, unique=True)
    )
    header = draw(
        st.permutations(list(dict.fromkeys(header)) if draw(st.sampled_from([True, True, True, False])) else header)
    )
    delimiter, newline = draw(st.sampled_from(",,,;\t|")), draw(st.sampled_from(["\n", "\n", "\r\n", "\r", "\n\r"]))
    rows = [header]
    for _ in range(draw(st.integers(0, 6))):
        width = len(header) + draw(st.sampled_from([0] * 12 + [-1, 1, 5]))
        cell = st.one_of(st.sampled_from(sorted(KNOWN)[:6]), st.sampled_from(CELLS), st.text(max_size=6))
        row = draw(st.lists(cell, min_size=max(0, width), max_size=max(0, width)))
        if draw(st.booleans()):  # one that may be right
            member = draw(st.integers(0, 2))
            likely = {"first_id": f"r3-g0-m{member}", "second_id": f"r3-g0-m{member + 1}", "choice": "first",
                      "sample_id": f"r3-g0-m{member}", "group_id": "r3-g0", "rating": "1", "rank": "1", "label": "1",
                      "file_path": f"a/r3-g0-m{member}.png", "caption": "", "annotator": "5", "annotation_id": "1",
                      "image1": "r3-g1-m0", "image2": "r3-g1-m1", "pw": '[{"selected": "left"}]'}  # fmt: skip
            row = [likely.get(name, "") for name in header[:width]] + row[len(header) :]
        rows.append(row)
    quote = draw(st.booleans())

    def written(cell: str) -> str:
        return '"' + cell.replace('"', '""') + '"' if quote and any(c in cell for c in f'{delimiter}"\r\n') else cell

    text = newline.join(delimiter.join(map(written, row)) for row in rows) + draw(st.sampled_from(["", newline, '"']))
    return text.encode(draw(st.just("utf-8") | st.sampled_from(ENCODINGS)), "replace")


RESULTS = [{"selected": "left"}, [{"rating": 4}], [{"selected": "right"}], [[]], 10**400]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(CELLS), st.sampled_from(RESULTS)
)  # fmt: skip


@st.composite
def json_files(draw: st.DrawFn) -> bytes:
    """Records, tasks, lists and other JSON with values of the wrong kind, and JSON that no program would write."""
    record = st.dictionaries(st.sampled_from(HEADERS), SCALARS, max_size=7)
    rating = st.sampled_from([0, 1, 2.5, "good", "bad", "skip"])
    good = st.fixed_dictionaries({"sample_id": st.sampled_from(sorted(KNOWN)), "rating": rating | SCALARS},
                                 optional={"rater": SCALARS})  # fmt: skip
    result = st.fixed_dictionaries({"from_name": SCALARS, "value": SCALARS}) | SCALARS
    rater = SCALARS | st.dictionaries(st.just("email"), SCALARS)
    annotation = st.fixed_dictionaries(
        {"result": st.lists(result, max_size=2) | SCALARS, "completed_by": rater},
        optional={"was_cancelled": SCALARS, "created_at": SCALARS, "lead_time": SCALARS},
    )  # fmt: skip
    task = st.fixed_dictionaries({"data": record | SCALARS, "annotations": st.lists(annotation | SCALARS, max_size=3)})
    found = draw(
        st.one_of(
            st.lists(record, max_size=4), st.lists(good, max_size=5), st.lists(task, max_size=3),
            st.lists(st.one_of(good, SCALARS), max_size=4), st.lists(st.lists(SCALARS, max_size=5), max_size=5),
            st.lists(st.lists(rating | SCALARS, min_size=4, max_size=4), min_size=4, max_size=4),
            st.recursive(SCALARS, lambda v: st.lists(v) | st.dictionaries(st.text(max_size=3), v), max_leaves=9),
        )
    )  # fmt: skip
    try:
        text = json.dumps(found, ensure_ascii=draw(st.booleans()))
    except ValueError:  # a number of more digits than Python writes
        text = "[" + "9" * 5000 + "]"
    if isinstance(found, list) and draw(st.booleans()):
        text = draw(st.sampled_from(["\n", "\r\n", ""])).join(json.dumps(item, default=str)[:9000] for item in found)
    deep = draw(st.sampled_from(["", "", "", "[" * 100_000, '{"a":' * 50_000]))
    cut = draw(st.sampled_from([0, 0, 0, 1, 5]))
    text = deep + text
    return text[: len(text) - cut].encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"])), "replace")


HOSTILE = st.one_of(
    mutated(), tables(), tables(), json_files(), st.binary(max_size=300), st.text(max_size=200).map(str.encode)
)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> CampaignConfig:
    return sampled_campaign(tmp_path_factory.mktemp("fuzz"))


def assert_sound(rows: list[dict[str, Any]]) -> None:
    """What must hold of imported rows, said again without SQL."""
    things = set()
    for row in rows:
        assert row["sample_id"] in KNOWN
        assert row["rater"]
        assert len(row["rater"]) <= 100
        if row["kind"] == "choice":
            assert row["other_id"] != row["sample_id"]
            assert KNOWN[row["other_id"]] == KNOWN[row["sample_id"]]
            assert row["value"] in (-1, 0, 1, None)
        else:
            assert row["other_id"] is None
            assert row["value"] is None or math.isfinite(row["value"])
        if row["kind"] == "rank":
            assert row["value"] in (1, 2, 3, 4, None)
        assert row["seconds"] is None or row["seconds"] >= 0
        thing = (row["rater"], frozenset((row["sample_id"], row["other_id"])), row["judged_at"])
        assert thing not in things, "two judgements of one thing at one time"
        things.add(thing)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(
    content=HOSTILE, accept_valid=st.booleans(), rater=st.sampled_from(["zoe", "zoe", "zoe", None]), gold=st.booleans(),
    order=st.sampled_from([None, "sampled"]), round_number=st.sampled_from([None, None, 3]),
)  # fmt: skip
def test_hostile_file_ends_in_a_report_and_is_written_whole_or_not_at_all(
    campaign: CampaignConfig, content: bytes, accept_valid: bool, rater: str | None, gold: bool, order: str | None,
    round_number: int | None,
) -> None:  # fmt: skip
    file = campaign.folder.parent / "hostile"
    file.write_bytes(content)
    before = sorted(campaign.folder.rglob("*"))
    report, error = None, None
    try:
        report = import_file(
            campaign.folder, file, round_number, rater, False, accept_valid, gold, order=order
        )  # fmt: skip
    except D3POError as raised:
        error = str(raised)
    folder = campaign.folder / "judgements"
    written = [path for path in folder.rglob("*") if path.is_file()]
    try:
        if report is None or report.written is None:
            OUTCOMES["refused whole" if report is None else "refused rows"] += 1
            assert written == []
            assert [path for path in sorted(campaign.folder.rglob("*")) if folder not in (path, path.parent)] == [
                path for path in before if folder not in (path, path.parent)
            ]
        else:
            OUTCOMES["imported" if not report.num_bad else "imported the valid rows"] += 1
            assert written == [report.written]
            assert accept_valid or report.num_bad == 0
            table = pq.ParquetFile(report.written).read()
            check_table("judgements", table)
            assert len(table) == report.num_good > 0
            if report.round_number == 3:
                assert_sound(table.to_pylist())
        if error is not None:
            assert error
            assert len(error) < 3000
            assert "\n" not in error
            assert error.isprintable() or not error.isascii()
        if report is not None:
            lines = list(report.problem_lines())
            assert bool(lines) == bool(report.num_bad)
            assert not any(set(line) & set("\n\r\0\x1b") for line in [*lines, *report.summary()])
    finally:
        for path in written:
            path.unlink()


def test_hostile_files_reached_every_outcome() -> None:
    print(dict(OUTCOMES))
    if EXAMPLES >= 300 and OUTCOMES:
        assert {"refused whole", "refused rows", "imported"} <= OUTCOMES.keys()
