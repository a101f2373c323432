"""All images of a campaign in one in-memory table, filtered and sorted in SQL."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import duckdb

from d3po_core.errors import D3POError
from d3po_core.queries.views import connect_views

if TYPE_CHECKING:
    import pandas as pd

PAGE_SIZE = 60
Kind = Literal["train", "held-out"]
Answer = Literal["yes", "no"]
ORDERS = {
    "newest": "round DESC, place",
    "oldest": "round, place",
    "best": "score DESC NULLS LAST, round DESC, place",
    "worst": "score ASC NULLS LAST, round DESC, place",
}
_TABLES = ("samples", "judgements", "preferences", "evaluations", "rounds")

# One row per image. `place` orders the images of a round: ids such as r3-g10-m2 do not sort as text.
_IMAGES = """
CREATE TEMP TABLE images AS
WITH wins AS (SELECT round, winner_id AS sample_id, count(*) AS won FROM preferences GROUP BY ALL),
losses AS (SELECT round, loser_id AS sample_id, count(*) AS lost FROM preferences GROUP BY ALL),
judged AS (
    SELECT DISTINCT round, unnest([first_id, second_id]) AS sample_id FROM votes WHERE rater_kind = 'human'
), every AS (
    SELECT round, sample_id, 'train' AS kind, prompt, seed, checkpoint, image_path, height, width FROM samples
    UNION ALL
    SELECT DISTINCT round, sample_id, 'held-out', prompt, seed, checkpoint, image_path, height, width FROM evaluations
)
SELECT e.*, coalesce(won, 0) AS won, coalesce(lost, 0) AS lost, j.sample_id IS NOT NULL AS judged,
       row_number() OVER (PARTITION BY e.round ORDER BY kind DESC,
           list_transform(regexp_extract_all(e.sample_id, '[0-9]+'), lambda x: CAST(x AS BIGINT))) AS place
FROM every e LEFT JOIN wins USING (round, sample_id) LEFT JOIN losses USING (round, sample_id)
LEFT JOIN judged j USING (round, sample_id)
"""
_SCORES = """
CREATE TEMP TABLE scores AS
SELECT round, sample_id, rater AS scorer, value AS score FROM judgements
WHERE rater_kind = 'proxy' AND kind = 'score' AND value IS NOT NULL
QUALIFY row_number() OVER (PARTITION BY round, sample_id, rater ORDER BY judged_at DESC) = 1
UNION ALL SELECT round, sample_id, scorer, score FROM evaluations
"""


@dataclass(frozen=True)
class Filters:
    """Which images to show, and in which order. ``None`` does not filter.

    Attributes:
        round: the round that drew the image.
        kind: ``train`` or ``held-out``.
        prompt: text that the prompt contains, in any case.
        scorer: whose scores to show, filter and sort by; the campaign's first by default.
        low: lowest score.
        high: highest score.
        judged: ``yes``: people judged it.
        won: ``yes``: it is the winner of at least one pair.
        lost: ``yes``: it is the loser of at least one pair.
        order: a key of ``ORDERS``.
    """

    round: int | None = None
    kind: Kind | None = None
    prompt: str | None = None
    scorer: str | None = None
    low: float | None = None
    high: float | None = None
    judged: Answer | None = None
    won: Answer | None = None
    lost: Answer | None = None
    order: str = "newest"


@dataclass(frozen=True)
class Page:
    """Rows of one page of a gallery, and how many images fit the filters in total."""

    rows: list[dict[str, Any]]
    total: int


class Gallery:
    """A campaign's images; read again when its tables change, safe for several threads.

    Args:
        campaign: the campaign's folder.
    """

    def __init__(self, campaign: Path) -> None:
        self.campaign = campaign
        self._lock = threading.Lock()
        self._stamp: tuple[Any, ...] = ()
        self._connection: duckdb.DuckDBPyConnection | None = None

    def page(self, filters: Filters, number: int = 1) -> Page:
        """Return one page of images; pages count from 1.

        Raises:
            D3POError: the campaign's tables cannot be read.
        """
        source, values = self._source(filters)
        rows = f"SELECT * FROM {source} ORDER BY {ORDERS[filters.order]} LIMIT $limit OFFSET $offset"
        window = {"limit": PAGE_SIZE, "offset": PAGE_SIZE * (number - 1)}
        with self._cursor() as cursor:
            total = cursor.execute(f"SELECT count(*) FROM {source}", values).fetchall()[0][0]
            found = cursor.sql(rows, params=values | window).to_arrow_table().to_pylist()
        return Page(found, int(total))

    def everything(self, filters: Filters) -> "pd.DataFrame":
        """Return all images that fit the filters, one row each.

        Raises:
            D3POError: the campaign's tables cannot be read.
        """
        source, values = self._source(filters)
        with self._cursor() as cursor:
            return cursor.sql(f"SELECT * FROM {source} ORDER BY {ORDERS[filters.order]}", params=values).df()

    def rounds(self) -> list[int]:
        """Return the rounds that have images, the latest first."""
        with self._cursor() as cursor:
            found = cursor.execute("SELECT DISTINCT round FROM images ORDER BY round DESC").fetchall()
        return [number for (number,) in found]

    def scorers(self) -> list[str]:
        """Return the names of all scorers, the one that the rounds report first; one empty name if there is none."""
        main = "scorer = (SELECT max_by(eval_scorer, round) FROM rounds)"
        sql = f"SELECT scorer FROM (SELECT DISTINCT scorer FROM scores) ORDER BY {main} DESC, scorer"
        with self._cursor() as cursor:
            found = cursor.execute(sql).fetchall()
        return [name for (name,) in found] or [""]

    def image_path(self, sample_id: str) -> Path | None:
        """Return an image's file, or None if the campaign has no such image."""
        with self._cursor() as cursor:
            found = cursor.execute("SELECT image_path FROM images WHERE sample_id = $id", {"id": sample_id}).fetchall()
        return self.campaign / found[0][0] if found else None

    def _source(self, filters: Filters) -> tuple[str, dict[str, Any]]:
        """Return what to select from, and its values."""
        where, values = _conditions(filters)
        values |= {"scorer": filters.scorer or self.scorers()[0]}
        return (
            f"images LEFT JOIN (SELECT * FROM scores WHERE scorer = $scorer) USING (round, sample_id) {where}",
            values,
        )

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        with self._lock:
            stamp = _stamp(self.campaign)
            if self._connection is None or stamp != self._stamp:
                self._connection, self._stamp = _read(self.campaign), stamp
            return self._connection.cursor()


def _read(campaign: Path) -> duckdb.DuckDBPyConnection:
    """Return a DuckDB that holds the images and scores, without the campaign's files open."""
    memory = duckdb.connect(":memory:")
    with connect_views(campaign) as views:
        try:
            for name, sql in (("images", _IMAGES), ("scores", _SCORES)):
                views.execute(sql)
                rows = views.sql(f"SELECT * FROM {name}").to_arrow_table()
                memory.register("rows", rows)
                memory.execute(f"CREATE TABLE {name} AS SELECT * FROM rows")
                memory.unregister("rows")
            rows = views.sql("SELECT round, eval_scorer FROM memory.main.rounds").to_arrow_table()
        except duckdb.Error as error:
            raise D3POError(
                f"campaign {campaign.name!r}: its tables cannot be read ({error}); type: d3po check"
            ) from None
    memory.register("rows", rows)
    memory.execute("CREATE TABLE rounds AS SELECT * FROM rows")
    return memory


def _stamp(campaign: Path) -> tuple[Any, ...]:
    """Return what changes whenever a table's files do: each is written under a new name and then renamed."""
    folders = [folder for table in _TABLES for folder in sorted((campaign / table).glob("round=*"))]
    return tuple((folder.as_posix(), folder.stat().st_mtime_ns) for folder in folders)


def _conditions(filters: Filters) -> tuple[str, dict[str, Any]]:
    """Return a WHERE clause and its values."""
    conditions = {
        "round = $round": filters.round,
        "kind = $kind": filters.kind,
        "contains(lower(prompt), lower($prompt))": filters.prompt,
        "score >= $low": filters.low,
        "score <= $high": filters.high,
        "judged = ($judged = 'yes')": filters.judged,
        "(won > 0) = ($won = 'yes')": filters.won,
        "(lost > 0) = ($lost = 'yes')": filters.lost,
    }
    given = {condition: value for condition, value in conditions.items() if value not in (None, "")}
    names = [condition.partition("$")[2].split(" ")[0].rstrip(")") for condition in given]
    where = f"WHERE {' AND '.join(given)}" if given else ""
    return where, dict(zip(names, given.values(), strict=True))
