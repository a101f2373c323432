"""Derive preferences from judgements, in SQL.

Every rater's latest answer on each image or pair becomes a vote on every pair of a group. The votes are combined, and
the training pairs are chosen. Judgements never change, so preferences can be derived again under another rule.

    pareto    the first wins if no rater is against it and at least one is for it (Pareto dominance)
    majority  the first wins if more raters are for it than against it
    weighted  the first wins if the weighted sum of its scores is higher; each scorer's scores are standardised over the
              round (mean 0, standard deviation 1), so that weights do not depend on units; a scorer that gives all
              images the same score adds nothing
    ties      pairs that nobody wins; they never reach training. "Both bad" is a tie here, and is kept apart in `votes`

People alone decide the groups that people judged, by a rule that the caller passes; proxies decide the others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import duckdb
import pyarrow as pa

# Sums of standardised scores that differ by less are equal up to rounding.
SAME_SUM = 1e-9

# Every number that a rater gave an image, in the rounds that meet a condition on `round`.
_MARKS = """
WITH last_word AS (
    -- A rater may judge the same thing again: the later judgement counts, both stay on record.
    SELECT * FROM judgements WHERE {rounds}
    QUALIFY row_number() OVER (
        PARTITION BY round, rater, rater_kind, kind, least(sample_id, coalesce(other_id, sample_id)),
                     greatest(sample_id, coalesce(other_id, sample_id))
        ORDER BY judged_at DESC, source DESC, value DESC
    ) = 1
), marks AS (
    SELECT j.round, j.rater, j.rater_kind, j.kind, s.group_id, s.member, s.sample_id,
           CASE j.kind WHEN 'rank' THEN -j.value ELSE j.value END AS mark
    FROM last_word j JOIN samples s ON s.sample_id = j.sample_id AND s.round = j.round
    WHERE j.kind IN ('score', 'rating', 'rank') AND j.value IS NOT NULL
)
"""

# Every vote of those rounds.
VOTES = f"""
{_MARKS}, said AS (
    SELECT a.round, a.rater, a.rater_kind, a.group_id, a.sample_id AS first_id, b.sample_id AS second_id,
           a.member AS first_member, b.member AS second_member, sign(a.mark - b.mark) AS vote, false AS both_bad
    FROM marks a JOIN marks b USING (round, group_id, rater, rater_kind, kind)
    WHERE a.member < b.member
    UNION ALL
    -- A choice's value is 1 for sample_id, -1 for other_id, 0 for a tie.
    SELECT j.round, j.rater, j.rater_kind, a.group_id, if(a.member < b.member, a.sample_id, b.sample_id),
           if(a.member < b.member, b.sample_id, a.sample_id), least(a.member, b.member), greatest(a.member, b.member),
           if(a.member < b.member, sign(j.value), -sign(j.value)), coalesce(j.both_bad, false)
    FROM last_word j
    JOIN samples a ON a.sample_id = j.sample_id AND a.round = j.round
    JOIN samples b ON b.sample_id = j.other_id AND b.round = j.round AND b.group_id = a.group_id
    WHERE j.kind = 'choice' AND j.value IS NOT NULL
)
-- A rater who judged in two ways has one vote.
SELECT round, group_id, first_id, second_id, first_member, second_member, rater, rater_kind, sign(sum(vote)) AS vote,
       bool_or(both_bad) AS both_bad
FROM said GROUP BY ALL
"""

# Each proxy scorer's weighted lead of the first image of a pair over the second, in standard deviations of its scores.
_LEADS = f"""
{_MARKS}
SELECT a.group_id, a.sample_id AS first_id, b.sample_id AS second_id,
       a.member AS first_member, b.member AS second_member, a.rater,
       -- Differences first: images of equal scores are then apart by exactly nothing, also under a constant scorer.
       if(spread > 0, coalesce(weights.weight, 1) * (a.mark - b.mark) / spread, 0) AS lead
FROM marks a JOIN marks b USING (group_id, rater)
JOIN (
    SELECT rater, stddev_pop(mark) AS spread FROM marks WHERE rater_kind = 'proxy' AND kind = 'score' GROUP BY rater
) spreads USING (rater)
LEFT JOIN weights USING (rater)
WHERE a.member < b.member AND a.rater_kind = 'proxy' AND a.kind = 'score'
  AND b.rater_kind = 'proxy' AND b.kind = 'score'
"""

# Sum in a fixed order, so that the rows' order cannot change the rounding.
_WEIGHED = f"""
SELECT *, 1.0::DOUBLE AS weight,
       CASE outcome WHEN 1 THEN votes_for WHEN -1 THEN votes_against ELSE num_raters - votes_for - votes_against END
           / num_raters AS agreement
FROM (
    SELECT group_id, first_id, second_id, first_member, second_member, count(*) AS num_raters,
           count(*) FILTER (lead > 0) AS votes_for, count(*) FILTER (lead < 0) AS votes_against,
           CASE WHEN sum(lead ORDER BY rater) > {SAME_SUM} THEN 1
                WHEN sum(lead ORDER BY rater) < -{SAME_SUM} THEN -1 ELSE 0 END AS outcome
    FROM {{leads}} GROUP BY ALL
)
"""

_DECIDED = """
SELECT *, CASE WHEN {first_wins} THEN 1 WHEN {second_wins} THEN -1 ELSE 0 END AS outcome, 1.0::DOUBLE AS weight,
       greatest(votes_for, votes_against) / num_raters AS agreement
FROM (
    SELECT group_id, first_id, second_id, first_member, second_member, count(*) AS num_raters,
           count(*) FILTER (vote > 0) AS votes_for, count(*) FILTER (vote < 0) AS votes_against
    FROM {votes} GROUP BY ALL
)
"""

_RULES = {
    "pareto": ("votes_for > 0 AND votes_against = 0", "votes_against > 0 AND votes_for = 0"),
    "majority": ("votes_for > votes_against", "votes_against > votes_for"),
}

_PAIRS = {
    "all": "SELECT * FROM decided WHERE outcome != 0",
    # Standing is wins minus losses within the group; the lower member breaks ties, so that results are repeatable.
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
    """Derived pairs as a table of the ``preferences`` schema, and the number of judged pairs that nobody won."""

    table: pa.Table
    num_ties: int


DecidePeople = Callable[[pa.Table], pa.Table]


def derive_preferences(
    connection: duckdb.DuckDBPyConnection,
    round_number: int,
    combine: str,
    pairs: str,
    decide_people: DecidePeople | None = None,
    proxies_decide: bool = True,
    weights: Mapping[str, float] | None = None,
) -> Preferences:
    """Derive a round's preferences from its judgements.

    Args:
        connection: a database with ``samples`` and ``judgements``.
        round_number: the round.
        combine: ``pareto``, ``majority`` or ``weighted``, for proxies, and for people if ``decide_people`` is not given
            (people have no scores to weigh, so ``weighted`` is ``majority`` for them).
        pairs: ``all`` pairs of a group that somebody won, or each group's ``best_worst``.
        decide_people: makes one decision per pair from people's votes. It gets the table of ``collect_votes`` without
            the proxies' rows and returns group_id, first_id, second_id, first_member, second_member, num_raters,
            outcome (1: the first won, -1: the second, 0: a tie), weight in (0, 1], agreement in (0, 1].
        proxies_decide: if true, proxies decide the groups that no person judged; else those have no pairs.
        weights: with ``weighted``, each proxy scorer's weight by name; 1 by default.

    Source: the paper's order of judged images, arXiv 2311.13231, Section 5.
    """
    collect_votes(connection, round_number)
    people = "(SELECT * FROM votes WHERE rater_kind != 'proxy')"
    alone = f"{proxies_decide} AND group_id NOT IN (SELECT group_id FROM {people})"
    first_wins, second_wins = _RULES["majority" if combine == "weighted" else combine]
    by_people = _DECIDED.format(votes=people, first_wins=first_wins, second_wins=second_wins)
    if decide_people is not None:
        votes = connection.sql(f"SELECT * FROM {people} ORDER BY group_id, first_member, second_member, rater")
        connection.register("_people", decide_people(votes.to_arrow_table()))
        by_people = "SELECT * FROM _people"
    proxies = f"(SELECT * FROM votes WHERE rater_kind = 'proxy' AND {alone})"
    by_proxies = _DECIDED.format(votes=proxies, first_wins=first_wins, second_wins=second_wins)
    if combine == "weighted":
        _collect_leads(connection, round_number, weights or {})
        by_proxies = _WEIGHED.format(leads=f"(SELECT * FROM leads WHERE {alone})")
    columns = (
        "group_id, first_id, second_id, first_member, second_member, num_raters, "
        "CAST(outcome AS INTEGER) AS outcome, CAST(weight AS DOUBLE) AS weight, CAST(agreement AS DOUBLE) AS agreement"
    )
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE decided AS SELECT {columns} FROM ({by_proxies}) "
        f"UNION ALL SELECT {columns} FROM ({by_people})"
    )
    table = connection.sql(
        f"""
        SELECT group_id || '-' || winner_member || '>' || loser_member AS pair_id, group_id, winner_id, loser_id,
               weight, num_raters, agreement
        FROM (
            SELECT group_id, num_raters, first_member, second_member, weight, agreement,
                   CASE WHEN outcome > 0 THEN first_id ELSE second_id END AS winner_id,
                   CASE WHEN outcome > 0 THEN second_id ELSE first_id END AS loser_id,
                   CASE WHEN outcome > 0 THEN first_member ELSE second_member END AS winner_member,
                   CASE WHEN outcome > 0 THEN second_member ELSE first_member END AS loser_member
            FROM ({_PAIRS[pairs]})
        )
        ORDER BY group_id, first_member, second_member
        """
    ).to_arrow_table()
    ties = connection.execute("SELECT count(*) FROM decided WHERE outcome = 0").fetchone()
    connection.execute("DROP TABLE decided; DROP TABLE votes")
    assert ties is not None
    return Preferences(table, ties[0])


def collect_votes(connection: duckdb.DuckDBPyConnection, round_number: int) -> None:
    """Create the temporary table ``votes``: every rater's vote on every pair of a group that the rater judged.

    Columns: group_id, first_id, second_id, first_member, second_member (the first is the lower member), rater,
    rater_kind, vote (1: for the first, -1: for the second, 0: a tie), both_bad (the rater chose that both are bad).
    """
    votes = VOTES.format(rounds="round = $round")
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE votes AS SELECT * EXCLUDE (round) FROM ({votes})", {"round": round_number}
    )


def _collect_leads(connection: duckdb.DuckDBPyConnection, round_number: int, weights: Mapping[str, float]) -> None:
    schema = pa.schema([("rater", pa.string()), ("weight", pa.float64())])
    connection.register("weights", pa.table([list(weights), list(weights.values())], schema=schema))
    leads = _LEADS.format(rounds="round = $round")
    connection.execute(f"CREATE OR REPLACE TEMP TABLE leads AS {leads}", {"round": round_number})
    connection.unregister("weights")
