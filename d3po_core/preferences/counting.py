"""What one judgement is, in SQL, for everything that counts them.

A rater judges a question: a group that is marked or ranked (``rating``, ``rank``), the two images of a ``choice``, an
image of a ``score``. The table ``judgements`` has a row per image of a group, and keeps what was replaced or taken
back: its rows are no judgements.
"""

_QUESTIONS = """
WITH said AS (
    SELECT j.*, j.round || '/' || s.group_id AS group_key,
           CASE kind WHEN 'choice' THEN [least(j.sample_id, other_id), greatest(j.sample_id, other_id)]
                     WHEN 'score' THEN [j.sample_id] ELSE [s.group_id] END AS question,
           row_number() OVER of_thing = 1 AS is_last,
           value IS NULL AND lead(value) OVER of_thing IS NOT NULL AS takes_back
    FROM (FROM judgements WHERE {which}) j
    LEFT JOIN samples s ON s.sample_id = j.sample_id AND s.round = j.round
    WINDOW of_thing AS (
        PARTITION BY j.round, rater, rater_kind, kind, least(j.sample_id, coalesce(other_id, j.sample_id)),
                     greatest(j.sample_id, coalesce(other_id, j.sample_id))
        ORDER BY judged_at DESC, source DESC, value DESC
    )
), questions AS (
    SELECT round, rater, rater_kind,
           count(*) FILTER (is_last AND value IS NOT NULL) >= if(kind IN ('choice', 'score'), 1, 2) AS judged,
           count(value) = 0 AS skipped, count(DISTINCT judged_at) FILTER (takes_back) AS taken_back
    FROM said GROUP BY round, rater, rater_kind, kind, question
)
"""


def questions(which: str) -> str:
    """SQL of two named queries over the judgements that a condition lets through.

    Args:
        which: the condition, on columns of ``judgements``.

    Returns:
        ``WITH said AS (...), questions AS (...)``. ``said``: the rows, each with its ``question``, its ``group_key``
        (round and group), and whether it is the rater's last word on its image or pair (``is_last``), the one that
        votes are made of. ``questions``: for each question whether it is ``judged`` (the last words hold at least two
        images against each other), ``skipped`` (nothing else was ever said), and how often an answer was
        ``taken_back``.
    """
    return _QUESTIONS.format(which=which)
