"""Find rounds and images by name; if one does not exist, a one-line error lists what does."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from d3po_core.config import CampaignConfig
from d3po_core.config_values import changed_fields
from d3po_core.errors import D3POError
from d3po_core.evaluation.comparison import round_named
from d3po_core.queries.views import connect_views
from d3po_core.store.campaign import round_config
from d3po_core.store.stages import finished_numbers
from d3po_core.store.tables import partition, read_rows
from d3po_core.urls import masked


def trained_round(campaign: Path, name: str) -> int:
    """Return the finished, trained round that ``champion``, ``latest`` or a number names.

    Raises:
        D3POError: no finished round has that name, or it is the base model.
    """
    number = round_named(campaign, name)
    if number == 0:
        rounds = ", ".join(map(str, finished_numbers(campaign)[1:])) or "none yet"
        raise D3POError(
            f"campaign {campaign.name!r}: {name} is the base model, not a round that trained; name another: {rounds}"
        )
    return number


def rejection(campaign: Path, round_number: int) -> str | None:
    """Return a warning if the guard rejected a round or stopped at it, else None."""
    (row,) = read_rows(partition(campaign, "rounds", round_number) / "part.parquet")
    if row.get("verdict") not in ("rejected", "stopped"):
        return None
    return (
        f"round {round_number} was {row['verdict']} by the guard ({row.get('findings') or 'no finding recorded'}); the "
        f"champion is round {row.get('champion')}"
    )


@dataclass(frozen=True)
class ImageStory:
    """An image's origin, its judgements, and its uses.

    Attributes:
        image: its row in ``samples``; for a held-out image its row in ``evaluations``, without the score.
        round: the round that drew it.
        held_out: whether it is a held-out image.
        judgements: rows of ``judgements`` that name it, oldest first.
        pairs: rows of ``pairs`` that contain it.
        compared: rows of ``human_comparisons`` that contain it.
        scores: held-out scores of the same prompt and seed in every round: round, scorer, score.
        run: the row of ``rounds``; None while the round is not finished.
        settings: fields of the round's configuration that differ from the default: name, default, value.
    """

    image: dict[str, Any]
    round: int
    held_out: bool
    judgements: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    compared: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    run: dict[str, Any] | None
    settings: list[tuple[str, Any, Any]]


def image_story(campaign: Path, sample_id: str) -> ImageStory:
    """Return all records of one image, by its id, such as ``r3-g4-m1`` or ``r3-e17``.

    Raises:
        D3POError: there is no such image; the message says which exist.
    """
    with connect_views(campaign, sql=_TOLD) as connection:
        image, held_out = find_image(connection, campaign, sample_id)
        number = image["round"]

        def rows(sql: str) -> list[dict[str, Any]]:
            given = {key: value for key, value in {"id": sample_id, "round": number}.items() if f"${key}" in sql}
            return connection.sql(sql, params=given).to_arrow_table().to_pylist()

        return ImageStory(
            image=image,
            round=number,
            held_out=held_out,
            # The round spares DuckDB the files of all others.
            judgements=rows(
                "SELECT * FROM judgements WHERE round = $round AND $id IN (sample_id, other_id) "
                "ORDER BY judged_at, rater"
            ),
            pairs=rows("SELECT * FROM pairs WHERE round = $round AND $id IN (winner_id, loser_id) ORDER BY pair_id"),
            compared=rows(
                "SELECT * FROM human_comparisons WHERE $id IN (sample_id, against_id) ORDER BY judged_at, rater"
            ),
            scores=rows(
                "SELECT e.round, e.scorer, e.score FROM evaluations e JOIN evaluations me "
                "ON me.round = $round AND me.sample_id = $id AND me.prompt = e.prompt AND me.seed = e.seed "
                "AND me.scorer = e.scorer ORDER BY e.scorer, e.round"
            ),
            run=next(iter(rows("SELECT * FROM rounds WHERE round = $round")), None),
            settings=[
                (name, default, masked(value) if isinstance(value, str) else value)
                for name, default, value in changed_fields(CampaignConfig(), round_config(campaign, number))
            ],
        )


_TOLD = "samples, evaluations, judgements, pairs, human_comparisons, rounds"


def find_image(connection: duckdb.DuckDBPyConnection, campaign: Path, sample_id: str) -> tuple[dict[str, Any], bool]:
    """Return an image's row with its round, and whether it is held out.

    Raises:
        D3POError: there is no such image; the message says which exist.
    """
    columns = {"samples": "*", "evaluations": "DISTINCT * EXCLUDE (scorer, score)"}
    for table, wanted in columns.items():
        found = connection.sql(f"SELECT {wanted} FROM {table} WHERE sample_id = $id", params={"id": sample_id})
        rows = found.to_arrow_table().to_pylist()
        if rows:
            return rows[0], table == "evaluations"
    raise D3POError(
        f"sample {sample_id!r} is not in campaign {campaign.name!r}: {_images_there(connection, sample_id)}"
    )


def _images_there(connection: duckdb.DuckDBPyConnection, sample_id: str) -> str:
    named = re.match(r"r(\d+)-", sample_id)
    if named is None:
        return "expected an id such as r3-g4-m1 (round 3, group 4, member 1) or r3-e17 (held-out image 17 of round 3)"
    there = []
    for table, what in (("samples", "images"), ("evaluations", "held-out images")):
        ids = connection.execute(
            f"SELECT DISTINCT sample_id FROM {table} WHERE round = $round "
            "ORDER BY list_transform(regexp_extract_all(sample_id, '[0-9]+'), lambda x: CAST(x AS BIGINT))",
            {"round": int(named[1])},
        ).fetchall()
        if ids:
            there.append(f"{len(ids)} {what}, {ids[0][0]} to {ids[-1][0]}")
    if there:
        return f"round {named[1]} has {' and '.join(there)}"
    low, high = connection.execute("SELECT min(round), max(round) FROM evaluations").fetchall()[0]
    return f"it has no round {named[1]}" + (f"; there are {low} to {high}" if low is not None else "")
