"""Summarize imported judgements: how many pairs they order, and how many groups have no pair."""

import duckdb
import pyarrow as pa

from d3po_core.image_ids import MEMBER
from d3po_core.judgement_files.formats import JudgementFile

_GROUPS = f"""
WITH said AS (
    SELECT regexp_replace(sample_id, '{MEMBER}$', '') AS group_id, rater, sample_id, other_id,
           if($rank, -value, value) AS value
    FROM good WHERE value IS NOT NULL),
pairs AS (
    SELECT group_id, least(sample_id, other_id) AS low, greatest(sample_id, other_id) AS high
    FROM said WHERE $choice AND value != 0
    UNION
    SELECT a.group_id, a.sample_id, b.sample_id FROM said a JOIN said b
        ON NOT $choice AND a.rater = b.rater AND a.group_id = b.group_id
           AND a.sample_id < b.sample_id AND a.value != b.value),
counted AS (SELECT group_id, count(*) AS num_pairs FROM pairs GROUP BY group_id)
SELECT coalesce(sum(num_pairs), 0)::BIGINT AS pairs, count(num_pairs) AS decided,
       count(*) FILTER (num_pairs IS NULL AND images = 1) AS alone,
       count(*) FILTER (num_pairs IS NULL AND images > 1) AS equal
FROM (SELECT group_id, count(DISTINCT sample_id) + count(DISTINCT other_id) AS images FROM said GROUP BY group_id)
LEFT JOIN counted USING (group_id)
"""


def outcome(good: pa.Table, file: JudgementFile) -> list[str]:
    """Return summary lines for a file's good rows: ordered pairs, their groups, and why other groups have none.

    Args:
        good: rows of ``judgements``, of one kind.
        file: the file that they come from.
    """
    if not len(good):
        return []
    with duckdb.connect(":memory:") as connection:
        connection.register("good", good)
        found = connection.sql(
            _GROUPS, params={"choice": file.kind == "choice", "rank": file.kind == "rank"}
        ).fetchall()
    pairs, decided, alone, equal = found[0]
    reasons = [f"{alone:,} with one judged image"] if alone else []
    reasons += [f"{equal:,} whose images are judged equal"] if equal else []
    without = f"; no pair in {alone + equal:,} groups: {', '.join(reasons)}" if reasons else ""
    lines = [f"puts {pairs:,} pairs of images in order, in {decided:,} groups{without}"]
    if file.kind == "rating" and not pairs and reasons:
        lines.append("images that are all marked the same teach nothing: mark good ones and bad ones of each group")
    return lines
