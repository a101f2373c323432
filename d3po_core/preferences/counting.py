"""The SQL definition of one judgement, for everything that counts them.

A rater judges a question: a group to mark or rank (``rating``, ``rank``), the two images of a ``choice``, or the image
of a ``score``. A row of the table ``judgements`` is not a judgement: the table has one row per image of a group, and
keeps replaced and withdrawn answers.
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
    """Return the SQL of two named queries over the judgements that meet a condition.

    Args:
        which: the condition, on columns of ``judgements``.

    Returns:
        ``WITH said AS (...), questions AS (...)``. ``said`` holds the rows, each with ``question``, ``group_key``
        (round and group) and ``is_last``: it is the rater's latest answer on its image or pair, and so becomes a vote.
        ``questions`` has one row per rater and question. It is ``judged`` if the latest answers compare at least two
        images, and ``skipped`` if the rater only ever skipped it. ``taken_back`` counts withdrawn answers.
    """
    return _QUESTIONS.format(which=which)
