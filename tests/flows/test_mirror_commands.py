"""The commands on a mirror: what they print, and that they leave Prefect's settings alone."""

import sys
from functools import partial
from pathlib import Path

import pytest

from d3po.flows.commands.line import app
from d3po_core.errors import D3POError
from tests.core.mirror.campaigns import Machine
from tests.flows import typing_commands


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A campaign in the data folder."""
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "data"))
    (tmp_path / "m").mkdir()
    machine = Machine(tmp_path / "data" / "runs", f"file://{tmp_path / 'm'}")
    machine.begin()
    machine.sample()
    return machine


typed = partial(typing_commands.typed, app)


def test_pushed_campaign_is_pulled_elsewhere(there: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = f"file://{tmp_path / 'm'}"
    assert "put 2 stages" in typed("push", "c", "--to", mirror)
    assert "put no new stage" in typed("push", "c"), "the folder knows its mirror now"
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "elsewhere"))
    assert "campaign c: 2 stages" in typed("pull", f"{mirror}/c")
    found = (tmp_path / "elsewhere" / "runs" / "c" / "samples/round=1/part.parquet").read_text()
    assert found == "sampled"
    status = typed("mirror", "status", f"{mirror}/c", "--json")
    assert '"stages": 2' in status
    assert '"missing_there": 0' in status
    assert '"writer": null' in status


def test_campaign_that_is_not_there_makes_no_folder(there: Machine, tmp_path: Path) -> None:
    with pytest.raises(D3POError, match="holds no campaign"):
        typed("pull", f"file://{tmp_path / 'm'}/other")
    assert not (tmp_path / "data/runs/other").exists()


def test_pulling_imports_no_prefect() -> None:
    """``d3po run --from`` pulls before it tells Prefect which server to use, and Prefect reads that once."""
    import subprocess

    code = (
        "import sys, d3po.flows.commands.mirror as m, d3po_core.mirror.pulling, d3po_core.mirror.opening\n"
        "try: m.pulled_line(m.config_at('file:///nowhere/c'))\n"
        "except ValueError: pass\n"
        "sys.exit('prefect' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
