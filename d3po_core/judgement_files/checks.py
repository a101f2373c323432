"""Check all rows of imported judgements against the rules: report bad rows, and turn good ones into judgements."""

from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d3po_core.judgement_files.formats import JudgementFile
from d3po_core.judgement_files.rules import Scope, both_bad_sql, checks_of, macros, skipped_sql, value_sql
from d3po_core.store.tables import SCHEMAS

CHUNK = 1 << 17  # rows per pass, which bounds the memory


@dataclass(frozen=True)
class Checked:
    """Good rows (columns of ``judgements``), problems (row, column, value, message), and counts.

    ``num_empty`` rows say nothing; ``num_repeated`` rows repeat another row.
    """

    rows: pa.Table
    problems: pa.Table
    num_bad: int
    num_empty: int
    num_repeated: int = 0


def check_judgements(file: JudgementFile, scope: Scope, source: str) -> Checked:
    """Find all bad rows of a file, and make judgements with this ``source`` of the good ones.

    Raises:
        D3POError: the scale is invalid.
    """
    samples = _with_group_size(scope.samples)
    # Look samples up here and check in chunks: one join over a million rows took 1.3 GB.
    own, other = (pc.index_in(file.table[name], samples["sample_id"]) for name in ("sample_id", "other_id"))
    good, num_said = [], 0
    with duckdb.connect(":memory:") as connection:
        connection.execute("SET threads = 2")
        connection.register("unreadable", file.problems)
        connection.register("samples", samples)
        connection.execute(macros(file.decimal_comma))
        connection.execute("CREATE TEMP TABLE problems AS SELECT * FROM unreadable")
        checks = list(checks_of(file, scope))
        for start in range(0, max(len(file.table), 1), CHUNK):
            rows = file.table.slice(start, CHUNK)
            for name, column in _of_samples(samples, own.slice(start, CHUNK), other.slice(start, CHUNK)).items():
                rows = rows.append_column(name, column)
            connection.register("file", rows)
            connection.execute(
                _SAID.format(
                    value=value_sql(file.kind, scope.scale), skipped=skipped_sql(), both_bad=both_bad_sql(file.kind)
                ),
                {"rater": scope.rater},
            )
            # Good rows take one pass; messages are made only for failed checks.
            found = connection.sql(
                f"SELECT {', '.join(f'bool_or({check[1]})' for check in checks)} FROM said"
            ).fetchall()
            for (column, condition, message), failed in zip(checks, found[0], strict=True):
                if not failed:
                    continue
                connection.execute(
                    f"INSERT INTO problems SELECT row, $label, {column}, {message} FROM said WHERE {condition}",
                    {"label": file.labels.get(column, column)},
                )
            good.append(connection.sql(_GOOD).to_arrow_table())
            num_said += connection.table("said").count("*").fetchall()[0][0]
        right = pa.concat_tables(good)
        right, num_repeated = _without_repeats(connection, right, file.labels.get("said", "said"))
        problems = connection.sql('SELECT * FROM problems ORDER BY row, "column"').to_arrow_table()
        bad = connection.table("problems").aggregate("count(DISTINCT row)").fetchall()[0][0]
    num_empty = len(file.table) - num_said
    return Checked(_judgements(right, file.kind, scope, source), problems, bad, num_empty, num_repeated)


def _with_group_size(samples: pa.Table) -> pa.Table:
    sizes = samples.group_by("group_id").aggregate([([], "count_all")])
    return samples.append_column("size", sizes["count_all"].take(pc.index_in(samples["group_id"], sizes["group_id"])))


def _of_samples(samples: pa.Table, own: pa.ChunkedArray, other: pa.ChunkedArray) -> dict[str, pa.ChunkedArray]:
    """Columns of the samples that rows name; null if there is no such sample."""
    taken = {"group_of": ("group_id", own), "other_group_of": ("group_id", other), "prompt_of": ("prompt", own),
             "group_size": ("size", own)}  # fmt: skip
    return {name: samples[column].take(index) for name, (column, index) in taken.items()}


def _without_repeats(connection: duckdb.DuckDBPyConnection, good: pa.Table, label: str) -> tuple[pa.Table, int]:
    """Report rows that contradict each other at one time; of identical rows keep the first."""
    things, counts = np.unique(good["thing"].to_numpy(), return_counts=True)
    if not (counts > 1).any():
        return good, 0
    good = good.append_column("place", pa.array(np.arange(len(good))))
    connection.register("candidates", good.filter(pc.is_in(good["thing"], pa.array(things[counts > 1]))))
    connection.execute(_REPEATS, {"label": label})
    dropped = connection.sql("SELECT place, same FROM dropped").to_arrow_table()
    kept = good.filter(pc.invert(pc.is_in(good["place"], dropped["place"].combine_chunks())))
    return kept.drop_columns(["place"]), pc.sum(dropped["same"].cast("int64")).as_py() or 0


def _judgements(good: pa.Table, kind: str, scope: Scope, source: str) -> pa.Table:
    same = {"rater_kind": scope.rater_kind, "kind": kind, "source": source}
    zeros = pa.array(np.zeros(len(good), dtype=np.int64))
    columns = {name: pa.array([text]).take(zeros) for name, text in same.items()}
    columns["judged_at"] = pc.fill_null(good["moment"], pa.scalar(scope.now, pa.timestamp("us")))
    names = SCHEMAS["judgements"].names
    return pa.table({name: columns[name] if name in columns else good[name] for name in names})


_SAID = """
CREATE OR REPLACE TEMP TABLE said AS
    SELECT * EXCLUDE (rater), coalesce(rater, $rater) AS rater,
           {value}::DOUBLE AS value, {skipped} AS skipped, {both_bad} AS both_bad,
           utc(judged_at) AS moment
    FROM file WHERE said IS NOT NULL;
"""

_GOOD = """
SELECT row, rater, sample_id, other_id, value, both_bad, moment, number(seconds) AS seconds,
       number(position)::BIGINT AS position,
       hash(rater, least(sample_id, coalesce(other_id, sample_id)), greatest(sample_id, coalesce(other_id, sample_id)),
            moment) AS thing, said
FROM said ANTI JOIN problems USING (row) ORDER BY row
"""

# This tells apart different things with equal hashes.
_REPEATS = """
CREATE TEMP TABLE things AS
    SELECT place, row, rater, least(sample_id, coalesce(other_id, sample_id)) AS low,
           greatest(sample_id, coalesce(other_id, sample_id)) AS high, moment, said,
           if(other_id < sample_id, -value, value) AS value, coalesce(both_bad, false) AS both_bad
    FROM candidates;
CREATE TEMP TABLE repeats AS
    SELECT rater, low, high, moment, min(row) AS first_row, max(row) AS last_row, min(place) AS first_place,
           count(DISTINCT value) + (count(*) > count(value))::INTEGER + count(DISTINCT both_bad) > 2 AS differ
    FROM things GROUP BY rater, low, high, moment HAVING count(*) > 1;
CREATE TEMP TABLE dropped AS
    SELECT place, NOT differ AS same
    FROM things t JOIN repeats r
        ON r.rater = t.rater AND r.low = t.low AND r.high = t.high AND r.moment IS NOT DISTINCT FROM t.moment
    WHERE differ OR place > first_place;
INSERT INTO problems
    SELECT row, $label, said, 'is said by ' || r.rater || ' in row ' || if(row = first_row, last_row, first_row)
           || ' too, differently; keep one of them, or give each its own judged_at'
    FROM things t JOIN repeats r
        ON r.rater = t.rater AND r.low = t.low AND r.high = t.high AND r.moment IS NOT DISTINCT FROM t.moment
    WHERE differ;
"""
