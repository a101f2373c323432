"""Two kinds of jobs, the computing part of a round's stages, done in this process or on several workers.

A ``QueueJob`` consists of items that need nothing of each other, such as shards of images: whoever is free takes the
next. A ``GangJob`` needs all its members at once, as training does. Both read a campaign's folder. What they make goes
through ``keep`` on the run's own machine, the only one that writes the campaign. A job that was stopped anywhere and
runs again ends as if it had not been stopped.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from d3po_core.config import CampaignConfig

Tell = Callable[[int], None]
# Contents by path in the campaign's folder, in the order of writing.
Files = dict[str, Any]
Keep = Callable[[CampaignConfig, int, Files], None]


@dataclass(frozen=True)
class Made:
    """One finished item.

    Attributes:
        item: the item.
        units: the number of units to report as done.
        files: what to keep of it.
        result: what ``finish`` needs of it; fits into JSON.
    """

    item: int
    units: int
    files: Files = field(default_factory=dict)
    result: Any = None


@dataclass(frozen=True)
class QueueJob:
    """Independent work; see the module's description.

    Attributes:
        name: where workers import it from, ``module:NAME``.
        items: the items still to do, by number, in order; asked on the run's machine.
        needs: the campaign's files that a worker reads, by path in the campaign's folder.
        inputs: the settings that name files which a worker reads, such as ``sample.prompts``.
        make: does items as they come and yields them in the same order. An item None means that no other is there yet.
        keep: writes an item's files into the campaign.
        finish: makes the job's result from those of the items, which come in the items' order.
    """

    name: str
    items: Callable[[CampaignConfig, int], list[int]]
    needs: Callable[[CampaignConfig, int], list[str]]
    inputs: tuple[str, ...]
    make: Callable[[CampaignConfig, int, Iterable[int | None]], Iterator[Made]]
    keep: Keep
    finish: Callable[[list[Any]], Any]

    def alone(self, config: CampaignConfig, round_number: int, tell: Tell) -> Any:
        """Do all items in this process and return the job's result."""
        results = []
        for made in self.make(config, round_number, self.items(config, round_number)):
            self.keep(config, round_number, made.files)
            results.append(made.result)
            tell(made.units)
        return self.finish(results)


@dataclass(frozen=True)
class GangJob:
    """Work that all members do together; see the module's description.

    Attributes:
        name: where workers import it from, ``module:NAME``.
        needs: as in QueueJob.
        run: does this process's share; its last argument is called with the paths of the folders and files that it has
            just written whole. The first member's result counts, and fits into JSON.
        keep: writes such files into the campaign.
    """

    name: str
    needs: Callable[[CampaignConfig, int], list[str]]
    run: Callable[[CampaignConfig, int, Tell, Callable[[list[str]], None]], Any]
    keep: Keep

    def alone(self, config: CampaignConfig, round_number: int, tell: Tell) -> Any:
        """Do the whole job in this process and return its result."""
        return self.run(config, round_number, tell, lambda paths: None)


Job = QueueJob | GangJob
