"""Blind comparisons of held-out images on the labelling page; no run waits for their answers."""

from pathlib import Path

from d3po_core.errors import D3POError
from d3po_core.page.completion import Completion, OnComplete
from d3po_core.page.desk import Desk, GoneError, described
from d3po_core.people.blind import FOLDER, BlindComparison, comparison_deck, comparisons_of, title_of
from d3po_core.people.journal import Journal
from d3po_core.people.tally import Deck


def desk_name(campaign: Path, comparison: BlindComparison) -> str:
    """Return the comparison's name in addresses; no campaign can have the same name."""
    return f"{campaign.name}~{comparison.id}"


class ComparisonDesk(Desk):
    """A desk for one comparison; no answer reaches a round, and even the last can be taken back.

    Args:
        campaign: the campaign's folder.
        comparison_id: the comparison.
        on_complete: called in the background with (campaign's name, round number) when every pair has its raters;
            called again if an answer is taken back or pairs are added, and then every pair has its raters again.
        retry_seconds: pause after ``on_complete`` raised.
    """

    blind = True
    final = False

    def __init__(
        self, campaign: Path, comparison_id: str, on_complete: OnComplete, retry_seconds: float = 10.0
    ) -> None:
        super().__init__(campaign, on_complete, retry_seconds=retry_seconds)
        # Use a separate lock: waking a run must not wait for reports about a comparison.
        self._completion = Completion(campaign, on_complete, retry_seconds, lock=f"{FOLDER}/.told.lock")
        self._id, self._round = comparison_id, 0
        self.title = title_of(comparison_id)

    def _comparison(self) -> BlindComparison:
        for comparison in comparisons_of(self.campaign):
            if comparison.id == self._id:
                return comparison
        raise D3POError(f"this comparison is no longer in {self.campaign}; restore the files of its comparisons")

    def _look(self) -> None:
        """Follow the comparison on disk: added pairs and raters, removed images."""
        try:
            comparison = self._comparison()
            pairs = comparison.pairs
            there = [number for number, pair in enumerate(pairs) if pair.on_disk(self.campaign)]
            stamp = (comparison, there)
            if stamp == self._stamp:
                return
            if not there:
                raise D3POError("nothing can be shown: the images of this comparison are no longer on disk")
            self._journal = self._journal or Journal(self.campaign)
            self._open(comparison_deck(self.campaign, comparison, there))
        except Exception as error:  # show it, and look again later
            self._deck, self._stamp, self._problem = None, None, described(error)
            return
        gone = len(pairs) - len(there)
        self._stamp, self._round = stamp, comparison.round
        self._problem = f"{gone} of {len(pairs)} pairs are not asked: images were removed from disk" if gone else None

    def _tell(self, deck: Deck) -> None:
        assert self._journal is not None
        self._completion.begin(self._journal, f"{deck.sampling}@{self._tally.last_seq}", self._round)

    def _check_there(self, deck: Deck) -> None:
        """Do nothing: an answer is worth keeping even if its images are gone."""

    def _late_note(self, deck: Deck) -> str:
        return "Kept, although it is no longer asked."

    def _earlier(self, number: int, sampling: str, mode: str) -> Deck:
        """Return all pairs, including those whose images were removed while somebody looked at them."""
        if sampling != self._id:
            raise GoneError("this page is out of date; reload it")
        with self._lock:
            self._journal = self._journal or Journal(self.campaign)
        return comparison_deck(self.campaign, self._comparison())
