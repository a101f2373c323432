"""A question to a campaign reads, and does nothing else."""

import json
from pathlib import Path

import pytest

from d3po_core.errors import D3POError
from d3po_core.queries.query import ask, plain, write_answer
from tests.core.small_campaign import write_campaign


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_campaign(tmp_path_factory.mktemp("data") / "runs")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(campaign: Path, sql: str) -> str:
    with pytest.raises(D3POError) as caught, ask(campaign, sql) as answer:
        answer.fetchall()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{out}'", "COPY samples TO '{campaign}/samples/round=1/part.parquet'",
        "EXPORT DATABASE '{out}'", "ATTACH '{out}' AS other", "CREATE TABLE t AS SELECT 1", "DROP VIEW samples",
        "INSTALL httpfs", "LOAD httpfs", "SET lock_configuration = false", "PRAGMA enable_progress_bar",
        "SELECT 1; COPY (SELECT 1) TO '{out}'", "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'", "CALL force_checkpoint()",
        "INSERT INTO samples SELECT * FROM samples", "", "-- nothing", "BEGIN; SELECT 1",
    ],
)  # fmt: skip
def test_whatever_does_more_than_read_is_refused_and_changes_nothing(campaign: Path, tmp_path: Path, sql: str) -> None:
    before, out = contents(campaign), tmp_path / "out"
    assert "expected one SELECT" in refusal(campaign, sql.format(out=out, campaign=campaign))
    assert contents(campaign) == before
    assert not out.exists()


def test_nothing_is_fetched(campaign: Path) -> None:
    for place in ("https://example.invalid/x.csv", "s3://bucket/x.parquet"):
        assert "httpfs" in refusal(campaign, f"SELECT * FROM '{place}'")


def test_files_that_the_sql_names_are_joined(campaign: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.csv"
    mine.write_text('sample_id;my_score;note\nr1-g0-m0;4,5;"café; dark"\nr1-g0-m1;3,0;ok\n', encoding="utf-8")
    sql = f"SELECT s.sample_id, note FROM samples s JOIN read_csv('{mine}', delim=';') m USING (sample_id) ORDER BY ALL"
    with ask(campaign, sql) as answer:
        assert answer.fetchall() == [("r1-g0-m0", "café; dark"), ("r1-g0-m1", "ok")]


def test_what_json_has_no_number_for_is_null(campaign: Path, tmp_path: Path) -> None:
    sql = (
        "SELECT 'NaN'::DOUBLE AS a, '-inf'::DOUBLE AS b, [1.5, 'nan'::DOUBLE] AS c, {'x': 'inf'::DOUBLE} AS d, "
        """'NaN, "Infinity" -Infinity' AS e, 9007199254740993 AS f"""
    )
    with ask(campaign, sql) as answer:
        write_answer(answer, "json", tmp_path / "answer.json")
    text = (tmp_path / "answer.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) == {
        "a": None, "b": None, "c": [1.5, None], "d": {"x": None}, "e": 'NaN, "Infinity" -Infinity',
        "f": 9007199254740993,
    }  # fmt: skip


def test_a_csv_opens_in_a_spreadsheet_as_text_in_utf8(campaign: Path, tmp_path: Path) -> None:
    sql = """SELECT '=1+1' AS "a=b", '@x' AS b, 'café' AS c, -5 AS d, '''=' AS e, NULL::VARCHAR AS f"""
    with ask(campaign, sql) as answer:
        write_answer(answer, "csv", tmp_path / "answer.csv")
    raw = (tmp_path / "answer.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf")
    assert raw.decode("utf-8-sig").splitlines() == ["a=b,b,c,d,e,f", "'=1+1,'@x,café,-5,''=,"]


def test_a_terminal_is_shown_what_it_would_obey() -> None:
    assert plain("a\x1b[31mred\x07 b\u202ec") == r"a\x1b[31mred\x07 b\u202ec"
    assert plain("tab\tand line\nstay, and café 図") == "tab\tand line\nstay, and café 図"
