"""Blind comparisons: people choose the better of two held-out images, one of a round and one of a reference.

Both images have the same prompt and seed. A round and its reference share one file,
``comparisons/<round>-<reference>.json``, which only grows: asking for more pairs adds some, and all answers stay.
Answers go into the page's journal under the comparison's id, and from there into the table ``comparisons``. They never
go into ``judgements``, so nothing can train on held-out prompts.

Nothing that a rater sees tells which image is whose: the id is random, pairs are numbered, and each pair is stored in
random order. Left and right follow from what the page shows (``shown_order``), so a rater could compute them, but not
which of the two stored images is the round's.
"""

import json
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from d3po_core.errors import D3POError
from d3po_core.people.journal import Entry, export_entries, read_entries, without_both_bad
from d3po_core.people.tally import Deck, Progress, Question, Tally
from d3po_core.store.campaign import round_config
from d3po_core.store.files import atomic_path, exclusive
from d3po_core.store.stages import finished_numbers
from d3po_core.store.tables import connect

FOLDER = "comparisons"
MODE = "pair"


class Pair(BaseModel):
    """Two held-out images of one prompt and seed; if ``turned``, the question shows the reference's first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    sample_id: str
    against_id: str
    image_path: str
    against_path: str
    turned: bool

    def on_disk(self, campaign: Path) -> bool:
        """Return whether both image files exist."""
        return (campaign / self.image_path).is_file() and (campaign / self.against_path).is_file()


class BlindComparison(BaseModel):
    """The pairs asked about a round and its reference, in the order they were chosen.

    ``raters`` is the number of people asked about each pair.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    round: int
    against: int
    raters: int
    pairs: tuple[Pair, ...]


class Begun(NamedTuple):
    """A comparison, and how many of the possible pairs have lost an image."""

    comparison: BlindComparison
    missing: int


def title_of(comparison_id: str) -> str:
    """A comparison's name for people; it does not reveal the rounds."""
    return f"blind comparison {comparison_id[:4]}"


def comparison_path(campaign: Path, round_number: int, against: int) -> Path:
    """The file with the questions about a round and its reference."""
    return campaign / FOLDER / f"{round_number}-{against}.json"


def comparisons_of(campaign: Path) -> list[BlindComparison]:
    """All comparisons of a campaign, by round and reference.

    Raises:
        D3POError: a file cannot be read.
    """
    found = [_read(path) for path in campaign.glob(f"{FOLDER}/*.json")]
    return sorted(found, key=lambda comparison: (comparison.round, comparison.against))


def begin_comparison(
    campaign: Path, round_number: int, against: int, pairs: int, raters: int = 1,
    draw: random.Random | None = None,
) -> Begun:  # fmt: skip
    """Ask people about a round against a reference, or add pairs; a repeated call changes nothing.

    Pairs are drawn at random, equally many per prompt. The images and their scores play no part: the win rate over
    pairs chosen by them would not be the win rate over all.

    Args:
        campaign: the campaign's folder.
        round_number: the finished round, whatever the guard's verdict.
        against: the reference, another finished round; 0 is the base model.
        pairs: the total number of pairs, or as many as there are. Pairs that are asked already stay.
        raters: people per pair; this can only grow.
        draw: source of randomness; by default the operating system, so that nobody can repeat the draw.

    Raises:
        D3POError: a round is not finished, the two are one, they share no held-out prompt and seed, or no such pair
            has both images on disk.
    """
    _check_rounds(campaign, round_number, against)
    there, missing = _pairs_on_disk(campaign, round_number, against)
    draw = draw or secrets.SystemRandom()
    path = comparison_path(campaign, round_number, against)
    with exclusive(path.with_name(".lock")):
        known = _read(path) if path.exists() else None
        now = known or BlindComparison(
            id=f"{draw.getrandbits(64):016x}", round=round_number, against=against, raters=raters, pairs=()
        )
        asked = {pair.sample_id for pair in now.pairs}
        fresh = [pair for pair in there if pair.sample_id not in asked]
        chosen = _chosen(fresh, Counter(pair.prompt for pair in now.pairs), pairs - len(now.pairs), draw)
        now = now.model_copy(update={"pairs": (*now.pairs, *chosen), "raters": max(now.raters, raters)})
        if now != known:
            with atomic_path(path) as temporary:
                temporary.write_text(now.model_dump_json(indent=1))
    return Begun(now, missing)


def comparison_deck(campaign: Path, comparison: BlindComparison, there: Iterable[int] | None = None) -> Deck:
    """A comparison's questions for the labelling page; each pair is a group of its own.

    Args:
        campaign: the campaign's folder.
        comparison: the comparison.
        there: numbers of the pairs to ask; by default all.

    Raises:
        D3POError: the round's configuration cannot be read.
    """
    numbers = range(len(comparison.pairs)) if there is None else sorted(there)
    pairs = [comparison.pairs[number] for number in numbers]
    config = round_config(campaign, comparison.round)
    people = config.judge.people.model_copy(update={"raters_per_group": comparison.raters, "enough": 1.0, "mode": MODE})
    config = config.model_copy(update={"judge": config.judge.model_copy(update={"people": people})})
    questions = []
    for number, pair in zip(numbers, pairs, strict=True):
        first, second = (pair.against_id, pair.sample_id) if pair.turned else (pair.sample_id, pair.against_id)
        questions.append(Question(f"{MODE}:{number}", str(number), pair.prompt, (first, second)))
    paths = {pair.sample_id: pair.image_path for pair in pairs} | {p.against_id: p.against_path for p in pairs}
    return Deck(
        campaign, config, 0, comparison.id, MODE, tuple(questions), np.arange(len(pairs)), len(pairs), paths,
        (frozenset(),) * len(pairs), np.zeros(len(pairs), bool),
    )  # fmt: skip


def comparison_progress(campaign: Path, comparison: BlindComparison) -> Progress:
    """People's progress with a comparison on the page; changes nothing."""
    return Tally(comparison_deck(campaign, comparison), read_entries(campaign, comparison.id)).progress()


def collect_comparisons(campaign: Path) -> list[Path]:
    """Write new answers of blind comparisons into the table ``comparisons``.

    Returns:
        The files written by this call.

    Raises:
        D3POError: the journal cannot be read, or the disk is full or read-only.
    """
    return [
        path
        for comparison in comparisons_of(campaign)
        for path in export_entries(campaign, comparison.id, FOLDER, comparison.round, partial(_rows, comparison))
    ]


def _rows(comparison: BlindComparison, entry: Entry) -> list[dict[str, Any]]:
    """An entry as a row of ``comparisons``; a skip or undo gives a row without a value."""
    pair = comparison.pairs[int(entry.question_id.removeprefix(f"{MODE}:"))]
    position = entry.shown.index(pair.sample_id)
    answer, both_bad = without_both_bad(entry.answer)
    return [
        {
            "comparison": comparison.id, "against": comparison.against, "rater": entry.rater,
            "sample_id": pair.sample_id, "against_id": pair.against_id,
            "value": None if answer is None else answer[position],
            "judged_at": entry.judged_at, "seconds": None if entry.answer is None else entry.seconds,
            "position": position, "both_bad": both_bad,
        }
    ]  # fmt: skip


def _read(path: Path) -> BlindComparison:
    try:
        return BlindComparison.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:120]
        raise D3POError(
            f"{path}: cannot be read ({reason}); restore it, what people said of its pairs needs it"
        ) from None


def _check_rounds(campaign: Path, round_number: int, against: int) -> None:
    finished = finished_numbers(campaign)
    for number in (round_number, against):
        if number not in finished:
            raise D3POError(
                f"{number} is no finished round of campaign {campaign.name!r}; expected one of "
                f"{', '.join(map(str, finished)) or '(it has none yet)'}"
            )
    if round_number in (0, against):
        what = "is the base model" if round_number == 0 else "cannot be compared with itself"
        raise D3POError(f"round {round_number} {what}; expected a round that trained, and another one as reference")


def _pairs_on_disk(campaign: Path, round_number: int, against: int) -> tuple[list[Pair], int]:
    """Pairs of the same prompt and seed with both images, and the number of pairs that lost one."""
    with connect(campaign) as connection:
        rows = connection.execute(_SHARED, {"round": round_number, "against": against}).fetchall()
    names = ("prompt", "sample_id", "against_id", "image_path", "against_path")
    shared = [Pair(**dict(zip(names, row, strict=True)), turned=False) for row in rows]
    there = [pair for pair in shared if pair.on_disk(campaign)]
    rounds = f"rounds {round_number} and {against} of campaign {campaign.name!r} share"
    if not shared:
        raise D3POError(f"{rounds} no held-out prompt and seed, so there is nothing to compare; name other rounds")
    if not there:
        raise D3POError(
            f"{rounds} {len(shared)} held-out images, but of none are both on disk; put back what is missing in "
            f"{campaign}/images/round={round_number} and images/round={against} (d3po regenerate ID draws one again)"
        )
    return there, len(shared) - len(there)


_SHARED = """
WITH images AS (SELECT DISTINCT round, prompt, seed, sample_id, image_path FROM evaluations)
SELECT prompt, mine.sample_id, other.sample_id, mine.image_path, other.image_path
FROM (SELECT * FROM images WHERE round = $round) mine
JOIN (SELECT * FROM images WHERE round = $against) other USING (prompt, seed)
QUALIFY row_number() OVER (PARTITION BY prompt, seed ORDER BY mine.sample_id, other.sample_id) = 1
ORDER BY prompt, seed
"""


def _chosen(pairs: list[Pair], asked: Counter[str], count: int, draw: random.Random) -> list[Pair]:
    """Draw pairs at random, first from prompts with few of them; turn each at random."""
    by_prompt: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_prompt[pair.prompt].append(pair)
    ranked: list[tuple[int, float, Pair]] = []
    for prompt, of_prompt in by_prompt.items():
        draw.shuffle(of_prompt)
        ranked += [(asked[prompt] + place, draw.random(), pair) for place, pair in enumerate(of_prompt)]
    chosen = [pair for *_, pair in sorted(ranked, key=lambda entry: entry[:2])[: max(count, 0)]]
    return [pair.model_copy(update={"turned": draw.random() < 0.5}) for pair in chosen]
