"""Where each finished round of a campaign stands now: against the base, against the champion, and with people."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d3po_core.errors import D3POError
from d3po_core.evaluation.comparison import Comparison, compare_rows, read_held_out, round_named
from d3po_core.people.human_win_rate import HumanWinRate, human_win_rate
from d3po_core.records import RoundRecord
from d3po_core.store.stages import finished_numbers, finished_round


@dataclass(frozen=True)
class Standing:
    """A finished round beside the campaign's present champion.

    Attributes:
        record: the round.
        champion: the champion's round, 0 for the base.
        against_base: on the same held-out images; None for the base, and if they share no images.
        against_champion: the same; None for the champion itself.
        people: how often people prefer it to the base, seen blind; None if nobody was asked.
        is_recent: whether texts compare it with the champion, which changes; those of an early round stay as they are.
    """

    record: RoundRecord
    champion: int
    against_base: Comparison | None
    against_champion: Comparison | None
    people: HumanWinRate | None
    is_recent: bool = True

    @property
    def is_champion(self) -> bool:
        """Return whether the round is the champion."""
        return self.record.round == self.champion


def standings(
    campaign: Path, rates: list[HumanWinRate], asked: Collection[int], recent: Collection[int]
) -> list[Standing]:
    """Return the standing of the asked rounds, the base and the champion, in order.

    Args:
        campaign: the campaign's folder, with at least one finished round.
        rates: what people preferred in blind comparisons.
        asked: finished rounds.
        recent: those whose texts tell of the champion.
    """
    base, champion = finished_numbers(campaign)[0], round_named(campaign, "champion")
    numbers = sorted({base, champion, *asked})
    records = [finished_round(campaign, number) for number in numbers]
    against_base, against_champion = (_against(campaign, numbers, other) for other in (base, champion))
    return [
        Standing(
            record, champion,
            against_base=against_base.get(record.round), against_champion=against_champion.get(record.round),
            people=human_win_rate(rates, record.round, base) if record.round != base else None,
            is_recent=record.round in recent,
        )
        for record in records
    ]  # fmt: skip


def _against(campaign: Path, numbers: list[int], other: int) -> dict[int, Comparison]:
    """Return each other round's comparison with one round; empty if they do not share prompts, seeds and a scorer."""
    try:
        held_out = read_held_out([(campaign, number) for number in numbers])
    except D3POError:
        return {}
    scores_RI = next(iter(held_out.scores.values()))
    reference_RI = np.broadcast_to(scores_RI[numbers.index(other)], scores_RI.shape)
    compared = dict(zip(numbers, compare_rows(scores_RI, reference_RI, held_out.prompts), strict=True))
    return {number: comparison for number, comparison in compared.items() if number != other}
