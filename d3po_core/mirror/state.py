"""A campaign's notes on its mirror: the address, and the content that both had when they last met."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from d3po_core.config import StoreConfig
from d3po_core.errors import D3POError
from d3po_core.mirror.layout import STAGES, place_of, record_name
from d3po_core.store.files import atomic_path

STATE_FILE = ".mirror.json"
LOCK_FILE = ".mirror.lock"
PUBLISH = STAGES.index("publish")  # the last stage of a round
Place = tuple[int, int]


class DivergedError(D3POError):
    """The folder and the mirror hold different content under one name; nothing was changed."""


@dataclass
class State:
    """What was the same on both sides when they last met.

    Attributes:
        store: the settings of the mirror, for processes that have no configuration, such as the labelling page.
        version: the number of the version that was pushed or pulled last; 0: none.
        files: digests of that version's files.
        records: names of the stages' records known to be the same here, of the rounds after ``whole``.
        whole: the last round of which both sides have everything, and of all rounds before it; -1: none.
    """

    store: dict[str, object] = field(default_factory=dict)
    version: int = 0
    files: dict[str, str] = field(default_factory=dict)
    records: list[str] = field(default_factory=list)
    whole: int = -1

    @property
    def config(self) -> StoreConfig:
        """Return the settings of the mirror."""
        return StoreConfig.model_validate(self.store)

    def knows(self, place: Place) -> bool:
        """Return whether a stage is known to be the same on both sides."""
        return place[0] <= self.whole or record_name(place[0], STAGES[place[1]]) in self.records

    def note(self, place: Place) -> None:
        """Note that a stage is the same on both sides; stages before it must be noted first."""
        self.records.append(record_name(place[0], STAGES[place[1]]))
        if place[1] == PUBLISH:
            self.whole = max(self.whole, place[0])
            self.records = [name for name in self.records if _round_of(name) > self.whole]

    def note_only(self, same: Iterable[Place], lacking: Iterable[Place]) -> None:
        """Note which stages are the same on both sides, and which the mirror lacks; forget what was noted before."""
        known, first = sorted(same), min((number for number, _ in lacking), default=None)
        published = [n for n, order in known if order == PUBLISH and (first is None or n < first)]
        self.whole = max(published, default=-1)
        self.records = [record_name(n, STAGES[order]) for n, order in known if n > self.whole]

    def forget(self, round_number: int) -> None:
        """Forget the stages of a round."""
        self.whole = min(self.whole, round_number - 1)
        self.records = [name for name in self.records if _round_of(name) != round_number]


def read_state(campaign: Path) -> State:
    """Return the state, an empty one if the folder never met a mirror or the file is damaged."""
    try:
        return State(**json.loads((campaign / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return State()  # everything is compared again


def remember_mirror(campaign: Path, store: StoreConfig) -> None:
    """Note the settings of the mirror, for processes that have no configuration."""
    state = read_state(campaign)
    if state.store.get("mirror", store.mirror) != store.mirror:
        state.note_only((), ())  # what another mirror holds says nothing about this one
    state.store = store.model_dump(mode="json")
    write_state(campaign, state)


def write_state(campaign: Path, state: State) -> None:
    """Write the state."""
    with atomic_path(campaign / STATE_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(state)))


def _round_of(name: str) -> int:
    place = place_of(name)
    return place[0] if place else -1
