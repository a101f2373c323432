"""The rules for imported judgements, as SQL.

Every check is a column, a condition that finds its bad rows, and a message that follows row, column and value.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc

from d3po_core.errors import D3POError
from d3po_core.image_ids import GROUP, MEMBER
from d3po_core.judgement_files.formats import JudgementFile
from d3po_core.judgement_files.words import BAD, BETWEEN, BOTH_BAD, CHOICES, GOOD, SKIPS
from d3po_core.people.rater_names import name_problem, other_spellings

_NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
# Real zones are -12:00 to +14:00; databases allow somewhat more.
_OFFSET = r"[+-](0[0-9]|1[0-5])(:?[0-5][0-9])?"
_ZONE = rf"\s?([Zz]|{_OFFSET})$"
_TIME = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?"
    rf"(\s?([Zz]|{_OFFSET}))?)?"
)


@dataclass(frozen=True)
class Scope:
    """The round, raters and settings that a file is checked against.

    Attributes:
        campaign: the campaign's name.
        round_number: the round.
        samples: sample_id, group_id, member and prompt of the round's images.
        rater: who judged the rows that do not say it.
        rater_kind: human or gold.
        raters: rater and rater_kind of everybody who has judged the round.
        now: naive UTC; the time of rows without one.
        scale: words of an ordered scale, the worst first; empty for numbers and good or bad.
        names: names of everybody who has judged the campaign.
        campaign_id: the campaign's own id, which differs from that of a namesake.
    """

    campaign: str
    round_number: int
    samples: pa.Table
    rater: str | None
    rater_kind: str
    raters: pa.Table
    now: datetime
    scale: Sequence[str] = ()
    names: Sequence[str] = ()
    campaign_id: str = ""


def macros(decimal_comma: bool) -> str:
    """SQL functions that read numbers and times; they return null for invalid text."""
    text = r"if(regexp_full_match(x, '[+-]?[0-9]+,[0-9]+'), replace(x, ',', '.'), x)" if decimal_comma else "x"
    return rf"""
    CREATE MACRO as_real(x) AS if(regexp_full_match(x, '{_NUMBER}'), try_cast(x AS DOUBLE), NULL);
    CREATE MACRO finite(x) AS if(isfinite(as_real(x)), as_real(x), NULL);
    CREATE MACRO number(x) AS finite({text});
    CREATE MACRO one_space(x) AS regexp_replace(nfc_normalize(x), '\s+', ' ', 'g');
    -- DuckDB would read the zone of a time and forget it.
    CREATE MACRO zone_minutes(x) AS coalesce(try_cast(left(x, 1) || '1' AS INTEGER), 0)
        * (coalesce(try_cast(x[2:3] AS INTEGER), 0) * 60
           + coalesce(try_cast(right(x, 2) AS INTEGER) * (len(x) > 3)::INTEGER, 0));
    CREATE MACRO utc(x) AS if(regexp_full_match(x, '{_TIME}'), try_cast(if(contains(x, ':'),
        regexp_replace(x, '{_ZONE}', ''), x) AS TIMESTAMP)
        - to_minutes(if(contains(x, ':'), zone_minutes(regexp_extract(x, '{_ZONE}', 1)), 0)), NULL);
    """


def value_sql(kind: str, scale: Sequence[str]) -> str:
    """SQL for the number in a cell; null if there is none."""
    words: dict[str, float] = {}
    if kind == "choice":
        words = dict(CHOICES)
    elif kind == "rating" and scale:
        words = {word.strip().lower(): index for index, word in enumerate(scale)}
        if len(words) < 2 or len(words) < len(scale) or set(SKIPS) & set(words) or "" in words:
            raise D3POError(
                f"scale {', '.join(scale)!r}: expected at least two different words, the worst first, none of them "
                f"{SKIPS[0]!r}; such as --scale poor,fair,good"
            )
    elif kind == "rating":
        words = dict.fromkeys(GOOD, 1) | dict.fromkeys(BAD, 0) | dict.fromkeys(BETWEEN, 0.5)
    cases = " ".join(f"WHEN {_quoted(word)} THEN {number}" for word, number in words.items())
    numbers = "NULL" if kind == "choice" or scale else "number(said)"
    if kind == "choice":  # the chosen image's own id is unambiguous too
        numbers = "CASE WHEN said = sample_id THEN 1 WHEN said = other_id THEN -1 END"
    return f"CASE lower(said) {cases} ELSE {numbers} END" if cases else numbers


def skipped_sql() -> str:
    """SQL for whether a cell says that the rater has no opinion."""
    return f"lower(said) IN ({', '.join(map(_quoted, SKIPS))})"


def both_bad_sql(kind: str) -> str:
    """SQL for whether a cell calls both images of a choice bad; null for other kinds and without a choice."""
    if kind != "choice":
        return "NULL::BOOLEAN"
    words = ", ".join(map(_quoted, BOTH_BAD))
    return f"if({skipped_sql()}, NULL, lower(said) IN ({words}))"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def checks_of(file: JudgementFile, scope: Scope) -> Iterator[tuple[str, str, str]]:
    """Column, condition and message of every check of a file."""
    kind = file.kind
    yield from _sample_checks("sample_id", "group_of", scope)
    if kind == "choice":
        yield from _sample_checks("other_id", "other_group_of", scope)
        yield "other_id", "other_id = sample_id", "'is both images of the pair; compare two images'"
        yield (
            "other_id", "group_of != other_group_of",
            "'is in group ' || other_group_of || ', ' || sample_id || ' in ' || group_of || '; a pair is of one group'",
        )  # fmt: skip
    yield from _said_checks(file, scope)
    here = f"round {scope.round_number} of campaign {_quoted(scope.campaign)}".replace("'", "''")
    others = scope.raters.filter(pc.not_equal(scope.raters["rater_kind"], scope.rater_kind))["rater"].to_pylist()
    taken = ", ".join(["NULL", *map(_quoted, others)])
    yield "rater", "rater IS NULL", "'is empty; fill it in, or say who judged: --rater NAME'"
    yield from _name_checks(file, scope)
    yield (
        "rater", f"rater IN ({taken})",
        f"'judged {here} as another kind of rater; give {scope.rater_kind} judgements another name: --rater NAME'",
    )  # fmt: skip
    yield (
        "judged_at", "judged_at IS NOT NULL AND (moment IS NULL OR moment < TIMESTAMP '2000-01-01')",
        "'is no time; expected one like 2024-05-01T12:00:00Z (UTC where no zone is given)'",
    )  # fmt: skip
    yield "judged_at", f"moment > TIMESTAMP '{scope.now}' + INTERVAL 1 DAY", "'lies in the future; correct the time'"
    yield (
        "seconds", "seconds IS NOT NULL AND coalesce(number(seconds) < 0, true)",
        "'is no duration; expected seconds, 0 or more'",
    )  # fmt: skip
    yield (
        "position", "position IS NOT NULL AND NOT coalesce(number(position) BETWEEN 0 AND 9999 "
        "AND number(position) = floor(number(position)), false)", "'is no position; expected 0, 1, 2, ...'",
    )  # fmt: skip
    yield "group_id", "group_id != group_of", "'is not the group of ' || sample_id || ', which is ' || group_of"
    yield (
        "prompt", "prompt != prompt_of AND lower(one_space(prompt)) != lower(one_space(prompt_of))",
        f"'is not the prompt of ' || sample_id || ' in {here}; is the file of another campaign?'",
    )  # fmt: skip
    yield (
        "campaign", f"campaign != {_quoted(scope.campaign)}",
        f"'is not the campaign {_quoted(scope.campaign)[1:-1]}; import it with its own --campaign'",
    )  # fmt: skip
    yield (
        "campaign_id", f"campaign_id IS NOT NULL AND campaign_id != {_quoted(scope.campaign_id)}",
        f"'is the id of another campaign than {_quoted(scope.campaign)[1:-1]}, begun at another time; import it there'",
    )  # fmt: skip
    yield (
        "round", f"round IS NOT NULL AND coalesce(number(round) != {scope.round_number}, true)",
        f"'is not round {scope.round_number}; import it with its own --round'",
    )  # fmt: skip


def _name_checks(file: JudgementFile, scope: Scope) -> Iterator[tuple[str, str, str]]:
    names = [name for name in pc.unique(file.table["rater"]).to_pylist() if name is not None]
    names += [scope.rater] if scope.rater else []
    bad = {name: problem for name in names if (problem := name_problem(name))}
    for name, problem in bad.items():
        yield "rater", f"rater = {_quoted(name)}", _quoted(f"is no name of a rater; {problem}")
    for name, known in other_spellings(names, scope.names).items():
        yield (
            "rater", f"rater = {_quoted(name)}",
            _quoted(f"differs from rater {known!r} only in capitals; write {known!r}, or a name of its own"),
        )  # fmt: skip


def _sample_checks(column: str, group: str, scope: Scope) -> Iterator[tuple[str, str, str]]:
    here = f"round {scope.round_number} of campaign {_quoted(scope.campaign)}".replace("'", "''")
    # Use the file's row: a bare sample_id would be that of the samples in the message's subquery.
    named = rf"regexp_extract(said.{column}, '^({GROUP}){MEMBER}$', 1)"
    its_round = rf"regexp_extract(said.{column}, '^r([0-9]+)-g[0-9]+{MEMBER}$', 1)"
    yield column, f"{column} IS NULL", "'is empty; expected the id of an image'"
    yield (
        column, f"{column} IS NOT NULL AND {group} IS NULL",
        f"""CASE WHEN {named} = '' THEN 'is no sample id; expected one like r{scope.round_number}-g0-m1: '
                 || 'only images that this campaign sampled can be judged'
            WHEN {its_round} != '{scope.round_number}' THEN 'is of round ' || {its_round} || ', not of {here}; '
                 || 'import the file of each round by itself, with its --round'
            WHEN {named} IN (SELECT group_id FROM samples) THEN 'is not in {here} (group ' || {named} || ' has members '
                 || (SELECT if(max(member) - min(member) = count(*) - 1, min(member) || ' to ' || max(member),
                               string_agg(member, ', ' ORDER BY member)) FROM samples WHERE group_id = {named}) || ')'
            ELSE 'is not in {here} (it has ' || (SELECT count(DISTINCT group_id) FROM samples) || ' groups, such as '
                 || (SELECT min(group_id) FROM samples) || ')' END""",
    )  # fmt: skip


def _said_checks(file: JudgementFile, scope: Scope) -> Iterator[tuple[str, str, str]]:
    kind = file.kind
    if kind == "choice":
        yield "said", "value IS NULL AND NOT skipped", "'is no choice; expected first, second, tie, both bad or skip'"
    elif kind == "rank":
        yield (
            "said", "NOT skipped AND NOT coalesce(value BETWEEN 1 AND group_size AND value = floor(value), "
            "value >= 1 AND value = floor(value) AND group_size IS NULL, false)",
            "'is no rank; expected 1 for the best' || coalesce(' to ' || group_size || ', as ' || group_of "
            "|| ' has so many images', ' and so on') || ', or skip'",
        )  # fmt: skip
    else:
        known = " or ".join(scope.scale) if scope.scale else "a finite number, good or bad"
        expected = _quoted(f"is no rating; expected {known}, or skip")
        yield "said", "value IS NULL AND NOT skipped", expected
        for separator in _ambiguous_separators(file):
            yield (
                "said", f"regexp_full_match(said, '{_in_threes(separator)}')",
                f"'may mean thousands or a decimal fraction (\"{separator}\" before three digits); write the column''s "
                "numbers without separators of thousands'",
            )  # fmt: skip
        words = pc.is_in(pc.utf8_lower(file.table["said"]), pa.array([*GOOD, *BAD]))
        if not scope.scale and pc.any(words).as_py():
            yield (
                "said", "as_real(said) IS NOT NULL AND value NOT IN (0, 0.5, 1)",
                "'is a number beside good and bad in one file; expected 1, 0, good or bad'",
            )  # fmt: skip


def _in_threes(separator: str) -> str:
    """Regular expression for digits grouped in threes, such as 1,250 and 12,345,678."""
    return rf"[+-]?[1-9][0-9]{{0,2}}(\{separator}[0-9]{{3}})+"


def _ambiguous_separators(file: JudgementFile) -> list[str]:
    """Separators that group digits in threes, if no cell of the column shows that they mark a fraction.

    In files without a decimal comma, a point marks a fraction and a comma is no number at all.
    """
    cells = pc.unique(pc.drop_null(file.table["said"]))
    found = []
    for separator in (",", ".") if file.decimal_comma else ():
        grouped = pc.match_substring_regex(cells, f"^{_in_threes(separator)}$")
        numbers = pc.match_substring_regex(cells, rf"^[+-]?[0-9]+\{separator}[0-9]+$")
        if pc.any(grouped).as_py() and not pc.any(pc.and_not(numbers, grouped)).as_py():
            found.append(separator)
    return found
