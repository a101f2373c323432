"""All that people may judge: the desks of campaigns and blind comparisons; a damaged one does not stop the others."""

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from starlette.exceptions import HTTPException

from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.page.comparing import desk_name
from d3po_core.page.desk import Desk, described
from d3po_core.people.blind import comparisons_of
from d3po_core.people.tally import Deck
from d3po_core.store.campaign import CAMPAIGN_FILE

# The same words for a campaign that is not there and one that the rater may not judge.
NO_CAMPAIGN = "There is no such campaign here, or you may no longer judge it."
MakeDesk = Callable[[Path, str | None], Desk]


class Listed(NamedTuple):
    """An item that people may judge, or the reason why it cannot be shown."""

    name: str
    desk: Desk | None
    problem: str | None = None


class Desks:
    """All desks, created on demand; threads may share them.

    Args:
        runs: the folder of the campaigns.
        make_desk: makes the desk of a campaign's folder, or of a comparison (its id) in it.
    """

    def __init__(self, runs: Path, make_desk: MakeDesk) -> None:
        self.runs, self._make_desk, self.problem = runs, make_desk, ""
        self._desks: dict[str, Desk] = {}
        self._lock = threading.Lock()

    def open(self) -> list[Desk]:
        """The desks created so far."""
        with self._lock:
            return list(self._desks.values())

    def listed(self) -> list[Listed]:
        """Campaigns judged by people, and blind comparisons; a damaged one is listed with its problem."""
        folders = [path.parent for path in sorted(self.runs.glob(f"*/{CAMPAIGN_FILE}"))]
        found = [one for folder in folders for one in self._tried(folder, self._campaign)]
        return found + [one for folder in folders for one in self._tried(folder, self._compared)]

    def _tried(self, folder: Path, listing: Callable[[Path], list[Listed]]) -> list[Listed]:
        try:
            return listing(folder)
        except Exception as error:  # whatever the damage, the other campaigns go on
            return [Listed(folder.name, None, described(error))]

    def _campaign(self, folder: Path) -> list[Listed]:
        path = folder / CAMPAIGN_FILE
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            raise D3POError(f"{path} is not the record of a campaign; restore it")
        desk = self.desk(folder.name)
        asks = load_config(record["config"], str(path)).judge.labeller != "proxy" or desk.current()
        return [Listed(folder.name, desk)] if asks else []

    def _compared(self, folder: Path) -> list[Listed]:
        names = [desk_name(folder, one) for one in comparisons_of(folder)]
        return [Listed(name, self.desk(name)) for name in names]

    def watch(self) -> None:
        """Check whether rounds are complete; an error is shown and stops nothing."""
        try:
            for one in self.listed():
                with contextlib.suppress(Exception):  # the desk shows it to every visitor
                    if one.desk is not None:
                        one.desk.current()
            self.problem = ""
        except Exception as error:
            self.problem = f"rounds are not watched at the moment: {described(error)}"

    def decks(self) -> list[Deck]:
        """The current decks of the desks created so far, without the damaged ones."""
        found = []
        for desk in self.open():
            with contextlib.suppress(Exception):  # the desk shows it to every visitor
                found.append(desk.current())
        return [deck for deck in found if deck is not None]

    def _comparisons(self) -> dict[str, tuple[Path, str]]:
        found: dict[str, tuple[Path, str]] = {}
        for path in sorted(self.runs.glob(f"*/{CAMPAIGN_FILE}")):
            with contextlib.suppress(D3POError):
                found |= {desk_name(path.parent, one): (path.parent, one.id) for one in comparisons_of(path.parent)}
        return found

    def desk(self, name: str) -> Desk:
        """The desk of that name.

        Raises:
            HTTPException: 404, if there is none.
        """
        with self._lock:
            if name not in self._desks:
                # Compare the name with existing ones; never join it to a path.
                there: dict[str, tuple[Path, str | None]] = {
                    path.parent.name: (path.parent, None) for path in self.runs.glob(f"*/{CAMPAIGN_FILE}")
                }
                there |= self._comparisons() if "~" in name else {}
                if name not in there:
                    raise HTTPException(404, NO_CAMPAIGN)
                self._desks[name] = self._make_desk(*there[name])
            return self._desks[name]
