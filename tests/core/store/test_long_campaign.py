"""What keeps a long campaign fast: a round's file is checked without reading other rounds' lists."""

from pathlib import Path

import pytest

from d3po_core.errors import D3POError
from d3po_core.store.integrity import record_files, require_files


def _row(campaign: Path, number: int) -> str:
    name = f"rounds/round={number}/part.parquet"
    (campaign / name).parent.mkdir(parents=True)
    (campaign / name).write_text(f"row {number}")
    record_files(campaign, number, "publish")
    return name


def test_a_file_is_checked_against_the_lists_of_its_own_round(tmp_path: Path) -> None:
    first, second = _row(tmp_path, 1), _row(tmp_path, 2)
    (tmp_path / "stages" / "round=1" / "publish.files").write_text("damaged")
    require_files(tmp_path, [second])
    with pytest.raises(D3POError, match=r"publish\.files: is damaged"):
        require_files(tmp_path, [first, second])
    (tmp_path / second).write_text("other")
    with pytest.raises(D3POError, match=r"round=2/part\.parquet has"):
        require_files(tmp_path, [second])
