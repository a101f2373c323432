"""Gather a report's facts from a campaign's tables and files; nothing is drawn here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from d3po_core.config_values import leaves
from d3po_core.errors import D3POError
from d3po_core.evaluation.comparison import HeldOut, champions, read_held_out
from d3po_core.people.human_win_rate import HumanWinRate, human_win_rate, human_win_rates
from d3po_core.preferences.counting import questions
from d3po_core.preferences.deriving import collect_votes
from d3po_core.store.campaign import CAMPAIGN_FILE, rules_of
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import SCHEMAS, connect
from d3po_core.urls import masked

STAGES = ("sample", "judge", "derive", "train", "evaluate", "publish")
Row = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """All facts of a report, before they are worded. Rounds are in order; the first is the base."""

    folder: Path
    campaign_id: str
    config: Row
    config_changes: list[Row]  # round, field, before, after
    rounds: list[Row]  # rows of the table rounds, with `round`
    held_out: HeldOut  # one row per round
    reigns: list[int]  # position of the champion after each round
    training: list[Row]  # one row per round that trained: means over its updates, and what it learned
    clear_pairs: list[Row]
    doubtful_pairs: list[Row]  # empty when all pairs are equally clear
    crossings: list[Row]  # pairs on which people and a proxy disagree
    crossing_counts: list[Row]  # one row per round and proxy
    raters: list[Row]  # people, and data sets with their judgements, from judgements
    sizes: list[Row]  # of the images, sampled or held out; none in campaigns of earlier versions
    data_sets: list[str]  # their names
    preferred: list[HumanWinRate]  # from people's blind comparisons of held-out images
    files: list[Row]  # one row per table: where its Parquet files are

    @property
    def trusted(self) -> list[int]:
        """Return the positions of the rounds that the guard let stand."""
        return [at for at, row in enumerate(self.rounds) if row["verdict"] not in ("rejected", "stopped")]

    @property
    def champion(self) -> int:
        """Return the champion's position among the rounds."""
        return self.reigns[-1]

    @property
    def champion_preferred(self) -> HumanWinRate | None:
        """Return how often people prefer the champion to the base; None if nobody compared them."""
        return human_win_rate(self.preferred, self.rounds[self.champion]["round"], 0)


def gather(folder: Path, examples: int = 6) -> Facts:
    """Return the facts of a campaign, read from its folder.

    Args:
        folder: the campaign's folder.
        examples: at most how many pairs of each kind to show.

    Raises:
        D3POError: there is no campaign, or it has no finished round yet.
    """
    path = folder / CAMPAIGN_FILE
    if not path.is_file():
        raise D3POError(f"{folder} is no campaign: it has no {CAMPAIGN_FILE}; give the folder of a campaign")
    identity = json.loads(path.read_text())
    with connect(folder) as connection:
        rounds = _rows(connection, "SELECT * FROM rounds ORDER BY round")
        if not rounds:
            raise D3POError(f"campaign {folder.name!r} has no finished round yet; type: d3po run round")
        # Read once, since each query over a view opens the files of all rounds again.
        # Read only finished rounds, since a running round has only some of its tables.
        for table in SCHEMAS.keys() - {"rounds"}:
            connection.execute(
                f"CREATE TEMP TABLE {table} AS SELECT * FROM memory.main.{table} "
                "WHERE round IN (SELECT round FROM memory.main.rounds)"
            )
        held_out = read_held_out([(folder, row["round"]) for row in rounds])
        clear, doubtful = _pairs(connection, examples)
        crossings, counts = _crossings(connection, examples)
        return Facts(
            folder=folder,
            campaign_id=str(identity["id"]),
            config=rules_of(folder).model_dump(mode="json"),
            config_changes=_config_changes(folder, identity["config"], [row["round"] for row in rounds]),
            rounds=rounds,
            held_out=held_out,
            reigns=_reigns(rounds, held_out),
            training=_rows(connection, _TRAINING),
            clear_pairs=clear,
            doubtful_pairs=doubtful,
            crossings=crossings,
            crossing_counts=counts,
            raters=_rows(connection, _RATERS),
            sizes=_rows(connection, _SIZES),
            data_sets=[name for (name,) in connection.sql(_DATA_SETS).fetchall()],
            preferred=human_win_rates(folder),
            files=[_files(connection, folder, table) for table in SCHEMAS],
        )


def _rows(connection: duckdb.DuckDBPyConnection, sql: str) -> list[Row]:
    return connection.sql(sql).to_arrow_table().to_pylist()


_TRAINING = """
SELECT u.round, count(*) AS num_updates, avg(u.loss) AS loss, avg(u.margin_before) AS margin_before,
       avg(u.pair_accuracy_before) AS pair_accuracy_before, any_value(r.margin_after) AS margin_after,
       any_value(r.pair_accuracy_after) AS pair_accuracy_after, any_value(r.kl_after) AS kl_after,
       avg(u.clip_fraction) AS clip_fraction, avg(u.grad_norm) AS grad_norm, avg(u.drowned) AS drowned
FROM updates u LEFT JOIN rounds r ON r.round = u.round WHERE u.num_pairs > 0 GROUP BY u.round ORDER BY u.round
"""

_SIZES = """
SELECT held_out, height, width FROM (
    SELECT false AS held_out, height, width FROM samples UNION ALL SELECT true, height, width FROM evaluations
) WHERE height IS NOT NULL GROUP BY ALL ORDER BY held_out, height, width
"""

_DATA_SETS = "SELECT DISTINCT rater FROM judgements WHERE starts_with(source, 'data set ') ORDER BY rater"

_RATERS = f"""
{questions("rater_kind != 'proxy'")}, rows AS (
    SELECT rater, rater_kind, median(seconds) AS median_seconds, max(judged_at) AS last FROM said GROUP BY ALL
)
SELECT rater, rater_kind, count(DISTINCT round) AS rounds, count(*) FILTER (judged) AS judgements,
       count(*) FILTER (skipped) AS skipped, any_value(median_seconds) AS median_seconds, any_value(last) AS last
FROM questions JOIN rows USING (rater, rater_kind) GROUP BY rater, rater_kind ORDER BY judgements DESC, rater
"""

# A pair's margin is by how many standard deviations the winner scored higher, each proxy's taken over the campaign.
_PAIRS = """
WITH marks AS (
    SELECT round, sample_id, avg(mark) AS mark FROM (
        SELECT round, sample_id, value / nullif(stddev_pop(value) OVER (PARTITION BY rater), 0) AS mark
        FROM judgements WHERE rater_kind = 'proxy' AND kind = 'score'
    ) GROUP BY ALL
)
SELECT p.round, w.prompt, p.winner_id, p.loser_id, w.image_path AS winner_path, l.image_path AS loser_path,
       p.weight, p.num_raters, p.agreement, coalesce(round(mw.mark - ml.mark, 9), 0) AS margin
FROM preferences p
JOIN samples w ON w.round = p.round AND w.sample_id = p.winner_id
JOIN samples l ON l.round = p.round AND l.sample_id = p.loser_id
LEFT JOIN marks mw ON mw.round = p.round AND mw.sample_id = p.winner_id
LEFT JOIN marks ml ON ml.round = p.round AND ml.sample_id = p.loser_id
"""

_CLEAREST = "agreement DESC, weight DESC, num_raters DESC, margin DESC, round DESC, pair_id"
_MOST_DOUBTFUL = "agreement, weight, margin, num_raters, round DESC, pair_id"


def _pairs(connection: duckdb.DuckDBPyConnection, count: int) -> tuple[list[Row], list[Row]]:
    """Return the clearest and most doubtful pairs, one per prompt; no doubtful ones if all are equally clear."""
    pair_id = "p.round || ' ' || p.winner_id || '>' || p.loser_id AS pair_id"
    connection.execute(f"CREATE TEMP TABLE pairs AS SELECT {pair_id}, * FROM ({_PAIRS}) p")
    kinds = connection.sql("SELECT DISTINCT agreement, weight, num_raters, margin FROM pairs LIMIT 2").fetchall()
    one_a_prompt = """
        SELECT * FROM (SELECT * FROM pairs QUALIFY row_number() OVER (PARTITION BY prompt ORDER BY {order}) = 1)
        ORDER BY {order} LIMIT {count}
    """
    clear = _rows(connection, one_a_prompt.format(order=_CLEAREST, count=count))
    doubtful = _rows(connection, one_a_prompt.format(order=_MOST_DOUBTFUL, count=count)) if len(kinds) > 1 else []
    shown = {row["pair_id"] for row in clear}
    doubtful = [row for row in doubtful if row["pair_id"] not in shown]
    return [_scored(connection, row) for row in clear], [_scored(connection, row) for row in doubtful]


def _scored(connection: duckdb.DuckDBPyConnection, pair: Row) -> Row:
    """Return the pair with each proxy's scores for its winner and loser."""
    scores = connection.execute(
        """SELECT w.rater, w.value, l.value FROM judgements w JOIN judgements l USING (round, rater, kind)
        WHERE round = $round AND kind = 'score' AND w.rater_kind = 'proxy'
          AND w.sample_id = $winner AND l.sample_id = $loser ORDER BY w.rater""",
        {"round": pair["round"], "winner": pair["winner_id"], "loser": pair["loser_id"]},
    ).fetchall()
    return pair | {"scores": scores}


def _crossings(connection: duckdb.DuckDBPyConnection, count: int) -> tuple[list[Row], list[Row]]:
    """Return pairs on which most people contradict a proxy, and how often that happens per round and proxy."""
    with_people = "SELECT DISTINCT round FROM judgements WHERE rater_kind = 'human' ORDER BY round"
    connection.execute(
        "CREATE TEMP TABLE said (round BIGINT, prompt TEXT, first_path TEXT, second_path TEXT, people INT, "
        "num_people INT, lead INT, rater TEXT, proxy INT)"
    )
    for (number,) in connection.sql(with_people).fetchall():
        collect_votes(connection, number)
        connection.execute(
            """INSERT INTO said SELECT $round, a.prompt, a.image_path, b.image_path, sign(lead), num_people, abs(lead),
                      v.rater, v.vote
            FROM votes v
            JOIN (SELECT first_id, second_id, CAST(sum(vote) AS INT) AS lead, count(*) AS num_people FROM votes
                  WHERE rater_kind = 'human' GROUP BY ALL) USING (first_id, second_id)
            JOIN samples a ON a.round = $round AND a.sample_id = first_id
            JOIN samples b ON b.round = $round AND b.sample_id = second_id
            WHERE v.rater_kind = 'proxy'""",
            {"round": number},
        )
        connection.execute("DROP TABLE votes")
    counts = _rows(
        connection,
        """SELECT round, rater, count(*) AS pairs, count(*) FILTER (people = proxy AND proxy != 0) AS agree,
                  count(*) FILTER (people = -proxy AND proxy != 0) AS disagree,
                  count(*) FILTER (people != 0 AND proxy = 0) AS only_people,
                  count(*) FILTER (people = 0) AS people_undecided
        FROM said GROUP BY round, rater ORDER BY round, rater""",
    )
    worst = _rows(
        connection,
        f"""SELECT round, prompt, num_people, lead, rater, if(people > 0, first_path, second_path) AS people_path,
                   if(people > 0, second_path, first_path) AS proxy_path
        FROM said WHERE people = -proxy AND proxy != 0
        QUALIFY row_number() OVER (PARTITION BY prompt ORDER BY lead DESC, round DESC, first_path, second_path) = 1
        ORDER BY lead DESC, round DESC, prompt LIMIT {count}""",
    )
    return worst, counts


def _reigns(rounds: list[Row], held_out: HeldOut) -> list[int]:
    """Return the champion's position after each round, from the guard's records or else from the scores."""
    position = {row["round"]: index for index, row in enumerate(rounds)}
    if all(row["champion"] in position for row in rounds):
        return [position[row["champion"]] for row in rounds]
    return champions(next(iter(held_out.scores.values())), held_out.prompts)


def _config_changes(folder: Path, first: Row, rounds: list[int]) -> list[Row]:
    changes, before = [], leaves(first)
    for number in rounds:
        path = stage_path(folder, number, "config")
        after = leaves(json.loads(path.read_text())) if path.is_file() else before
        # Skip a field that only one of the two files has: it was added to the program later.
        changed = [name for name in before if name in after and before[name] != after[name]]
        changes += [
            {"round": number, "field": n, "before": _masked(before[n]), "after": _masked(after[n])} for n in changed
        ]
        before = after
    return changes


def _masked(value: Any) -> Any:
    return masked(value) if isinstance(value, str) else value


def _files(connection: duckdb.DuckDBPyConnection, folder: Path, table: str) -> Row:
    rows, rounds = connection.sql(f"SELECT count(*), count(DISTINCT round) FROM {table}").fetchall()[0]
    return {"table": table, "rows": rows, "rounds": rounds, "path": str(folder / table / "round=*" / "*.parquet")}
