"""What the guard remembers between rounds changes nothing, and lets it read few rounds."""

from pathlib import Path

import numpy as np
import pytest

from d3po_core.evaluation import halves
from d3po_core.evaluation.comparison import fitted_champion, read_held_out
from d3po_core.records import GuardRecord
from d3po_core.store.stages import stage_path
from tests.core.little_campaign import LittleCampaign

ROUNDS, REFUSED, PROMPTS = 9, (3, 6), [f"thing {i}" for i in range(8)]


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """Rounds that get better by chance, some refused by the guard though they score highest."""
    campaign, drawn = LittleCampaign(tmp_path / "long", PROMPTS, seeds=1), np.random.default_rng(3)
    for number in range(ROUNDS + 1):
        scores = drawn.random((len(PROMPTS), 1)) + (1 if number in REFUSED else 0.02 * number)
        campaign.add_round(number, scores, images=False)
        verdict = "rejected" if number in REFUSED else "ok"
        guard = GuardRecord(verdict=verdict, findings=[], go_on_from=0, champion=0, win_rates={})
        stage_path(tmp_path / "long", number, "guard").write_text(guard.model_dump_json())
    return tmp_path / "long"


def chosen_by_reading_all(folder: Path, number: int) -> list[int]:
    """Each prompt's round, by the definition: the champion of the trusted rounds on the other half of the prompts."""
    trusted = [n for n in range(number) if n not in REFUSED]
    held_out = read_held_out([(folder, n) for n in trusted])
    return [trusted[row] for row in fitted_champion(held_out.scores["brightness"], held_out.prompts)]


def test_remembering_gives_what_reading_all_rounds_gives(long: Path) -> None:
    several = set()
    for number in range(1, ROUNDS + 1):
        held_out, at, chosen = halves.read_with_chosen(long, number, "brightness", {0, number - 1})
        assert [chosen[i % 2] for i in range(len(PROMPTS))] == chosen_by_reading_all(long, number)
        assert len(at) <= 6, "more rounds were read than those since the last question, and those needed"
        alone = read_held_out([(long, number)]).scores["brightness"][0]
        assert held_out.scores["brightness"][-1].tolist() == alone.tolist()
        several.add(chosen)
    assert len(several) > 2, "the halves should have changed their champions in this campaign"


def test_a_round_that_is_asked_again_or_skipped_gets_the_same_answer(long: Path) -> None:
    asked = [halves.read_with_chosen(long, number, "brightness", {0})[2] for number in (9, 4, 4, 8)]
    for number, chosen in zip((9, 4, 4, 8), asked, strict=True):
        assert [chosen[i % 2] for i in range(len(PROMPTS))] == chosen_by_reading_all(long, number)


def test_another_campaign_in_the_same_folder_is_read_anew(long: Path, tmp_path: Path) -> None:
    halves.read_with_chosen(long, 5, "brightness", {0})
    long.rename(tmp_path / "earlier")
    campaign = LittleCampaign(long, PROMPTS, seeds=1)
    for number in range(6):
        campaign.add_round(number, np.full((len(PROMPTS), 1), 0.5 - 0.05 * number), images=False)
    assert halves.read_with_chosen(long, 5, "brightness", {0})[2] == (0, 0)
