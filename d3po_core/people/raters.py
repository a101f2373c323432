"""Statistics of a campaign's raters: amount, speed, bias, accuracy and agreement.

Agreement is computed over votes on pairs, for every mode of judging: 1, 0 or -1 for the first image, neither, the
second. The order of the two images means nothing, so each pair also counts mirrored. Alpha then needs no convention,
and is defined even if all votes are for the first. Its distance is the interval one: a tie lies half-way between the
sides.

Source: Krippendorff, Content Analysis (2004), through the package ``krippendorff``.
"""

import itertools
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import duckdb
import krippendorff
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest

from d3po_core.intervals import CONFIDENCE
from d3po_core.people.journal import unexported_judgements
from d3po_core.preferences.counting import questions
from d3po_core.preferences.deciding import reliability
from d3po_core.preferences.deriving import collect_votes
from d3po_core.preferences.gold import PAIR, GoldScore, gold_scores, left_out, votes_frame
from d3po_core.store.tables import SCHEMAS, connect

_COUNTS = f"""
{questions("rater_kind = 'human' AND round BETWEEN $first AND $last")}, rows AS (
    SELECT rater, count(DISTINCT group_key) FILTER (is_last AND value IS NOT NULL) AS groups,
           median(seconds) FILTER (is_last AND value IS NOT NULL) AS seconds,
           count(*) FILTER (is_last AND both_bad) AS both_bad,
           count(*) FILTER (placed) AS placed, count(*) FILTER (placed AND (value > 0) = (position = 0)) AS chose_first
    FROM (
        SELECT *, kind = 'choice' AND value IS NOT NULL AND value != 0 AND position IS NOT NULL AS placed FROM said
    )
    GROUP BY rater
)
SELECT rater, count(*) FILTER (judged), count(*) FILTER (skipped), sum(taken_back)::BIGINT, any_value(groups),
       any_value(seconds), any_value(placed), any_value(chose_first), any_value(both_bad)
FROM questions JOIN rows USING (rater) GROUP BY rater ORDER BY rater
"""
LAST_ROUND = 2**31


@dataclass(frozen=True)
class RaterSummary:
    """One person. Shares are in [0, 1], with 95 % intervals; None means not known yet.

    Attributes:
        rater: the name.
        judgements: questions that the rater has answered, as the labelling page counts them: a marked or ranked group
            is one, whatever its number of images, and so is a pair of a choice. A withdrawn answer does not count, and
            a replaced one counts once.
        skips: questions that the rater only ever skipped.
        taken_back: times that the rater took an answer back.
        groups: groups with at least one standing answer of the rater.
        seconds: median seconds per judgement.
        gold_answered, gold_right: gold questions (see d3po_core.preferences.gold); a half-right answer counts in part.
        gold_low, gold_high: interval of the share of right gold answers.
        left_out: whether that whole interval is below the accuracy floor; such a rater has no vote.
        reliability: share of votes that match the truth as Dawid-Skene estimates it; 1/2 is guessing.
        agreement: share of other people's votes on the same pairs that are equal.
        placed: choices of one of two images whose places are known.
        first_share, first_low, first_high: share of them that chose the image in the first place.
        first_p: probability that a rater without a bias for a place is this far from one half (binomial test).
        both_bad: pairs of which the rater called both images bad. As votes they are ties.
    """

    rater: str
    judgements: int
    skips: int
    taken_back: int
    groups: int
    seconds: float | None
    gold_answered: int
    gold_right: float
    gold_low: float | None
    gold_high: float | None
    left_out: bool
    reliability: float | None
    agreement: float | None
    placed: int
    first_share: float | None
    first_low: float | None
    first_high: float | None
    first_p: float | None
    both_bad: int = 0


@dataclass(frozen=True)
class RaterReport:
    """All people of a campaign or a round, also those left out; None if there is nobody to compare.

    Attributes:
        raters: a summary per person, by name.
        alpha: Krippendorff's alpha of their votes; 1 is perfect, 0 is chance.
        agreement: share of equal votes over all two people who voted on the same pair.
        pairs: pairs that a person voted on.
        pairs_of_several: pairs that at least two people voted on.
    """

    raters: tuple[RaterSummary, ...]
    alpha: float | None
    agreement: float | None
    pairs: int
    pairs_of_several: int


def connect_with_journal(campaign: Path) -> duckdb.DuckDBPyConnection:
    """Connect to a campaign's tables plus the page's judgements that no file holds yet; changes nothing.

    Raises:
        D3POError: the journal cannot be read.
    """
    connection = connect(campaign)
    rows = unexported_judgements(campaign)
    if rows:
        schema = SCHEMAS["judgements"].append(pa.field("round", pa.int64()))
        connection.register("_on_page", pa.Table.from_pylist(rows, schema=schema))
        connection.execute("ALTER VIEW judgements RENAME TO _on_file")
        connection.execute("CREATE VIEW judgements AS FROM _on_file UNION ALL BY NAME FROM _on_page")
    return connection


def people_votes(connection: duckdb.DuckDBPyConnection, last_round: int = LAST_ROUND) -> pa.Table:
    """Votes of people and gold of all rounds up to one: ``collect_votes``, with the round before group names.

    Args:
        connection: a campaign's tables, from ``d3po_core.store.tables.connect``.
        last_round: the last round to read.
    """
    named = "round || '/' || sample_id AS sample_id, 0 AS round"
    people = f"""SELECT * REPLACE ({named}, round || '/' || other_id AS other_id) FROM judgements
                 WHERE rater_kind != 'proxy' AND round <= $last"""
    samples = f"""SELECT * REPLACE ({named}, round || '/' || group_id AS group_id) FROM samples
                  WHERE round IN (SELECT round FROM judgements WHERE rater_kind != 'proxy') AND round <= $last"""
    # Treat all rounds as one, in memory: one query per round would open every file of the campaign each time.
    with duckdb.connect(":memory:") as memory:
        memory.register("judgements", connection.sql(people, params={"last": last_round}).to_arrow_table())
        memory.register("samples", connection.sql(samples, params={"last": last_round}).to_arrow_table())
        collect_votes(memory, 0)
        return memory.sql("SELECT * FROM votes ORDER BY ALL").to_arrow_table()


def earlier_gold(connection: duckdb.DuckDBPyConnection, round_number: int) -> dict[str, GoldScore]:
    """People's gold scores of all earlier rounds, for ``deciding.decide``."""
    return gold_scores(people_votes(connection, last_round=round_number - 1))


def rater_report(
    connection: duckdb.DuckDBPyConnection, accuracy_floor: float, round_number: int | None = None
) -> RaterReport:
    """Summarize the people who judged.

    Args:
        connection: a campaign's tables, from ``d3po_core.store.tables.connect``.
        accuracy_floor: ``judge.people.accuracy_floor``.
        round_number: only this round; gold scores always cover all rounds up to it.
    """
    first, last = (0, LAST_ROUND) if round_number is None else (round_number, round_number)
    everything = people_votes(connection, last_round=last)
    gold = gold_scores(everything)
    of_rounds = everything
    if round_number is not None:
        of_rounds = everything.filter(pc.starts_with(everything["group_id"], f"{round_number}/"))
    table_RP = _vote_table(of_rounds)
    equal, compared = _equal_votes(table_RP)
    true_share = reliability(of_rounds)
    out = left_out(gold, accuracy_floor)
    rows = connection.execute(_COUNTS, {"first": first, "last": last}).fetchall()
    raters = [
        RaterSummary(
            name, judgements, skips, taken_back, groups, seconds, *_gold(gold.get(name, GoldScore())), name in out,
            true_share.get(name), _share(equal.get(name, 0), compared.get(name, 0)),
            placed, *_first_place(chose_first, placed), both_bad,
        )
        for name, judgements, skips, taken_back, groups, seconds, placed, chose_first, both_bad in rows
    ]  # fmt: skip
    voters_P = table_RP.notna().sum(axis=0).to_numpy() if table_RP.size else np.zeros(0, dtype=int)
    return RaterReport(
        raters=tuple(raters),
        alpha=krippendorff_alpha(table_RP.to_numpy(dtype=float)),
        agreement=_share(sum(equal.values()), sum(compared.values())),
        pairs=int((voters_P > 0).sum()),
        pairs_of_several=int((voters_P > 1).sum()),
    )


def round_metrics(connection: duckdb.DuckDBPyConnection, round_number: int, accuracy_floor: float) -> dict[str, float]:
    """A round's report as flat numbers for a tracker, without Nones; empty if no person judged.

    Names: ``raters/alpha`` and so on, and ``rater/<name>/judgements`` and so on per person; characters that MLflow does
    not accept become ``_``.
    """
    report = rater_report(connection, accuracy_floor, round_number)
    if not report.raters:
        return {}
    overall = {k: v for k, v in asdict(report).items() if k != "raters"}
    overall["count"], overall["left_out"] = len(report.raters), sum(rater.left_out for rater in report.raters)
    found = {f"raters/{name}": value for name, value in overall.items()}
    taken: set[str] = set()
    for rater in report.raters:
        name = base = re.sub(r"[^\w-]", "_", rater.rater, flags=re.ASCII)
        number = itertools.count(2)
        while name in taken:
            name = f"{base}-{next(number)}"
        taken.add(name)
        summary = {field.name: getattr(rater, field.name) for field in fields(rater) if field.name != "rater"}
        found |= {f"rater/{name}/{key}": value for key, value in summary.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def krippendorff_alpha(votes_RP: np.ndarray) -> float | None:
    """Alpha of R raters' votes (-1, 0, 1; nan is none) on P pairs, each also mirrored; None if undefined.

    It is undefined if no pair has two votes, or if all of those votes are ties.
    """
    mirrored = np.concatenate([votes_RP, -votes_RP], axis=1)
    counts = np.stack([(mirrored == value).sum(0) for value in (-1, 0, 1)], axis=1)
    counts = counts[counts.sum(1) > 1]
    if not len(counts) or not counts[:, [0, 2]].any():
        return None
    return float(krippendorff.alpha(value_counts=counts, value_domain=[-1, 0, 1], level_of_measurement="interval"))


def _vote_table(votes: pa.Table) -> pd.DataFrame:
    """People's votes, one row per rater and one column per pair; nan for no vote."""
    frame = votes_frame(votes)
    people = frame[frame.rater_kind == "human"]
    people = people.assign(pair=people.groupby(PAIR).ngroup())
    return people.pivot(index="rater", columns="pair", values="vote")


def _equal_votes(table_RP: pd.DataFrame) -> tuple[dict[str, int], dict[str, int]]:
    """Per rater: how many of the others' votes on the same pairs are equal, and how many there are."""
    counts_P3 = np.stack([(table_RP == value).to_numpy().sum(0) for value in (-1, 0, 1)], axis=1)
    equal, compared = {}, {}
    for rater, votes_P in zip(table_RP.index, table_RP.to_numpy(dtype=float), strict=True):
        voted_P = ~np.isnan(votes_P)
        same_V = counts_P3[voted_P, votes_P[voted_P].astype(int) + 1] - 1
        equal[str(rater)], compared[str(rater)] = int(same_V.sum()), int((counts_P3[voted_P].sum(1) - 1).sum())
    return equal, compared


def _gold(score: GoldScore) -> tuple[int, float, float | None, float | None]:
    low, high = score.interval if score.answered else (None, None)
    return score.answered, score.right, low, high


def _first_place(chose_first: int, placed: int) -> tuple[float | None, float | None, float | None, float | None]:
    if not placed:
        return None, None, None, None
    test = binomtest(chose_first, placed)
    interval = test.proportion_ci(CONFIDENCE, method="exact")
    return chose_first / placed, float(interval.low), float(interval.high), float(test.pvalue)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
