"""The views that join a campaign's tables; ``docs/questions.md`` lists their columns."""

import re
from pathlib import Path

import duckdb
import pyarrow as pa

from d3po_core.errors import D3POError
from d3po_core.preferences.counting import questions
from d3po_core.preferences.deriving import VOTES
from d3po_core.store.tables import SCHEMAS, connect

# Raters of kind 'gold' are answer keys, not people: `votes` and `raters` hold them, but no count in `pairs` does.
_PAIRS = """
WITH scores AS (
    SELECT round, sample_id, map_from_entries(list((rater, value) ORDER BY rater)) AS scores
    FROM (
        SELECT round, sample_id, rater, value FROM judgements
        WHERE rater_kind = 'proxy' AND kind = 'score' AND value IS NOT NULL
        QUALIFY row_number() OVER (
            PARTITION BY round, sample_id, rater ORDER BY judged_at DESC, source DESC, value DESC
        ) = 1
    ) GROUP BY ALL
), counted AS (
    SELECT round, first_id, second_id,
           count(*) FILTER (rater_kind = 'proxy' AND vote > 0) AS proxies_first,
           count(*) FILTER (rater_kind = 'proxy' AND vote < 0) AS proxies_second,
           count(*) FILTER (rater_kind = 'proxy' AND vote = 0) AS proxies_tied,
           count(*) FILTER (rater_kind = 'human' AND vote > 0) AS people_first,
           count(*) FILTER (rater_kind = 'human' AND vote < 0) AS people_second,
           count(*) FILTER (rater_kind = 'human' AND vote = 0) AS people_tied
    FROM votes GROUP BY ALL
)
SELECT p.round, p.pair_id, p.group_id, w.prompt, w.checkpoint, p.winner_id, p.loser_id,
       w.image_path AS winner_image, l.image_path AS loser_image,
       ws.scores AS winner_scores, ls.scores AS loser_scores, p.weight, p.num_raters, p.agreement,
       coalesce(if(w.member < l.member, proxies_first, proxies_second), 0) AS proxies_for,
       coalesce(if(w.member < l.member, proxies_second, proxies_first), 0) AS proxies_against,
       coalesce(proxies_tied, 0) AS proxies_tied,
       coalesce(if(w.member < l.member, people_first, people_second), 0) AS people_for,
       coalesce(if(w.member < l.member, people_second, people_first), 0) AS people_against,
       coalesce(people_tied, 0) AS people_tied, w.height, w.width
FROM preferences p
JOIN samples w ON w.round = p.round AND w.sample_id = p.winner_id
JOIN samples l ON l.round = p.round AND l.sample_id = p.loser_id
LEFT JOIN scores ws ON ws.round = p.round AND ws.sample_id = p.winner_id
LEFT JOIN scores ls ON ls.round = p.round AND ls.sample_id = p.loser_id
LEFT JOIN counted c ON c.round = p.round AND c.first_id = if(w.member < l.member, p.winner_id, p.loser_id)
                   AND c.second_id = if(w.member < l.member, p.loser_id, p.winner_id)
"""

_RATERS = f"""
{questions("true")}, counted AS (
    SELECT round, rater, rater_kind, count(*) FILTER (judged) AS num_judgements,
           count(*) FILTER (skipped) AS num_skipped, sum(taken_back)::BIGINT AS num_taken_back
    FROM questions GROUP BY ALL
), grouped AS (
    SELECT round, rater, rater_kind, count(DISTINCT group_key) FILTER (is_last AND value IS NOT NULL) AS num_groups,
           min(judged_at) AS first_at, max(judged_at) AS last_at
    FROM said GROUP BY ALL
), timed AS (
    -- The rows of one answer carry the same seconds, which were spent once.
    SELECT round, rater, rater_kind, sum(seconds) AS seconds, median(seconds) AS median_seconds FROM (
        SELECT DISTINCT round, rater, rater_kind, kind, question, judged_at, source, seconds FROM said
    ) GROUP BY ALL
), voted AS (
    SELECT v.round, v.rater, v.rater_kind, count(*) AS num_votes, count(*) FILTER (v.vote = 0) AS num_ties,
           count(*) FILTER (v.vote = 0 AND v.both_bad) AS num_both_bad,
           count(*) FILTER ((p.winner_id = v.first_id AND v.vote > 0) OR (p.winner_id = v.second_id AND v.vote < 0))
               AS votes_kept,
           count(*) FILTER ((p.winner_id = v.first_id AND v.vote < 0) OR (p.winner_id = v.second_id AND v.vote > 0))
               AS votes_lost
    FROM votes v LEFT JOIN preferences p ON p.round = v.round
        AND least(p.winner_id, p.loser_id) = least(v.first_id, v.second_id)
        AND greatest(p.winner_id, p.loser_id) = greatest(v.first_id, v.second_id)
    GROUP BY ALL
)
SELECT round, rater, rater_kind, num_judgements, num_skipped, num_taken_back, num_groups,
       coalesce(num_votes, 0) AS num_votes, coalesce(num_ties, 0) AS num_ties,
       coalesce(num_both_bad, 0) AS num_both_bad, coalesce(votes_kept, 0) AS votes_kept,
       coalesce(votes_lost, 0) AS votes_lost, seconds, median_seconds, first_at, last_at
FROM counted JOIN grouped USING (round, rater, rater_kind) JOIN timed USING (round, rater, rater_kind)
LEFT JOIN voted USING (round, rater, rater_kind)
"""

_CHECKPOINTS = """
SELECT r.round, r.checkpoint_out AS checkpoint, r.lora_sha256 AS sha256, r.eval_scorer AS scorer,
       r.eval_score_mean AS score, r.eval_score_low AS score_low, r.eval_score_high AS score_high, e.scores,
       r.num_pairs, r.mlflow_run_id, r.config_sha256, r.git_commit, r.finished_at
FROM rounds r LEFT JOIN (
    SELECT round, map_from_entries(list((scorer, score) ORDER BY scorer)) AS scores
    FROM (SELECT round, scorer, avg(score) AS score FROM evaluations GROUP BY ALL) GROUP BY round
) e USING (round)
ORDER BY r.round
"""

# Each rater's last answer on a pair of held-out images; no row if that was skipped or taken back.
_HUMAN_COMPARISONS = """
WITH last_word AS (
    SELECT * FROM comparisons
    QUALIFY row_number() OVER (PARTITION BY round, against, rater, sample_id, against_id ORDER BY judged_at DESC) = 1
), images AS (
    SELECT DISTINCT round, sample_id, prompt, seed, image_path FROM evaluations
)
SELECT c.round, c.against, c.rater, mine.prompt, mine.seed, c.sample_id, c.against_id, mine.image_path AS image,
       other.image_path AS against_image, CAST(sign(c.value) AS INT) AS vote,
       coalesce(c.both_bad, false) AS both_bad, c.position, c.seconds, c.judged_at
FROM last_word c
JOIN images mine ON mine.round = c.round AND mine.sample_id = c.sample_id
JOIN images other ON other.round = c.against AND other.sample_id = c.against_id
WHERE c.value IS NOT NULL
"""

_REPORTED_IMAGES = """
WITH images AS (
    SELECT round, sample_id, prompt, image_path FROM samples
    UNION SELECT round, sample_id, prompt, image_path FROM evaluations
)
SELECT round, sample_id, prompt, image_path, rater, reason, reported_at
FROM image_reports LEFT JOIN images USING (round, sample_id)
QUALIFY row_number() OVER (PARTITION BY round, sample_id, rater ORDER BY reported_at DESC) = 1 AND reason != 'withdrawn'
"""

# What the labelling page holds and no table yet: a row per answer or skip.
ON_PAGE = pa.schema(
    {
        "round": pa.int64(), "rater": pa.string(), "mode": pa.string(), "group_id": pa.string(),
        "sample_ids": pa.list_(pa.string()), "answer": pa.list_(pa.float64()), "skipped": pa.bool_(),
        "taken_back": pa.bool_(), "seconds": pa.float64(), "judged_at": pa.timestamp("us"),
    }
)  # fmt: skip

VIEWS = {
    "votes": VOTES.format(rounds="true"),
    "pairs": _PAIRS,
    "raters": _RATERS,
    "checkpoints": _CHECKPOINTS,
    "human_comparisons": _HUMAN_COMPARISONS,
    "page_judgements": "FROM _on_page",
    "reported_images": _REPORTED_IMAGES,
}


def tables_behind(sql: str) -> list[str]:
    """Return the tables that a query may read, also through views, in the order of ``SCHEMAS``.

    A table cannot be read unless its name is written somewhere. A column of that name gives a table too many.
    """
    found: set[str] = set()
    texts = [sql]
    while texts:
        new = set(re.findall(r"\w+", texts.pop().casefold())) & (SCHEMAS.keys() | VIEWS.keys()) - found
        found |= new
        texts += [VIEWS[name] for name in new & VIEWS.keys()]
    return [table for table in SCHEMAS if table in found]


def connect_views(campaign: Path, on_page: pa.Table | None = None, sql: str | None = None) -> duckdb.DuckDBPyConnection:
    """Return an in-memory DuckDB over a campaign's tables, with the views of ``VIEWS``.

    Each row of ``votes`` is a rater's final vote on two images of a group. Each row of ``pairs`` is a preference with
    both images, their scores, and the votes. Each row of ``raters`` is a rater in a round, and each row of
    ``checkpoints`` a finished round. Each row of ``human_comparisons`` is a rater's final, blind vote on a round's
    held-out image and a reference's. Each row of ``reported_images`` is a rater's standing report of an image.
    Each row of ``page_judgements`` is an answer that only the labelling page holds.

    Args:
        campaign: the campaign's folder.
        on_page: the rows of ``page_judgements``, by the schema ``ON_PAGE``; none by default.
        sql: a query; offer only the tables and views that it may read, or all when not given.

    Raises:
        D3POError: the campaign's folder is gone.
    """
    if not campaign.is_dir():
        raise D3POError(f"campaign {campaign.name!r}: its folder {campaign} is gone; restore it, or open another")
    tables = list(SCHEMAS) if sql is None else tables_behind(sql)
    connection = connect(campaign, tables)
    connection.register("_on_page", ON_PAGE.empty_table() if on_page is None else on_page)
    for name, definition in VIEWS.items():
        if set(tables_behind(definition)) <= set(tables):
            connection.execute(f"CREATE VIEW {name} AS {definition}")
    return connection
