"""A round's questions for people, read from a campaign's folder, and people's progress.

Judgements imported from elsewhere count like those on the page, for every question in which the rater compared at least
two images.
"""

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.image_ids import IMPORTED_JUDGEMENTS
from d3po_core.people.journal import FILE_PREFIX, JOURNAL_FILE, Journal, read_entries, sampling_of
from d3po_core.people.tally import Deck, Progress, Question, Tally
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import partition, read_rows

# With more images than this, we ask only the pairs of neighbours on two rings.
ALL_PAIRS_UP_TO = 5


def waiting_round(campaign: Path) -> int | None:
    """The latest sampled round without preferences, None if there is none."""
    sampled = [int(path.parent.name.removeprefix("round=")) for path in campaign.glob("stages/round=*/sample.json")]
    latest = max(sampled, default=None)
    return None if latest is None or stage_path(campaign, latest, "derive").exists() else latest


def groups_for_people(config: CampaignConfig, round_number: int) -> list[str]:
    """Groups of a round that people judge, in the order of the samples.

    None with labeller ``proxy``, all with ``human``. With ``mixed``, the share ``judge.people.share`` (rounded up) with
    the smallest gap between best and worst image by the proxies. The gap is in units of each scorer's spread over the
    round, times its weight, if any. Among equals, earlier groups come first.

    Raises:
        D3POError: the proxies have not judged the round yet.
    """
    return _groups_for_people(config.folder, config, round_number, _groups(config.folder, round_number))


def label_progress(config: CampaignConfig, round_number: int) -> Progress:
    """People's progress with a round, on the page and elsewhere; changes nothing.

    Raises:
        D3POError: the round is not sampled, or labeller ``mixed`` waits for the proxies.
    """
    deck = load_deck(config.folder, config, round_number)
    return Tally(deck, read_entries(config.folder, deck.sampling)).progress()


def count_judgements(campaign: Path, round_number: int) -> int:
    """Number of a round's questions that people have answered, on the page and elsewhere.

    A question that a rater answered again, or took back, counts once. A question is a group, or a pair of a choice.
    """
    sampling = sampling_of(campaign, round_number)
    entries = read_entries(campaign, sampling) if sampling else []
    on_page = {(entry.rater, entry.question_id) for entry in entries if entry.action == "answer"}
    group_of = {row["sample_id"]: name for name, rows in _groups(campaign, round_number).items() for row in rows}
    elsewhere = {
        (row["rater"], row["rater_kind"], row["kind"], *_question_of(row, group_of))
        for row in _brought_in(campaign, round_number)
        if row["rater_kind"] != "proxy"
    }
    return len(on_page) + len(elsewhere)


def _question_of(row: dict[str, Any], group_of: dict[str, str]) -> tuple[str, ...]:
    if row["kind"] == "choice":
        return tuple(sorted((row["sample_id"], row["other_id"])))
    return (group_of.get(row["sample_id"], row["sample_id"]),)


def load_deck(campaign: Path, config: CampaignConfig, round_number: int, mode: str | None = None) -> Deck:
    """Read a round's questions.

    Args:
        campaign: the campaign's folder.
        config: the round's configuration.
        round_number: the round.
        mode: how people judge; by default the labelling page's last mode, else the configuration's.

    Raises:
        D3POError: the round is not sampled, or labeller ``mixed`` waits for the proxies.
    """
    sampling = sampling_of(campaign, round_number)
    if sampling is None:
        raise D3POError(f"round {round_number} in {campaign} is not sampled yet; let the run go on, then label")
    groups = _groups(campaign, round_number)
    for_people = _groups_for_people(campaign, config, round_number, groups)
    group_of = {row["sample_id"]: group_id for group_id, rows in groups.items() for row in rows}
    said = _said_elsewhere(campaign, round_number, group_of)
    chosen = set(for_people)
    only_gold = [group_id for group_id in groups if group_id not in chosen and ("gold", group_id) in said]
    mode = mode or _noted_mode(campaign, sampling) or config.judge.people.mode
    questions: list[Question] = []
    numbers, gold, elsewhere = [], [], []
    for number, group_id in enumerate([*for_people, *only_gold]):
        for question in group_questions(group_id, groups[group_id], mode):
            is_gold = bool(_who_answered(question, said.get(("gold", group_id), {})))
            if number < len(for_people) or is_gold:
                questions.append(question)
                numbers.append(number)
                gold.append(is_gold)
                elsewhere.append(_who_answered(question, said.get(("human", group_id), {})))
    paths = {row["sample_id"]: row["image_path"] for rows in groups.values() for row in rows}
    return Deck(
        campaign, config, round_number, sampling, mode, tuple(questions), np.array(numbers, int), len(for_people),
        paths, tuple(elsewhere), np.array(gold, bool),
    )  # fmt: skip


def group_questions(group_id: str, rows: Sequence[dict[str, str]], mode: str) -> list[Question]:
    """The questions that a mode asks about one group.

    ``pair``: all pairs, up to five images. For n > 5 images in a circle: the 2n pairs of neighbours at distance 1 and
    about the root of n, which connect any two images in few steps. Other modes: one question.
    """
    prompt, ids = rows[0]["prompt"], [row["sample_id"] for row in rows]
    if mode != "pair":
        return [Question(f"{mode}:{group_id}", group_id, prompt, tuple(ids))]
    pairs = list(itertools.combinations(range(len(ids)), 2))
    if len(ids) > ALL_PAIRS_UP_TO:
        far = max(2, round(math.sqrt(len(ids))))
        rings = {tuple(sorted((a, (a + step) % len(ids)))) for a in range(len(ids)) for step in (1, far)}
        pairs = [pair for pair in pairs if pair in rings]
    return [Question(f"pair:{group_id}:{a}:{b}", group_id, prompt, (ids[a], ids[b])) for a, b in pairs]


def _groups(campaign: Path, round_number: int) -> dict[str, list[dict[str, str]]]:
    folder = partition(campaign, "samples", round_number)
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for path in sorted(folder.glob("*.parquet")):
        columns = ["sample_id", "group_id", "member", "prompt", "image_path"]
        for row in pq.ParquetFile(path).read(columns=columns).to_pylist():
            groups[row["group_id"]].append(row)
    return {group_id: sorted(rows, key=lambda row: row["member"]) for group_id, rows in groups.items()}


def _groups_for_people(
    campaign: Path, config: CampaignConfig, round_number: int, groups: dict[str, list[dict[str, str]]]
) -> list[str]:
    if config.judge.labeller != "mixed":
        return list(groups) if config.judge.labeller == "human" else []
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for row in _brought_in(campaign, round_number):
        if row["rater_kind"] == "proxy" and row["kind"] == "score" and row["value"] is not None:
            scores[row["rater"]][row["sample_id"]] = row["value"]
    if not scores:
        raise D3POError(
            f"round {round_number} in {campaign} has no judgements of proxies yet; labeller 'mixed' needs them to "
            "choose the groups for people: let the run go on"
        )
    gaps = np.zeros(len(groups))
    for rater, by_sample in scores.items():
        weight = config.judge.scorer_weights.get(rater, 1.0)
        spread = (float(np.std(list(by_sample.values()))) or 1.0) / weight
        for number, rows in enumerate(groups.values()):
            values = [by_sample[row["sample_id"]] for row in rows if row["sample_id"] in by_sample]
            gaps[number] += (max(values) - min(values)) / spread if values else 0.0
    chosen = np.argsort(gaps, kind="stable")[: math.ceil(config.judge.people.share * len(groups) - 1e-8)]
    return [list(groups)[number] for number in sorted(chosen)]


def _said_elsewhere(
    campaign: Path, round_number: int, group_of: dict[str, str]
) -> dict[tuple[str, str], dict[str, list[set[str]]]]:
    """By kind of rater and group: each rater's sets of images that they compared."""
    last_word: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in sorted(_brought_in(campaign, round_number), key=lambda row: row["judged_at"]):
        if row["rater_kind"] != "proxy" and row["sample_id"] in group_of:
            about = sorted({row["sample_id"], row["other_id"] or row["sample_id"]})
            last_word[(row["rater"], row["rater_kind"], row["kind"], *about)] = row
    said: dict[tuple[str, str], dict[str, list[set[str]]]] = defaultdict(lambda: defaultdict(list))
    marked: dict[tuple[str, str, str, str], set[str]] = defaultdict(set)
    for (rater, rater_kind, kind, *about), row in last_word.items():
        group_id = group_of[about[0]]
        if row["value"] is not None and kind == "choice":
            said[rater_kind, group_id][rater].append(set(about))
        elif row["value"] is not None:
            marked[rater, rater_kind, kind, group_id].update(about)
    for (rater, rater_kind, _, group_id), images in marked.items():
        said[rater_kind, group_id][rater].append(images)
    return said


def _who_answered(question: Question, said: dict[str, list[set[str]]]) -> frozenset[str]:
    """Raters who compared at least two of the question's images."""
    images = set(question.sample_ids)
    return frozenset(rater for rater, sets in said.items() if any(len(images & judged) > 1 for judged in sets))


def _brought_in(campaign: Path, round_number: int) -> list[dict[str, Any]]:
    """Rows of a round that came neither from the labelling page nor with the images of a data set."""
    files = sorted(partition(campaign, "judgements", round_number).glob("*.parquet"))
    files = [path for path in files if path.stem != IMPORTED_JUDGEMENTS]
    return [row for path in files if not path.name.startswith(FILE_PREFIX) for row in read_rows(path)]


def _noted_mode(campaign: Path, sampling: str) -> str | None:
    if not (campaign / JOURNAL_FILE).exists():
        return None
    with contextlib.closing(Journal(campaign, read_only=True)) as journal:
        return journal.read_note(sampling, "mode")
