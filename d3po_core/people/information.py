"""Expected information of a person's judgement of a group, which decides the groups to ask first.

A group teaches only through pairs that have a winner. A group whose images are all good or all bad teaches nothing, and
people tend to judge similar images alike. A group that was judged already tells more if its raters disagree. Names end
in their axis: G groups, M members.
"""

from collections.abc import Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from d3po_core.config import CampaignConfig
from d3po_core.image_ids import group_of
from d3po_core.people.journal import judgement_rows, read_entries, sampling_of
from d3po_core.preferences.deriving import collect_votes
from d3po_core.store.tables import connect, table_from_rows

FADE = 0.7  # weight of a prompt's pairs one round later, since the policy has changed


def expected_information(
    dissimilarity_G: np.ndarray,
    decided_G: np.ndarray,
    pairs_G: np.ndarray,
    raters_G: np.ndarray,
    disagreement_G: np.ndarray,
) -> np.ndarray:
    """Expected information of one more judgement per group, ``[G]``, positive; only its order means something.

    It is the chance that a pair of the prompt gets a winner, times how different the images look. For groups that
    raters have judged, it is also multiplied by what another rater may still change.

    Args:
        dissimilarity_G: from ``dissimilarity``.
        decided_G: pairs of the group's prompt with a winner in earlier rounds, fading with time.
        pairs_G: all pairs of the prompt in earlier rounds, fading likewise.
        raters_G: people who have judged the group.
        disagreement_G: how contrary their votes are, from 0 (all alike) to 1 (half against half).
    """
    chance_G = (1 + decided_G) / (2 + pairs_G)
    open_G = np.where(raters_G > 0, (0.1 + disagreement_G) / (1 + raters_G), 1.0)
    return chance_G * np.maximum(dissimilarity_G, 1e-6) * open_G


def group_information(campaign: Path, round_number: int) -> dict[str, float]:
    """Expected information of each group of a round, from the tables and the journal; opens no image."""
    with connect(campaign) as connection:
        _add_journal(connection, campaign, round_number)
        collect_votes(connection, round_number)
        rows = connection.execute(_FACTS, {"round": round_number, "fade": FADE}).fetchnumpy()
    columns = ("dissimilarity", "decided", "pairs", "raters", "disagreement")
    information_G = expected_information(*(rows[name].astype(np.float64) for name in columns))
    return dict(zip(rows["group_id"].tolist(), information_G.tolist(), strict=True))


def _add_journal(connection: duckdb.DuckDBPyConnection, campaign: Path, round_number: int) -> None:
    """Add the page's judgements since the journal's last export to the view ``judgements``."""
    sampling = sampling_of(campaign, round_number)
    rows = [row for entry in (read_entries(campaign, sampling) if sampling else []) for row in judgement_rows(entry)]
    if rows:
        table = table_from_rows("judgements", rows)
        connection.register("_journal", table.append_column("round", pa.array([round_number] * len(table), pa.int64())))
        # A row may be there twice if it was exported, which changes no rater's last word.
        said = "SELECT * FROM judgements UNION ALL BY NAME SELECT * FROM _journal"
        connection.execute(f"CREATE TEMP TABLE said_so_far AS {said}")
        connection.execute("CREATE OR REPLACE TEMP VIEW judgements AS SELECT * FROM said_so_far")


def question_priority(config: CampaignConfig, round_number: int, questions: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Expected information of each question, ``[Q]``, taken from its group.

    Args:
        config: the campaign's configuration.
        round_number: the round.
        questions: sample_ids of each question's images.
    """
    information = group_information(config.folder, round_number)
    return np.array([information.get(group_of(images[0]), 0.0) for images in questions])


_FACTS = """
WITH sizes AS (
    SELECT round, group_id, any_value(prompt) AS prompt, count(*) * (count(*) - 1) / 2 AS pairs
    FROM samples WHERE round <= $round GROUP BY ALL
), won AS (
    SELECT round, group_id, count(*) AS decided FROM preferences WHERE round < $round GROUP BY ALL
), history AS (
    SELECT prompt, sum(pow($fade, $round - 1 - round) * pairs) AS pairs,
           sum(pow($fade, $round - 1 - round) * coalesce(decided, 0)) AS decided
    FROM sizes LEFT JOIN won USING (round, group_id) WHERE round < $round GROUP BY prompt
), contrary AS (
    SELECT group_id, count(*) FILTER (vote > 0) AS votes_for, count(*) FILTER (vote < 0) AS votes_against
    FROM votes WHERE rater_kind = 'human' GROUP BY group_id, first_id, second_id
), here AS (
    SELECT group_id, avg(2 * least(votes_for, votes_against) / greatest(votes_for + votes_against, 1)) AS disagreement
    FROM contrary GROUP BY group_id
), judged AS (
    SELECT group_id, count(DISTINCT rater) AS raters FROM votes WHERE rater_kind = 'human' GROUP BY group_id
)
SELECT s.group_id, coalesce(g.dissimilarity, 0) AS dissimilarity, coalesce(history.pairs, 0) AS pairs,
       coalesce(history.decided, 0) AS decided, coalesce(raters, 0) AS raters, coalesce(disagreement, 0) AS disagreement
FROM (SELECT * FROM sizes WHERE round = $round) s
LEFT JOIN (SELECT group_id, dissimilarity FROM groups WHERE round = $round) g USING (group_id)
LEFT JOIN history USING (prompt) LEFT JOIN judged USING (group_id) LEFT JOIN here USING (group_id)
ORDER BY s.group_id
"""
