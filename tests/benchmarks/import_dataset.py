"""Rate and memory of importing a data set of pairs, each size in a process of its own.

python tests/benchmarks/import_dataset.py [--pairs 2000 8000] [--side 80]
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.common import RESULTS, machine, write_json

ROW_GROUP = 100


def main() -> None:
    """Make a table per size, import it, print rates and peaks, and write JSON. Called by itself with ``--step``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2000, 8000], help="pairs of each table (2000 8000)")
    parser.add_argument("--side", type=int, default=80, help="pixels per side of its images (80)")
    parser.add_argument("--model", default="data/shapes/model", help="model whose VAE encodes (the embedded one)")
    parser.add_argument("--output", type=Path, default=RESULTS / "import_dataset.json", help="JSON file")
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(_measure(arguments.step, arguments.model)))
        return
    before, results = machine(), []
    table = Table(title=f"pairs of images of {arguments.side} x {arguments.side} pixels")
    for column in ("pairs", "images", "table MB", "seconds", "pairs/s", "peak MB", "before the first row MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for pairs in arguments.pairs:
        with tempfile.TemporaryDirectory(prefix="d3po-dataset-") as folder:
            megabytes = _make(Path(folder) / "pairs.parquet", pairs, arguments.side)
            command = [sys.executable, __file__, "--step", folder, "--model", arguments.model]
            found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        results.append({"pairs": pairs, "megabytes": megabytes, **found})
        table.add_row(
            f"{pairs:,}", f"{found['images']:,}", f"{megabytes:.0f}", f"{found['seconds']:.1f}",
            f"{pairs / found['seconds']:.1f}", f"{found['peak_mb']:.0f}", f"{found['first_mb']:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)
    settings = {"pairs": arguments.pairs, "side": arguments.side, "model": arguments.model}
    write_json(arguments.output, settings, before, {"imports": results})


def _make(path: Path, pairs: int, side: int) -> float:
    """Write a table of pairs of noise in Pick-a-Pic's columns, every tenth image in two pairs; return its megabytes."""
    generator = np.random.default_rng(0)
    schema = pa.schema(
        [("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("caption", pa.string())]
    )
    last = _image(generator, side)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, pairs, ROW_GROUP):
            rows = []
            for row in range(start, min(start + ROW_GROUP, pairs)):
                first = last if row % 5 == 0 else _image(generator, side)
                last = _image(generator, side)
                label = (1.0, 0.0, 0.5)[row % 3]
                rows.append({"jpg_0": first, "jpg_1": last, "label_0": label, "caption": f"prompt {row % 100}"})
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return path.stat().st_size / 1e6


def _image(generator: np.random.Generator, side: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def _measure(folder: Path, model: str) -> dict[str, Any]:
    from d3po_core.config_values import load_config
    from d3po_core.datasets.importing import import_dataset
    from d3po_core.datasets.sources import find_sources
    from d3po_core.models.encoding import Encoder

    config = load_config({"model": {"path": model}}, "benchmark")
    encoder = Encoder(config.model)
    encoder(np.zeros((8, encoder.height, encoder.width, 3), np.uint8))
    first, started = _peak(), time.perf_counter()
    found = import_dataset(
        folder / "set", config, find_sources([folder / "pairs.parquet"], None, {}), make_encoder=lambda: encoder
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "images": found.images, "first_mb": first, "peak_mb": _peak()}


def _peak() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    main()
