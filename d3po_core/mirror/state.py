"""A campaign's notes on its mirror: the address, and the content that both had when they last met."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from d3po_core.config import StoreConfig
from d3po_core.errors import D3POError
from d3po_core.store.files import atomic_path

STATE_FILE = ".mirror.json"
LOCK_FILE = ".mirror.lock"


class DivergedError(D3POError):
    """The folder and the mirror hold different content under one name; nothing was changed."""


@dataclass
class State:
    """What was the same on both sides when they last met.

    Attributes:
        store: the settings of the mirror, for processes that have no configuration, such as the labelling page.
        version: the number of the version that was pushed or pulled last; 0: none.
        files: digests of that version's files.
        records: names of the stages' records known to be the same here.
    """

    store: dict[str, object] = field(default_factory=dict)
    version: int = 0
    files: dict[str, str] = field(default_factory=dict)
    records: list[str] = field(default_factory=list)

    @property
    def config(self) -> StoreConfig:
        """Return the settings of the mirror."""
        return StoreConfig.model_validate(self.store)


def read_state(campaign: Path) -> State:
    """Return the state, an empty one if the folder never met a mirror or the file is damaged."""
    try:
        return State(**json.loads((campaign / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return State()  # everything is compared again


def remember_mirror(campaign: Path, store: StoreConfig) -> None:
    """Note the settings of the mirror, for processes that have no configuration."""
    state = read_state(campaign)
    state.store = store.model_dump(mode="json")
    write_state(campaign, state)


def write_state(campaign: Path, state: State) -> None:
    """Write the state."""
    with atomic_path(campaign / STATE_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(state)))
