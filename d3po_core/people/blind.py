"""Blind comparisons: people say which of two held-out images is better, one of a round and one of a reference.

Both images are of the same prompt and seed. What is asked of a round and its reference is one file,
``comparisons/<round>-<reference>.json``, which only grows: asking again for more pairs adds some, and what was said
stays. Answers go into the page's journal under the comparison's id, never into ``judgements``, so that held-out prompts
cannot be trained on; from there they come into the table ``comparisons``.

Nothing that a rater sees tells which image is whose: the id is random, pairs are numbered, and each pair is stored one
way or the other at random. Left and right are drawn from what stands on the page (``shown_order``) and could be
computed from it, but not which of the two stored images is the round's.
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
from d3po_core.people.journal import Entry, export_entries, read_entries
from d3po_core.people.tally import Deck, Progress, Question, Tally
from d3po_core.store.campaign import round_config
from d3po_core.store.files import atomic_path, exclusive
from d3po_core.store.stages import finished_numbers
from d3po_core.store.tables import connect

FOLDER = "comparisons"
MODE = "pair"


class Pair(BaseModel):
    """Two held-out images of one prompt and seed; ``turned``: the reference's is the first of the question's images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    sample_id: str
    against_id: str
    image_path: str
    against_path: str
    turned: bool

    def on_disk(self, campaign: Path) -> bool:
        """Whether both images are there."""
        return (campaign / self.image_path).is_file() and (campaign / self.against_path).is_file()


class BlindComparison(BaseModel):
    """What is asked about a round and its reference: pairs in the order in which they were chosen.

    ``raters`` is how many people are asked about each pair.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    round: int
    against: int
    raters: int
    pairs: tuple[Pair, ...]


class Begun(NamedTuple):
    """A comparison as it stands, and how many of the pairs that could be asked have lost an image."""

    comparison: BlindComparison
    missing: int


def title_of(comparison_id: str) -> str:
    """What people call a comparison by; says nothing about its rounds."""
    return f"blind comparison {comparison_id[:4]}"


def comparison_path(campaign: Path, round_number: int, against: int) -> Path:
    """The file that says what is asked about a round and its reference."""
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
    """Ask people about a round against a reference, or more of them; done again, it changes nothing.

    Pairs are drawn at random, as many of each prompt as of any other. Not by what the images or their scores look like:
    the win rate over pairs chosen so would not be that over all.

    Args:
        campaign: the campaign's folder.
        round_number: the finished round, whatever the guard said of it.
        against: the reference, another finished round; 0 is the base model.
        pairs: how many pairs in all; fewer when there are fewer. Pairs that are asked already stay.
        raters: how many people are asked about each pair; more than are asked already, or nothing changes.
        draw: where randomness comes from; the operating system when not given, so that nobody can draw it again.

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
    """What a comparison asks, as the labelling page asks it: each pair is a group of its own.

    Args:
        campaign: the campaign's folder.
        comparison: the comparison.
        there: numbers of the pairs to ask; all when not given.

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
    """How far people are with a comparison, on the page; reads and changes nothing."""
    return Tally(comparison_deck(campaign, comparison), read_entries(campaign, comparison.id)).progress()


def collect_comparisons(campaign: Path) -> list[Path]:
    """Write what people said in blind comparisons, and no file holds yet, into the table ``comparisons``.

    Returns:
        The files that were written now.

    Raises:
        D3POError: the journal cannot be read, or the disk is full or read-only.
    """
    return [
        path
        for comparison in comparisons_of(campaign)
        for path in export_entries(campaign, comparison.id, FOLDER, comparison.round, partial(_rows, comparison))
    ]


def _rows(comparison: BlindComparison, entry: Entry) -> list[dict[str, Any]]:
    """An entry as a row of ``comparisons``; skips and undos give one without a value."""
    pair = comparison.pairs[int(entry.question_id.removeprefix(f"{MODE}:"))]
    position = entry.shown.index(pair.sample_id)
    return [
        {
            "comparison": comparison.id, "against": comparison.against, "rater": entry.rater,
            "sample_id": pair.sample_id, "against_id": pair.against_id,
            "value": None if entry.answer is None else entry.answer[position],
            "judged_at": entry.judged_at, "seconds": None if entry.answer is None else entry.seconds,
            "position": position,
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
    """Pairs of the same prompt and seed that can be shown, and how many have lost an image."""
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
    """Pairs at random, from prompts with few of them first; each turned at random."""
    by_prompt: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_prompt[pair.prompt].append(pair)
    ranked: list[tuple[int, float, Pair]] = []
    for prompt, of_prompt in by_prompt.items():
        draw.shuffle(of_prompt)
        ranked += [(asked[prompt] + place, draw.random(), pair) for place, pair in enumerate(of_prompt)]
    chosen = [pair for *_, pair in sorted(ranked, key=lambda entry: entry[:2])[: max(count, 0)]]
    return [pair.model_copy(update={"turned": draw.random() < 0.5}) for pair in chosen]
