"""Each rater's share of a round: the questions that quotas and the split of groups let a rater answer."""

from collections.abc import Iterable, Mapping

import numpy as np

from d3po_core.people.invitations import OPEN, Invitations
from d3po_core.people.tally import ANSWERED, Tally


class Shares:
    """What raters may be asked of a deck.

    Args:
        tally: who has judged what.
        invitations: the campaign's.
        split: groups by rater; None lets everybody judge every group.
    """

    def __init__(
        self, tally: Tally, invitations: Invitations = OPEN, split: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        self._tally, self._invitations, self._deck = tally, invitations, tally.deck
        self._ids_G = group_ids(tally)
        self._dealt = None if split is None else {name: np.isin(self._ids_G, list(ids)) for name, ids in split.items()}

    def limited(self, rater: str) -> bool:
        """Return whether the rater has a quota or a part of the split."""
        return self._dealt is not None or self._invitations.quota(rater) is not None

    def dealt(self, rater: str) -> int | None:
        """Number of groups that the split gives the rater, None without a split."""
        if self._dealt is None:
            return None
        return int(self._dealt[rater].sum()) if rater in self._dealt else 0

    def mask(self, rater: str) -> np.ndarray:
        """[Q] whether the rater may be asked a question; groups that hold only gold are always allowed."""
        allowed_G = np.ones(int(self._deck.group_of.max(initial=-1)) + 1, bool)
        allowed_G[: self._deck.num_groups] = self._groups(rater)
        return allowed_G[self._deck.group_of]

    def exhausted(self, rater: str, index: int) -> bool:
        """Return whether the question would begin a group beyond the rater's quota."""
        group, quota = self._deck.group_of[index], self._invitations.quota(rater)
        if quota is None or group >= self._deck.num_groups:
            return False
        begun_G = begun(self._tally, rater)
        return bool(begun_G.sum() >= quota and not begun_G[group])

    def left(self, rater: str) -> int:
        """Groups that still need raters and that this rater may be asked."""
        open_Q = self._tally.open_questions() & self.mask(rater) & (self._tally.status(rater) != ANSWERED)
        groups = len(np.unique(self._deck.group_of[open_Q]))
        quota = self._invitations.quota(rater)
        if quota is None:
            return groups
        begun_G = begun(self._tally, rater)
        open_begun = int(np.isin(np.flatnonzero(begun_G), self._deck.group_of[open_Q]).sum())
        return open_begun + min(groups - open_begun, max(quota - int(begun_G.sum()), 0))

    def steps(self, rater: str) -> tuple[int, int]:
        """Answers given and asked, as the rater's page counts them; see ``Tally.steps``."""
        if not self.limited(rater):
            return self._tally.steps(rater)
        deck, quota = self._deck, self._invitations.quota(rater)
        mine_Q, done_Q = deck.group_of < deck.num_groups, self._tally.status(rater) == ANSWERED
        mine_G = self._groups(rater) | begun(self._tally, rater)
        sizes = np.bincount(deck.group_of[mine_Q], minlength=deck.num_groups)[mine_G]
        asked = int(np.sort(sizes)[::-1][:quota].sum())
        gold_Q = deck.gold & ~mine_Q
        given = int(done_Q[mine_Q | gold_Q].sum())
        return given, max(asked + int(gold_Q.sum()), given)

    def _groups(self, rater: str) -> np.ndarray:
        """[G] groups for people that the rater may judge."""
        deck = self._deck
        allowed_G = np.ones(deck.num_groups, bool)
        if self._dealt is not None:
            allowed_G = self._dealt.get(rater, np.zeros(deck.num_groups, bool)).copy()
        quota = self._invitations.quota(rater)
        if quota is not None and (begun_G := begun(self._tally, rater)).sum() >= quota:
            allowed_G &= begun_G
        return allowed_G


def group_ids(tally: Tally) -> np.ndarray:
    """[G] ids of the groups for people."""
    deck = tally.deck
    ids = [""] * deck.num_groups
    for question, group in zip(deck.questions, deck.group_of, strict=True):
        if group < deck.num_groups:
            ids[group] = question.group_id
    return np.array(ids, str)


def begun(tally: Tally, rater: str) -> np.ndarray:
    """[G] groups for people of which the rater has finished a question."""
    deck = tally.deck
    done = deck.group_of[(tally.status(rater) == ANSWERED) & (deck.group_of < deck.num_groups)]
    return np.bincount(done, minlength=deck.num_groups) > 0
