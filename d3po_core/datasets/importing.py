"""Import a data set: shard after shard, then its groups; killed anywhere, the same call does the rest."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from d3po_core.config import CampaignConfig
from d3po_core.datasets.grouping import write_groups
from d3po_core.datasets.shards import ROWS, ShardWriter, known_images, rows_path
from d3po_core.datasets.sources import Source
from d3po_core.datasets.stored import FACTS, REMEDY, one_size
from d3po_core.errors import D3POError
from d3po_core.models.encoding import Encoder
from d3po_core.store.files import atomic_path, exclusive
from d3po_core.store.sealed import read_sealed, sealed

BEGUN = "import.json"


@dataclass(frozen=True)
class Imported:
    """The counts of a finished import.

    Attributes:
        folder: the data set's folder.
        rows: rows of its tables.
        problems: rows that were left out.
        groups: groups that rounds can draw, by kind.
        images: distinct images, each encoded once.
        reused: images of rows that another row had already.
        first_problem: where and why the first row was left out; None if none was.
    """

    folder: Path
    rows: int
    problems: int
    groups: dict[str, int]
    images: int
    reused: int
    first_problem: str | None = None


def import_dataset(
    folder: Path,
    config: CampaignConfig,
    sources: list[Source],
    tell: Callable[[int], None] = lambda rows: None,
    make_encoder: Callable[[], Encoder] | None = None,
) -> Imported:
    """Encode a data set's images and store its groups.

    Args:
        folder: the data set's folder; made if it is new.
        config: its model, ``sample.height``, ``sample.width`` and ``sample.latent_dtype`` are used.
        sources: the tables.
        tell: called with the number of rows of each shard that is made.
        make_encoder: loads the VAE.

    Raises:
        D3POError: another process imports it, it was begun with other tables or another model, a table cannot be read,
            or no row could be used; one line.
    """
    try:
        with exclusive(folder / ".lock", wait=False):
            _begin(folder, config, sources)
            if not (folder / FACTS).exists():
                dtype = getattr(torch, config.sample.latent_dtype)
                make = make_encoder or (lambda: Encoder(config.model, one_size(config)))
                _write_shards(folder, ShardWriter(folder, make, dtype, known_images(folder)), sources, tell)
                write_groups(folder, config, sources)
    except BlockingIOError:
        raise D3POError(
            f"{folder}: another process imports this data set; wait for it, or use another --name"
        ) from None
    facts = read_sealed(folder / FACTS, REMEDY)
    return Imported(folder, **{name: facts[name] for name in ("rows", "problems", "groups", "images", "reused",
                                                              "first_problem")})  # fmt: skip


def _write_shards(folder: Path, writer: ShardWriter, sources: list[Source], tell: Callable[[int], None]) -> None:
    for leftover in folder.rglob(".*.tmp"):  # of a killed import; this one holds the lock
        leftover.unlink()
    for number, source in enumerate(sources):

        def finished(first: int, number: int = number) -> bool:
            return rows_path(folder, number, first).exists()

        for first, rows in source.chunks(ROWS, finished):
            writer.write(source, number, first, rows)
            tell(len(rows))
            rows.clear()  # before the next rows are read


def _begin(folder: Path, config: CampaignConfig, sources: list[Source]) -> None:
    """Note what the import begins with, or check that it is the same.

    Raises:
        D3POError: it is not.
    """
    plan = {
        "files": [
            {"name": source.path.name, "bytes": source.path.stat().st_size, "layout": source.layout.name,
             "columns": source.renamed}
            for source in sources
        ],
        "model": config.model.path, "size": list(one_size(config) or ()) or None,
        "latent_dtype": config.sample.latent_dtype, "rows": ROWS,
    }  # fmt: skip
    path = folder / BEGUN
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(sealed(plan))
        return
    begun = read_sealed(path, REMEDY)
    changed = [name for name in plan if plan[name] != begun.get(name)]
    if changed:
        name = changed[0]
        raise D3POError(
            f"data set {folder.name!r} was begun with {name} {json.dumps(begun.get(name))} (now "
            f"{json.dumps(plan[name])}); set it back, choose another --name, or remove {folder}"
        )
