import itertools
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.page.queue import Queue, shown_order
from d3po_core.people.journal import Entry, Journal, Submission, sampling_of
from d3po_core.people.questions import (
    count_judgements,
    group_questions,
    groups_for_people,
    label_progress,
    load_deck,
    waiting_round,
)
from d3po_core.people.tally import Deck, Tally, answer_problem
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import table_from_rows, write_table
from tests.core.people.labelling import NOON, bring_in, waiting_campaign

counter = itertools.count()


def deck_of(config: CampaignConfig, mode: str | None = None) -> Deck:
    return load_deck(config.folder, config, 1, mode)


def say(config: CampaignConfig, rater: str, question_id: str, action: str = "answer", attempt: int = 0,
        undoes: int | None = None) -> Entry:  # fmt: skip
    deck = deck_of(config, question_id.partition(":")[0])
    question = deck.questions[deck.number_of[question_id]]
    answer = tuple(0.0 for _ in question.sample_ids) if action == "answer" else None
    journal = Journal(config.folder)
    entry, new = journal.append(
        Submission(f"{next(counter):032x}", deck.sampling, rater, question_id, attempt, action, deck.mode,
                   question.sample_ids, answer, 1.0, undoes)
    )  # fmt: skip
    journal.close()
    assert new
    return entry


def rows_of(size: int) -> list[dict[str, str]]:
    return [{"sample_id": f"m{member:02d}", "prompt": "p"} for member in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_groups_are_asked_in_all_pairs(size: int) -> None:
    ids = [row["sample_id"] for row in rows_of(size)]
    asked = [q.sample_ids for q in group_questions("g", rows_of(size), "pair")]
    assert asked == list(itertools.combinations(ids, 2))


@pytest.mark.parametrize("size", [6, 7, 16, 64])
def test_pairs_of_large_groups_are_few_and_connect_all_images_alike(size: int) -> None:
    questions = group_questions("g", rows_of(size), "pair")
    often = Counter(sample for question in questions for sample in question.sample_ids)
    assert set(often.values()) <= {3, 4}
    assert len(often) == size
    reached = {questions[0].sample_ids[0]}
    for _ in range(size):
        reached |= {s for q in questions if reached & set(q.sample_ids) for s in q.sample_ids}
    assert len(reached) == size
    assert len({q.question_id for q in questions}) == len(questions)


@pytest.mark.parametrize("mode", ["mark_bad", "best", "rank"])
def test_other_modes_ask_the_whole_group_at_once(mode: str) -> None:
    [question] = group_questions("g", rows_of(7), mode)
    assert question.sample_ids == tuple(row["sample_id"] for row in rows_of(7))


@pytest.mark.parametrize(
    ("mode", "answer", "fits"),
    [
        ("pair", [1, -1], True), ("pair", [0, 0], True), ("pair", [1, 1], False), ("pair", [1], False),
        ("mark_bad", [0, 1, 1], True), ("mark_bad", [0, 0, 0], True), ("mark_bad", [0, 2, 1], False),
        ("mark_bad", [0, 1], False), ("best", [2, 1, 2], True), ("best", [1, 1, 2], False), ("best", [2, 2, 2], False),
        ("rank", [3, 1, 2], True), ("rank", [1, 2, 2], True), ("rank", [1, 3, 3], False), ("rank", [0, 1, 2], False),
        ("rank", [1.5, 1, 2], False),
    ],
)  # fmt: skip
def test_only_answers_that_fit_the_question_are_taken(mode: str, answer: list[float], fits: bool) -> None:
    assert (answer_problem(mode, answer, 2 if mode == "pair" else 3) is None) == fits


def test_the_round_that_waits_is_the_latest_sampled_without_preferences(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, round_number=9)
    waiting_campaign(tmp_path, round_number=10)
    assert waiting_round(config.folder) == 10
    stage_path(config.folder, 10, "derive").write_text("{}")
    assert waiting_round(config.folder) is None
    assert waiting_round(tmp_path) is None


def scored(config: CampaignConfig, scores: dict[str, list[list[float]]]) -> None:
    bring_in(
        config,
        [
            {"rater": rater, "rater_kind": "proxy", "kind": "score", "sample_id": f"r1-g{g}-m{m}", "value": value}
            for rater, groups in scores.items() for g, members in enumerate(groups) for m, value in enumerate(members)
        ],
        name="proxy",
    )  # fmt: skip


def test_all_groups_are_for_people_or_none(tmp_path: Path) -> None:
    assert groups_for_people(waiting_campaign(tmp_path, "a"), 1) == ["r1-g0", "r1-g1", "r1-g2"]
    assert groups_for_people(waiting_campaign(tmp_path, "b", labeller="proxy"), 1) == []


def test_mixed_gives_people_the_groups_with_the_smallest_gap(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=4, size=2, labeller="mixed", share=0.5)
    scored(config, {"p": [[0, 9], [5, 5.5], [1, 4], [2, 2.1]]})
    assert groups_for_people(config, 1) == ["r1-g1", "r1-g3"]
    assert label_progress(config, 1).groups_needed == 2


def test_a_scorer_with_large_numbers_does_not_outvote_one_with_small_ones(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=3, size=2, labeller="mixed", share=0.3)
    # In units of its spread the small scorer separates group 0 far more than the large one separates group 1.
    small, large = [[0, 1], [0.5, 0.5], [0.5, 0.5]], [[500, 500], [0, 900], [100, 1000]]
    scored(config, {"small": small, "large": large})
    gaps = np.ptp(small, axis=1) / np.std(small) + np.ptp(large, axis=1) / np.std(large)
    assert groups_for_people(config, 1) == [f"r1-g{int(np.argmin(gaps))}"]


def test_weight_of_a_scorer_counts_when_groups_are_chosen_for_people(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=2, size=2, labeller="mixed", share=0.5)
    scored(config, {"a": [[0, 1], [0, 3]], "b": [[0, 4], [0, 2]]})
    judge = config.judge.model_copy(update={"scorer_weights": {"a": 9.0}})
    assert groups_for_people(config.model_copy(update={"judge": judge}), 1) == ["r1-g0"]
    judge = config.judge.model_copy(update={"scorer_weights": {"b": 9.0}})
    assert groups_for_people(config.model_copy(update={"judge": judge}), 1) == ["r1-g1"]


def test_mixed_before_the_proxies_is_an_error_and_not_a_finished_round(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, labeller="mixed")
    with pytest.raises(D3POError, match="no judgements of proxies"):
        label_progress(config, 1)


def test_a_round_that_is_not_sampled_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(D3POError, match=r"round 2 .* not sampled"):
        label_progress(waiting_campaign(tmp_path), 2)


def test_progress_counts_raters_by_group_until_it_is_complete(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=2, raters_per_group=2)
    seen = [label_progress(config, 1)]
    for rater, group in (("ann", 0), ("bob", 0), ("ann", 1), ("cem", 1)):
        say(config, rater, f"mark_bad:r1-g{group}")
        seen.append(label_progress(config, 1))
    assert [p.groups_done for p in seen] == [0, 0, 1, 1, 2]
    assert [p.missing for p in seen] == [4, 3, 2, 1, 0]
    assert [p.raters for p in seen] == [0, 1, 2, 2, 3]
    assert [p.judgements for p in seen] == [0, 1, 2, 3, 4]
    assert [p.complete for p in seen] == [False, False, False, False, True]


@pytest.mark.parametrize(("enough", "needed"), [(1.0, 10), (0.7, 7), (0.55, 6), (0.01, 1)])
def test_enough_is_a_share_of_the_groups_rounded_up(tmp_path: Path, enough: float, needed: int) -> None:
    assert label_progress(waiting_campaign(tmp_path, groups=10, enough=enough), 1).groups_needed == needed


def test_what_is_taken_back_does_not_count(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1)
    entry = say(config, "ann", "mark_bad:r1-g0")
    assert label_progress(config, 1).complete
    say(config, "ann", "mark_bad:r1-g0", "undo", attempt=1, undoes=entry.seq)
    progress = label_progress(config, 1)
    assert (progress.complete, progress.judgements, progress.raters) == (False, 0, 0)


def test_a_skip_settles_nothing_until_it_is_repeated(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1)
    say(config, "ann", "mark_bad:r1-g0", "skip")
    assert not label_progress(config, 1).complete
    say(config, "ann", "mark_bad:r1-g0", "skip", attempt=1)
    assert label_progress(config, 1).complete


def test_a_group_in_pairs_is_done_when_every_pair_is(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1, mode="pair")
    for number, pair in enumerate(("0:1", "0:2", "1:2")):
        assert label_progress(config, 1).groups_done == 0
        say(config, f"rater{number}", f"pair:r1-g0:{pair}")
    assert label_progress(config, 1).complete


def test_the_mode_of_the_page_is_the_mode_of_the_round(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1, mode="pair")
    journal = Journal(config.folder)
    journal.note(str(sampling_of(config.folder, 1)), "mode", "rank")
    journal.close()
    say(config, "ann", "rank:r1-g0")
    assert label_progress(config, 1).complete


def test_people_who_judged_elsewhere_count(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=3)
    bring_in(
        config,
        [
            *({"sample_id": f"r1-g0-m{member}", "value": member} for member in range(3)),
            {"sample_id": "r1-g1-m0"},  # one image alone orders nothing
            {"sample_id": "r1-g2-m0", "other_id": "r1-g2-m1", "kind": "choice", "value": 1.0},
            {"sample_id": "r1-g1-m0", "other_id": "r1-g1-m1", "kind": "choice", "value": None},
        ],
    )
    progress = label_progress(config, 1)
    assert (progress.groups_done, progress.judgements, progress.raters) == (2, 2, 1)


def test_the_last_word_of_those_elsewhere_counts(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1)
    choice = {"sample_id": "r1-g0-m0", "other_id": "r1-g0-m1", "kind": "choice", "value": 1.0}
    later = {"sample_id": "r1-g0-m1", "other_id": "r1-g0-m0", "judged_at": NOON + timedelta(seconds=1), "value": None}
    bring_in(config, [choice, choice | later])
    assert label_progress(config, 1).groups_done == 0


def test_proxies_and_gold_are_no_people(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1)
    for kind in ("proxy", "gold"):
        bring_in(config, [{"sample_id": f"r1-g0-m{m}", "rater_kind": kind} for m in range(3)], name=kind)
    assert label_progress(config, 1).groups_done == 0


def test_an_export_of_the_page_is_not_counted_a_second_time(tmp_path: Path) -> None:
    from d3po_core.people.journal import export_judgements

    config = waiting_campaign(tmp_path, groups=2)
    say(config, "ann", "mark_bad:r1-g0")
    before = label_progress(config, 1)
    assert len(export_judgements(config.folder, 1)) == 1
    assert label_progress(config, 1) == before


def take_all(config: CampaignConfig, raters: list[str]) -> list[tuple[str, str]]:
    """Let raters answer in turn what they are asked first, until nobody is asked anything."""
    tally = Tally(deck_of(config))
    queue, asked = Queue(tally), []
    for number, rater in zip(range(1, 1000), itertools.cycle(raters), strict=False):
        following = queue.next(rater)
        if not following and all(not queue.next(other) for other in raters):
            return asked
        if following:
            question = tally.deck.questions[following[0]]
            asked.append((rater, question.question_id))
            tally.add([Entry(str(number), "s", rater, question.question_id, 0, "answer", "mark_bad",
                             question.sample_ids, (1.0,), 1.0, None, number, NOON)])  # fmt: skip
    raise AssertionError("no end")


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9))
def test_every_group_gets_its_raters_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, raters: int, needed: int, groups: int
) -> None:
    config = waiting_campaign(tmp_path_factory.mktemp("c"), groups=groups, size=2, raters_per_group=needed, pixels=1)
    asked = take_all(config, [f"r{n}" for n in range(raters)])
    assert len(set(asked)) == len(asked)
    assert set(Counter(question for _, question in asked).values()) == {min(raters, needed)}
    assert len({question for _, question in asked}) == groups


def test_each_group_has_one_rater_before_any_has_two(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=12, raters_per_group=2)
    asked = [question for _, question in take_all(config, ["ann", "bob"])]
    # What is set aside for a rater (three questions) is asked in any case.
    assert len(set(asked[: 12 - 2 * 3])) == 12 - 2 * 3


def test_raters_are_asked_in_their_own_order_which_a_restart_does_not_change(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=20)
    deck = deck_of(config)
    orders = [tuple(Queue(Tally(deck)).next(rater)) for rater in ("ann", "ann", "bob")]
    assert orders[0] == orders[1] != orders[2]


def test_two_raters_are_not_shown_the_same_group_while_there_are_others(tmp_path: Path) -> None:
    queue = Queue(Tally(deck_of(waiting_campaign(tmp_path, groups=6))))
    assert not set(queue.next("ann")) & set(queue.next("bob"))
    assert queue.next("cem"), "better twice than nobody"


def test_questions_with_high_priority_come_first(tmp_path: Path) -> None:
    queue = Queue(Tally(deck_of(waiting_campaign(tmp_path, groups=8))))
    queue.set_priority(np.array([0, 5, 1, 9, 0, 7, 0, 0]))
    assert queue.next("ann") == [3, 5, 1]


@pytest.mark.parametrize("wrong", [np.zeros(3), np.full(8, np.nan), np.zeros((8, 1))])
def test_priorities_that_do_not_fit_are_refused(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="8 finite"):
        Queue(Tally(deck_of(waiting_campaign(tmp_path, groups=8)))).set_priority(wrong)


def test_groups_with_known_answers_come_early_for_every_rater_though_they_have_enough(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=60, size=2, pixels=1)
    gold = {"r1-g50", "r1-g51"}
    bring_in(config, [{"sample_id": f"{g}-m{m}", "rater_kind": "gold", "value": m} for g in gold for m in range(2)])
    asked = take_all(config, ["ann", "bob", "cem"])
    for rater in ("ann", "bob", "cem"):
        own = [question.removeprefix("mark_bad:") for who, question in asked if who == rater]
        assert all(own.index(group) < 15 for group in gold)


def test_a_known_group_that_is_not_for_people_is_asked_and_not_waited_for(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=4, size=2, labeller="mixed", share=0.25)
    scored(config, {"p": [[0, 9], [5, 5.5], [1, 4], [2, 2.1]]})
    bring_in(config, [{"sample_id": f"r1-g0-m{m}", "rater_kind": "gold", "value": m} for m in range(2)], name="gold")
    assert {q.group_id for q in deck_of(config).questions} == {"r1-g3", "r1-g0"}
    assert label_progress(config, 1).groups_needed == 1
    say(config, "ann", "mark_bad:r1-g3")
    assert label_progress(config, 1).complete


def test_what_was_skipped_comes_back_when_nothing_else_is_left(tmp_path: Path) -> None:
    tally = Tally(deck_of(waiting_campaign(tmp_path, groups=3)))
    queue = Queue(tally)
    first = queue.next("ann")[0]
    skipped = tally.deck.questions[first]
    tally.add(
        [
            Entry(
                "a",
                "s",
                "ann",
                skipped.question_id,
                0,
                "skip",
                "mark_bad",
                skipped.sample_ids,
                None,
                1.0,
                None,
                1,
                NOON,
            )
        ]
    )
    assert first not in queue.next("ann")
    for number, index in enumerate(queue.next("ann")):
        question = tally.deck.questions[index]
        tally.add([Entry(f"b{number}", "s", "ann", question.question_id, 0, "answer", "mark_bad",
                         question.sample_ids, (1.0,), 1.0, None, 2 + number, NOON)])  # fmt: skip
    assert queue.next("ann") == [first]


def test_images_stand_in_an_order_of_the_raters_own(tmp_path: Path) -> None:
    deck = deck_of(waiting_campaign(tmp_path, groups=40))
    orders = {rater: [shown_order(deck, rater, q) for q in deck.questions] for rater in ("ann", "bob")}
    assert orders["ann"] == [shown_order(deck, "ann", q) for q in deck.questions]
    assert orders["ann"] != orders["bob"]
    for order, question in zip(orders["ann"], deck.questions, strict=True):
        assert sorted(order) == sorted(question.sample_ids)
    first = Counter(order[0][-2:] for rater in orders for order in orders[rater])
    assert all(12 < first[f"m{member}"] < 42 for member in range(3)), "80 draws of one in three: 27, sd 4.2"


def test_judgements_of_people_are_counted_wherever_they_came_from(tmp_path: Path) -> None:
    assert count_judgements(tmp_path, 1) == 0
    rows = [
        {
            "rater": rater, "rater_kind": kind, "kind": "rating", "sample_id": "r1-g0-m0", "other_id": None,
            "value": 1.0,
            "judged_at": datetime(2024, 1, 1), "source": "s", "seconds": None, "position": None,
        }
        for rater, kind in (("brightness", "proxy"), ("ann", "human"), ("key", "gold"))
    ]  # fmt: skip
    write_table(tmp_path, "judgements", 1, table_from_rows("judgements", rows), name="mixed")
    assert count_judgements(tmp_path, 1) == 2
