"""Preferences from judgements, in SQL.

Every rater's last word on each image (or pair) becomes a vote on every pair of a group; votes are combined, and the
pairs to train on are chosen. Judgements stay as they are: derive again under another rule at any time.

    pareto    the first wins if no rater is against it and at least one is for it (Pareto dominance)
    majority  the first wins if more raters are for it than against it
    ties      pairs that nobody wins; they never reach training
"""

from dataclasses import dataclass

import duckdb
import pyarrow as pa

_VOTES = """
WITH last_word AS (
    -- A rater may judge the same thing again: the later judgement counts, both stay on record.
    SELECT * FROM judgements WHERE round = $round
    QUALIFY row_number() OVER (
        PARTITION BY rater, kind, least(sample_id, coalesce(other_id, sample_id)),
                     greatest(sample_id, coalesce(other_id, sample_id))
        ORDER BY judged_at DESC, source DESC
    ) = 1
), marks AS (
    SELECT j.rater, j.kind, s.group_id, s.member, s.sample_id,
           CASE j.kind WHEN 'rank' THEN -j.value ELSE j.value END AS mark
    FROM last_word j JOIN samples s ON s.sample_id = j.sample_id AND s.round = $round
    WHERE j.kind IN ('score', 'rating', 'rank')
), votes AS (
    SELECT a.group_id, a.sample_id AS first_id, b.sample_id AS second_id, a.member AS first_member,
           b.member AS second_member, sign(a.mark - b.mark) AS vote
    FROM marks a JOIN marks b USING (group_id, rater, kind)
    WHERE a.member < b.member
    UNION ALL
    -- A choice's value is 1 for sample_id, -1 for other_id, 0 for a tie.
    SELECT a.group_id, least_member.sample_id, most_member.sample_id, least_member.member, most_member.member,
           CASE WHEN a.member < b.member THEN sign(j.value) ELSE -sign(j.value) END
    FROM last_word j
    JOIN samples a ON a.sample_id = j.sample_id AND a.round = $round
    JOIN samples b ON b.sample_id = j.other_id AND b.round = $round AND b.group_id = a.group_id
    JOIN samples least_member ON least_member.round = $round AND least_member.group_id = a.group_id
         AND least_member.member = least(a.member, b.member)
    JOIN samples most_member ON most_member.round = $round AND most_member.group_id = a.group_id
         AND most_member.member = greatest(a.member, b.member)
    WHERE j.kind = 'choice'
), tally AS (
    SELECT group_id, first_id, second_id, first_member, second_member, count(*) AS num_raters,
           count(*) FILTER (vote > 0) AS votes_for, count(*) FILTER (vote < 0) AS votes_against
    FROM votes GROUP BY ALL
), decided AS (
    SELECT *, CASE WHEN {first_wins} THEN 1 WHEN {second_wins} THEN -1 ELSE 0 END AS outcome FROM tally
)
"""

_RULES = {
    "pareto": ("votes_for > 0 AND votes_against = 0", "votes_against > 0 AND votes_for = 0"),
    "majority": ("votes_for > votes_against", "votes_against > votes_for"),
}

_PAIRS = {
    "all": "SELECT * FROM decided WHERE outcome != 0",
    # Standing: wins minus losses within the group; the lower member is taken among equals, so that it is repeatable.
    "best_worst": """
        SELECT d.* FROM decided d JOIN (
            SELECT group_id, arg_max(member, (standing, -member)) AS best, arg_min(member, (standing, member)) AS worst
            FROM (
                SELECT group_id, member, sum(point) AS standing FROM (
                    SELECT group_id, first_member AS member, outcome AS point FROM decided
                    UNION ALL SELECT group_id, second_member, -outcome FROM decided
                ) GROUP BY ALL
            ) GROUP BY group_id
        ) ends ON d.group_id = ends.group_id
              AND least(best, worst) = d.first_member AND greatest(best, worst) = d.second_member
        WHERE outcome != 0
    """,
}


@dataclass(frozen=True)
class Preferences:
    """Derived pairs, as a table of the ``preferences`` schema, and the number of judged pairs that nobody won."""

    table: pa.Table
    num_ties: int


def derive_preferences(
    connection: duckdb.DuckDBPyConnection, round_number: int, combine: str, pairs: str
) -> Preferences:
    """Derive a round's preferences from its judgements.

    Args:
        connection: a database with ``samples`` and ``judgements``.
        round_number: the round.
        combine: ``pareto`` or ``majority``.
        pairs: ``all`` pairs of a group that somebody won, or each group's ``best_worst``.

    Source: the paper's order of judged images, arXiv 2311.13231, Section 5.
    """
    first_wins, second_wins = _RULES[combine]
    decided = _VOTES.format(first_wins=first_wins, second_wins=second_wins)
    parameters = {"round": round_number}
    connection.execute(f"CREATE OR REPLACE TEMP TABLE decided AS {decided} SELECT * FROM decided", parameters)
    table = connection.sql(
        f"""
        SELECT group_id || '-' || winner_member || '>' || loser_member AS pair_id, group_id, winner_id, loser_id,
               1.0::DOUBLE AS weight, num_raters, agreeing / num_raters AS agreement
        FROM (
            SELECT group_id, num_raters, first_member, second_member,
                   CASE WHEN outcome > 0 THEN first_id ELSE second_id END AS winner_id,
                   CASE WHEN outcome > 0 THEN second_id ELSE first_id END AS loser_id,
                   CASE WHEN outcome > 0 THEN first_member ELSE second_member END AS winner_member,
                   CASE WHEN outcome > 0 THEN second_member ELSE first_member END AS loser_member,
                   CASE WHEN outcome > 0 THEN votes_for ELSE votes_against END AS agreeing
            FROM ({_PAIRS[pairs]})
        )
        ORDER BY group_id, first_member, second_member
        """
    ).to_arrow_table()
    ties = connection.execute("SELECT count(*) FROM decided WHERE outcome = 0").fetchone()
    connection.execute("DROP TABLE decided")
    assert ties is not None
    return Preferences(table, ties[0])
