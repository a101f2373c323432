"""Export a campaign's preferences for Diffusion-DPO trainers: Parquet with the images in it, and a card.

The columns are those of Pick-a-Pic v2 that such trainers read, plus our own. ``jpg_0`` and ``jpg_1`` hold the bytes of
the image files, which trainers decode. The card's configuration ``images`` shows the same files decoded. The names of
raters are not exported.

Source: columns and types of https://huggingface.co/datasets/yuvalkirstain/pickapic_v1 and _v2.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from d3po_core.errors import D3POError
from d3po_core.export.cards import card
from d3po_core.image_ids import IMPORTED_FILE
from d3po_core.queries.views import connect_views
from d3po_core.seeds import derive_seed
from d3po_core.store.files import new_folder
from d3po_core.store.integrity import require_files

SHARD_BYTES = 400_000_000
ROW_GROUP = 100
IMAGES = ("jpg_0", "jpg_1")

_text, _real, _int, _bool = pa.string(), pa.float64(), pa.int64(), pa.bool_()
COLUMNS: dict[str, pa.DataType] = {
    "jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": _real, "label_1": _real, "caption": _text,
    "are_different": _bool, "has_label": _bool, "image_0_uid": _text, "image_1_uid": _text, "best_image_uid": _text,
    "model_0": _text, "model_1": _text, "ranking_id": _int, "round": _int, "pair_id": _text, "group_id": _text,
    "weight": _real, "agreement": _real, "num_raters": _int, "people_for": _int, "people_against": _int,
    "proxies_for": _int, "proxies_against": _int, "height": _int, "width": _int,
}  # fmt: skip
_HUB_NAMES = {pa.binary(): "binary", _text: "string", _real: "float64", _int: "int64", _bool: "bool"}


_PAIRS = f"""
SELECT pairs.*, brought.group_id IS NOT NULL AS imported FROM pairs
LEFT JOIN (
    SELECT DISTINCT round, group_id FROM samples WHERE contains(trajectory_path, '/{IMPORTED_FILE}')
) brought ON brought.round = pairs.round AND brought.group_id = pairs.group_id
ORDER BY pairs.round, pair_id
"""


def export_preferences(campaign: Path, output: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write all preferences of a campaign as a folder that ``datasets.load_dataset`` reads.

    Args:
        campaign: the campaign's folder.
        output: the folder to make; it may exist if it is empty.
        shard_bytes: the most bytes of images per Parquet file, unless a single pair has more.

    Returns:
        The number of pairs.

    Raises:
        D3POError: ``output`` is not empty, there are no preferences, or some of their images are gone.
    """
    with connect_views(campaign) as connection:
        pairs = _pairs(connection)
    if not pairs:
        raise D3POError(f"campaign {campaign.name!r} has no preferences yet; run a round first")
    images = {pair[side] for pair in pairs for side in ("winner_image", "loser_image")}
    gone = sorted(path for path in images if not (campaign / path).is_file())
    if gone:
        raise D3POError(f"{campaign}: {len(gone)} images of the pairs are gone ({gone[0]} first); restore them")
    require_files(campaign, images)
    with new_folder(output) as folder:
        num_bytes = _write_shards(campaign, pairs, folder / "data", shard_bytes)
        download = sum(file.stat().st_size for file in (folder / "data").iterdir())
        (folder / "README.md").write_text(_card(campaign.name, pairs, num_bytes, download))
    return len(pairs)


def _pairs(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    return connection.sql(_PAIRS).to_arrow_table().to_pylist()


def _row(campaign: Path, index: int, pair: dict[str, Any]) -> dict[str, Any]:
    sides = [("winner", 1.0), ("loser", 0.0)]
    # The order is random so that a trainer cannot learn from it, but the same at every export.
    if derive_seed(pair["pair_id"], "side") % 2:
        sides.reverse()
    model = "data set" if pair["imported"] else pair["checkpoint"] or "base"
    row = {
        "caption": pair["prompt"], "are_different": True, "has_label": True, "best_image_uid": pair["winner_id"],
        "model_0": model, "model_1": model, "ranking_id": index,
    }  # fmt: skip
    for place, (side, label) in enumerate(sides):
        row[f"jpg_{place}"] = (campaign / pair[f"{side}_image"]).read_bytes()
        row[f"label_{place}"] = label
        row[f"image_{place}_uid"] = pair[f"{side}_id"]
    return row | {name: pair[name] for name in COLUMNS if name not in row}


def _write_shards(campaign: Path, pairs: list[dict[str, Any]], folder: Path, shard_bytes: int) -> int:
    """Write files of bounded size, with few rows in memory; return the bytes of images and captions."""
    folder.mkdir()
    total = 0
    schema = pa.schema(list(COLUMNS.items()), metadata={"huggingface": json.dumps({"info": {"features": _features()}})})
    shards = list(_shards(campaign, pairs, shard_bytes))
    for number, (low, high) in enumerate(shards):
        path = folder / f"train-{number:05d}-of-{len(shards):05d}.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for start in range(low, high, ROW_GROUP):
                rows = [_row(campaign, index, pairs[index]) for index in range(start, min(start + ROW_GROUP, high))]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                total += sum(len(row[name]) for row in rows for name in (*IMAGES, "caption"))
    return total


def _shards(campaign: Path, pairs: list[dict[str, Any]], shard_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield each file's first pair and the one after its last, with at most ``shard_bytes`` of images."""
    start, held = 0, 0
    for index, pair in enumerate(pairs):
        size = sum((campaign / pair[side]).stat().st_size for side in ("winner_image", "loser_image"))
        if index > start and held + size > shard_bytes:
            yield start, index
            start, held = index, 0
        held += size
    yield start, len(pairs)


def _features() -> dict[str, dict[str, str]]:
    return {name: {"dtype": _HUB_NAMES[kind], "_type": "Value"} for name, kind in COLUMNS.items()}


def _card(name: str, pairs: list[dict[str, Any]], num_bytes: int, download: int) -> str:
    def info(config: str, images: str) -> dict[str, Any]:
        names = {column: images if column in IMAGES else _HUB_NAMES[kind] for column, kind in COLUMNS.items()}
        return {
            "config_name": config,
            "features": [{"name": column, "dtype": dtype} for column, dtype in names.items()],
            "splits": [{"name": "train", "num_bytes": num_bytes, "num_examples": len(pairs)}],
            "download_size": download,
            "dataset_size": num_bytes,
        }

    def files(config: str) -> dict[str, Any]:
        return {"config_name": config, "data_files": [{"split": "train", "path": "data/train-*"}]}

    header = {
        "pretty_name": f"Preferences of the D3PO campaign {name}",
        "task_categories": ["text-to-image"],
        "tags": ["d3po", "dpo", "preferences"],
        "configs": [
            {**files("default"), "default": True},
            files("images"),
        ],
        "dataset_info": [info("default", "binary"), info("images", "image")],
    }
    own = [pair for pair in pairs if not pair["imported"]]
    people = sum(pair["people_for"] + pair["people_against"] + pair["people_tied"] > 0 for pair in own)
    brought = f" {len(pairs) - len(own)} pairs came with a data set, which judged them too." if own != pairs else ""
    return card(header, _BODY.format(
        name=name, pairs=len(pairs), groups=len({pair["group_id"] for pair in pairs}), people=people, brought=brought,
        prompts=len({pair["prompt"] for pair in pairs}), first=pairs[0]["round"], last=pairs[-1]["round"],
    ))  # fmt: skip


_BODY = """
# Preferences of the D3PO campaign {name}

{pairs} pairs of images in {groups} groups, of {prompts} prompts, from rounds {first} to {last}. People voted on
{people} of the pairs; proxy scorers, which are programs, decided the others. Both images of a pair were drawn by the
same checkpoint from one prompt.{brought} Ties are left out.

```python
from datasets import load_dataset

pairs = load_dataset("FOLDER", split="train")  # images as the bytes that trainers of Diffusion-DPO decode
pairs = load_dataset("FOLDER", "images", split="train")  # images decoded, to look at
```

| column | what it holds |
|---|---|
| `jpg_0`, `jpg_1` | the two images: content of a PNG file, whatever the column's name says |
| `label_0`, `label_1` | 1.0 for the preferred image, 0.0 for the other; which stands first is random |
| `caption` | the prompt |
| `image_0_uid`, `image_1_uid`, `best_image_uid` | ids of the images, and of the preferred one |
| `model_0`, `model_1` | the checkpoint that drew both, or `data set` if they came from one |
| `weight`, `agreement` | weight of the pair in training, and share of its raters that agree: above 0, at most 1 |
| `num_raters` | raters who voted on the pair |
| `people_for`, `people_against`, `proxies_for`, `proxies_against` | votes for and against the preferred image |
| `height`, `width` | size of both images in pixels; null in rounds of earlier versions |
| `round`, `pair_id`, `group_id`, `ranking_id` | where the pair comes from |
| `are_different`, `has_label` | true for all pairs; some trainers filter by them |
"""
