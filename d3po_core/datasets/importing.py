"""Import a data set: shard after shard, then its groups; killed anywhere, the same call does the rest."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from d3po_core.config import CampaignConfig
from d3po_core.datasets.shards import ROWS, ShardWriter, known_images, rows_path
from d3po_core.datasets.sources import Source
from d3po_core.datasets.stored import FACTS, GROUPS, REMEDY, vae_sha256
from d3po_core.errors import D3POError
from d3po_core.models.encoding import Encoder
from d3po_core.spreadsheets import neutralise
from d3po_core.store.files import atomic_path, exclusive
from d3po_core.store.integrity import sha256_of
from d3po_core.store.sealed import read_sealed, sealed

BEGUN = "import.json"
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


@dataclass(frozen=True)
class Imported:
    """What an import found.

    Attributes:
        folder: the data set's folder.
        rows: rows of its tables.
        problems: rows that were left out.
        groups: groups that rounds can draw, by kind.
        images: distinct images, each encoded once.
        reused: images of rows that another row had already.
        first_problem: where and why the first row was left out; None if none was.
    """

    folder: Path
    rows: int
    problems: int
    groups: dict[str, int]
    images: int
    reused: int
    first_problem: str | None = None


def import_dataset(
    folder: Path,
    config: CampaignConfig,
    sources: list[Source],
    tell: Callable[[int], None] = lambda rows: None,
    make_encoder: Callable[[], Encoder] | None = None,
) -> Imported:
    """Encode a data set's images and store its groups.

    Args:
        folder: the data set's folder; made if it is new.
        config: its model and ``sample.latent_dtype`` are used.
        sources: the tables.
        tell: called with the number of rows of each shard that is made.
        make_encoder: loads the VAE.

    Raises:
        D3POError: another process imports it, it was begun with other tables or another model, a table cannot be read,
            or no row could be used; one line.
    """
    try:
        with exclusive(folder / ".lock", wait=False):
            if not (folder / FACTS).exists():
                _begin(folder, config, sources)
                dtype = getattr(torch, config.sample.latent_dtype)
                make = make_encoder or (lambda: Encoder(config.model))
                _write_shards(folder, ShardWriter(folder, make, dtype, known_images(folder)), sources, tell)
                _finish(folder, config, sources)
            else:
                _begin(folder, config, sources)
    except BlockingIOError:
        raise D3POError(
            f"{folder}: another process imports this data set; wait for it, or use another --name"
        ) from None
    facts = read_sealed(folder / FACTS, REMEDY)
    return Imported(folder, **{name: facts[name] for name in ("rows", "problems", "groups", "images", "reused",
                                                              "first_problem")})  # fmt: skip


def _write_shards(folder: Path, writer: ShardWriter, sources: list[Source], tell: Callable[[int], None]) -> None:
    for number, source in enumerate(sources):

        def finished(first: int, number: int = number) -> bool:
            return rows_path(folder, number, first).exists()

        for first, rows in source.chunks(ROWS, finished):
            writer.write(source, number, first, rows)
            tell(len(rows))
            rows.clear()  # before the next rows are read


def _begin(folder: Path, config: CampaignConfig, sources: list[Source]) -> None:
    """Note what the import begins with, or check that it is the same.

    Raises:
        D3POError: it is not.
    """
    plan = {
        "files": [
            {"name": source.path.name, "bytes": source.path.stat().st_size, "layout": source.layout.name,
             "columns": source.renamed}
            for source in sources
        ],
        "model": config.model.path, "latent_dtype": config.sample.latent_dtype, "rows": ROWS,
    }  # fmt: skip
    path = folder / BEGUN
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(sealed(plan))
        return
    begun = read_sealed(path, REMEDY)
    changed = [name for name in plan if plan[name] != begun.get(name)]
    if changed:
        name = changed[0]
        raise D3POError(
            f"data set {folder.name!r} was begun with {name} {json.dumps(begun.get(name))} (now "
            f"{json.dumps(plan[name])}); set it back, choose another --name, or remove {folder}"
        )


def _finish(folder: Path, config: CampaignConfig, sources: list[Source]) -> None:
    """Write groups and the report of rows that were left out, then the facts."""
    shards = str(folder / "shards" / "*.parquet").replace("'", "''")
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
        "model": config.model.path, "vae_sha256": vae_sha256(config.model), "groups_sha256": sha256_of(folder / GROUPS),
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
