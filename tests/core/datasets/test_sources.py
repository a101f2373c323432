"""Tables and images of data sets: what is read, in what order, and how little of it at once."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from d3po_core.datasets import sources
from d3po_core.datasets.layouts import RowError
from d3po_core.datasets.pictures import file_bytes, fitted
from d3po_core.datasets.sources import find_sources
from d3po_core.errors import D3POError

ROWS = [{"image": f"{n}.png", "score": float(n), "prompt": f"prompt {n}"} for n in range(10)]


def written(folder: Path, kind: str) -> Path:
    path = folder / f"metadata.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=4)
    elif kind == "csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        path.write_text(json.dumps(ROWS) if kind == "json" else "\n".join(map(json.dumps, ROWS)))
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
def test_rows_come_in_order_from_every_kind_of_table(kind: str, tmp_path: Path) -> None:
    (source,) = find_sources([written(tmp_path, kind).parent], None, {})
    chunks = list(source.chunks(3, lambda first: False))
    assert [first + place for first, rows in chunks for place in range(len(rows))] == list(range(10))
    assert max(len(rows) for _, rows in chunks) == 3
    entries = [source.layout.read(row, source.columns) for _, rows in chunks for row in rows]
    assert [(entry.images[0], entry.values[0], entry.prompt) for entry in entries] == [
        (row["image"], row["score"], row["prompt"]) for row in ROWS
    ]
    left = [first for first, _ in source.chunks(3, lambda first: first in (0, 3))]
    assert left == [first for first, _ in chunks if first not in (0, 3)]


def test_row_groups_that_are_finished_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Spy(pq.ParquetFile):
        def iter_batches(self, size: int, row_groups: list[int], columns: list[str]) -> Any:
            read.extend(row_groups)
            assert columns == ["image", "score", "prompt"]
            return super().iter_batches(size, row_groups=row_groups, columns=columns)

    (source,) = find_sources([written(tmp_path, "parquet")], None, {})
    monkeypatch.setattr(sources.pq, "ParquetFile", Spy)
    assert [first for first, _ in source.chunks(2, lambda first: first < 6)] == [6, 8]
    assert read == [1, 2]


def test_the_tables_of_a_folder_come_before_those_below_and_parquet_before_text(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for kind in ("parquet", "csv"):
        written(tmp_path / "below", kind)
    assert [source.path.name for source in find_sources([tmp_path], None, {})] == ["metadata.parquet"]
    written(tmp_path, "csv")
    assert [source.path for source in find_sources([tmp_path], None, {})] == [tmp_path / "metadata.csv"]


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("picture,stars,words\na.png,4.5,a cat\n")
    with pytest.raises(D3POError, match=r"mine.csv: has the columns picture, stars, words; expected"):
        find_sources([path], None, {})
    (source,) = find_sources([path], None, {"image": "picture", "score": "stars", "prompt": "words"})
    ((_, rows),) = source.chunks(9, lambda first: False)
    assert source.layout.read(rows[0], source.columns).values == (4.5,)


def test_paths_without_a_table_are_one_line(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "holds no such file"), (tmp_path / "gone", "does not exist")):
        with pytest.raises(D3POError, match=rf"{why}; expected a table \(.parquet, .jsonl"):
            find_sources([path], None, {})
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(D3POError, match=r"cut.parquet: cannot be read .* is the file whole\?"):
        find_sources([tmp_path], None, {})


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def test_an_image_of_the_models_size_stays_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    assert np.array_equal(fitted(encoded(pixels), 8, 12), pixels)


@pytest.mark.parametrize(("height", "width"), [(20, 40), (60, 20)])
def test_the_shorter_side_fits_and_the_middle_is_kept(height: int, width: int) -> None:
    """Thirds of red, green and blue along the longer side: the middle square is green alone, if that is a third."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for colour, part in enumerate(np.array_split(np.arange(max(height, width)), 3)):
        pixels[(slice(None), part) if width > height else (part, slice(None))] = np.eye(3, dtype=np.uint8)[colour] * 255
    square = fitted(encoded(pixels), 10, 10)
    assert square.shape == (10, 10, 3)
    middle = square[2:8, 4:6] if width > height else square[2:8, 2:8]
    assert (middle[..., 1] > 250).all()
    assert (middle[..., [0, 2]] < 5).all()


def test_what_is_no_image_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    assert file_bytes("a.png", tmp_path) == file_bytes({"bytes": None, "path": "a.png"}, tmp_path) == b"x"
    for cell, why in (
        ("b.png", "image b.png cannot be read .No such file"), (None, "has no image"), (b"", "has no image"),
        ("https://example.org/a.png", "is an address; download the images first"), ("a\0", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(RowError, match=why):
            file_bytes(cell, tmp_path)
    for data in (b"x", encoded(np.zeros((9, 9, 3), np.uint8))[:40]):
        with pytest.raises(RowError, match="holds no readable image"):
            fitted(data, 8, 8)


def test_a_long_field_is_read_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    text = "x" * (limit + 1)
    (tmp_path / "long.csv").write_text(f"image_w,image_l,caption\na.png,b.png,{text}\n")
    (source,) = find_sources([tmp_path / "long.csv"], None, {})
    ((_, (row,)),) = source.chunks(3, lambda first: False)
    assert row["caption"] == text
    assert csv.field_size_limit() == limit
