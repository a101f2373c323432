"""Finish an import: from the shards' rows to the groups that rounds draw, the report of problems, and the facts."""

import csv
import re
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from d3po_core.config import CampaignConfig
from d3po_core.datasets.sources import Source
from d3po_core.datasets.stored import FACTS, GROUPS, one_size, vae_sha256
from d3po_core.errors import D3POError
from d3po_core.spreadsheets import neutralise
from d3po_core.store.files import atomic_path
from d3po_core.store.integrity import sha256_of
from d3po_core.store.sealed import sealed

PROBLEMS = "problems.csv"
# Single images of one prompt are compared with each other, at most so many at once.
MOST_IN_GROUP = 8

_GROUPS = f"""
WITH entries AS (SELECT * FROM read_parquet('{{shards}}') WHERE problem IS NULL),
images AS (SELECT sha256, any_value(shard) AS shard, any_value(latent_row) AS latent_row
           FROM entries WHERE latent_row IS NOT NULL GROUP BY sha256),
members AS (
    SELECT *, kind IN ('score', 'rating') AS alone,
           (row_number() OVER (PARTITION BY kind, prompt ORDER BY source, row) - 1) // {MOST_IN_GROUP} AS part
    FROM entries
)
SELECT prompt, kind, list(value ORDER BY source, row, place) AS values,
       list(sha256 ORDER BY source, row, place) AS sha256,
       list(images.shard ORDER BY source, row, place) AS shard,
       list(images.latent_row ORDER BY source, row, place) AS row
FROM members JOIN images USING (sha256)
GROUP BY prompt, kind, if(alone, -1, source), if(alone, part, row)
ORDER BY min((source, row))
"""


def write_groups(folder: Path, config: CampaignConfig, sources: list[Source]) -> None:
    """Write the groups of all shards and the report of rows that were left out, then the facts.

    Raises:
        D3POError: no row could be used.
    """
    inside = re.sub(r"([\[*?])", r"[\1]", str(folder / "shards")).replace("'", "''")
    shards = f"{inside}/*.parquet"
    with duckdb.connect(":memory:") as connection:
        groups = connection.sql(_GROUPS.format(shards=shards)).to_arrow_table()
        problems = connection.execute(
            f"SELECT source, row, problem FROM read_parquet('{shards}') WHERE problem IS NOT NULL ORDER BY source, row"
        )
        first = _write_problems(folder, problems, sources)
        counts = connection.execute(
            "SELECT count(DISTINCT (source, row)), count(DISTINCT (source, row)) FILTER (problem IS NOT NULL), "
            f"count(DISTINCT sha256), count(sha256) FROM read_parquet('{shards}')"
        ).fetchone()
        digests = connection.execute(
            f"SELECT DISTINCT shard, shard_sha256 FROM read_parquet('{shards}') WHERE shard IS NOT NULL ORDER BY shard"
        ).fetchall()
    assert counts is not None
    if not len(groups):
        raise D3POError(f"{folder}: no row could be used; {first}; all are in {folder / PROBLEMS}")
    _write_facts(folder, config, groups, counts, dict(digests), first)


def _write_facts(
    folder: Path, config: CampaignConfig, groups: pa.Table, counts: tuple[int, ...], shards: dict[str, str],
    first_problem: str | None,
) -> None:  # fmt: skip
    with atomic_path(folder / GROUPS) as temporary:
        pq.write_table(groups, temporary, compression="zstd")
    kinds = groups["kind"].value_counts().to_pylist()
    rows, problems, images, used = counts
    facts: dict[str, Any] = {
        "rows": rows, "problems": problems, "groups": {kind["values"]: kind["counts"] for kind in kinds},
        "images": images, "reused": used - images, "first_problem": first_problem,
        "model": config.model.path, "vae_sha256": vae_sha256(config.model),
        "size": one_size(config), "groups_sha256": sha256_of(folder / GROUPS),
        "shards": shards,
    }  # fmt: skip
    with atomic_path(folder / FACTS) as temporary:
        temporary.write_text(sealed(facts))


def _write_problems(folder: Path, problems: duckdb.DuckDBPyConnection, sources: list[Source]) -> str | None:
    """Write the report of rows that were left out; return the first of them in words."""
    first = None
    with atomic_path(folder / PROBLEMS) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "row", "problem"])
        while rows := problems.fetchmany(1000):
            for source, row, why in rows:
                name = sources[source].path.name
                first = first or f"{name} row {row} {why}"
                writer.writerow([neutralise(name), row, neutralise(why)])
    return first
