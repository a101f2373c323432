"""Reading a mirrored campaign: the same answers as from its folder, and only what is needed is fetched."""

import hashlib
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import d3po
from d3po.flows.commands.line import app
from d3po_core.config import StoreConfig
from d3po_core.errors import D3POError
from d3po_core.mirror import reading
from d3po_core.mirror.lease import Lease
from d3po_core.mirror.objects import Objects, open_objects
from d3po_core.mirror.putting import forget_round, put_campaign
from d3po_core.store import at_hand
from d3po_core.store.integrity import record_files
from d3po_core.store.stages import finish_stage
from tests.core.little_campaign import LittleCampaign
from tests.core.mirror.campaigns import RECORD
from tests.core.mirror.conftest import s3, s3_address  # noqa: F401
from tests.flows import typing_commands

PROMPTS = [f"a thing of kind {i}" for i in range(4)]


class Mirrored:
    """A campaign of three rounds on a machine that is out of reach, and its mirror."""

    def __init__(self, folder: Path, mirror: str, images: bool = True) -> None:
        self.campaign = LittleCampaign(folder / "mine", PROMPTS)
        self.folder, self.url = folder / "mine", f"{mirror}/mine"
        self.objects = open_objects(mirror, "mine")
        self.store = StoreConfig(mirror=mirror, mirror_images=images)
        self.lease = Lease(self.objects, "other machine", "mine", 60)
        for number, score in enumerate((0.2, 0.8, 0.5)):
            self.add_round(number, score)
        self.put()

    def add_round(self, number: int, score: float) -> None:
        self.campaign.add_round(number, np.full((4, 2), score))
        row = self.folder / f"rounds/round={number}/part.parquet"
        content = row.read_bytes()
        row.unlink()
        record_files(self.folder, number, "config", (self.folder / f"stages/round={number}/config.json").read_text)
        finish_stage(self.folder, number, "evaluate", type(RECORD), lambda: RECORD)
        row.parent.mkdir(exist_ok=True)
        row.write_bytes(content)
        record_files(self.folder, number, "publish")

    def put(self) -> None:
        self.lease.take()
        put_campaign(self.folder, self.store, self.objects, self.lease)

    def everything(self) -> dict[str, str]:
        """Digests of all objects."""
        return {e.name: hashlib.sha256(self.objects.get(e.name) or b"").hexdigest() for e in self.objects.listed("")}


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all objects that readers ask for, in a data folder that is empty at first."""
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(at_hand, "_sources", {})
    asked: list[str] = []
    get, fetch = Objects.get, Objects.fetch
    monkeypatch.setattr(Objects, "get", lambda self, name: asked.append(name) or get(self, name))
    monkeypatch.setattr(Objects, "fetch", lambda self, name, path: asked.append(name) or fetch(self, name, path))
    return asked


@pytest.fixture
def folder_mirror(tmp_path: Path) -> str:
    (tmp_path / "m").mkdir()
    return f"file://{tmp_path / 'm'}"


@pytest.fixture
def there(tmp_path: Path, folder_mirror: str, fetched: list[str]) -> Mirrored:
    mirrored = Mirrored(tmp_path / "away", folder_mirror)
    fetched.clear()
    return mirrored


typed = partial(typing_commands.typed, app)


def files(fetched: list[str]) -> set[str]:
    """The first folders of the campaign's files among what was fetched."""
    return {name.split("/")[1] for name in fetched if name.startswith("files/") and "/round=" in name}


def test_rounds_fetches_only_the_rows_of_rounds(there: Mirrored, fetched: list[str]) -> None:
    before = there.everything()
    fetched.clear()
    output = typed("rounds", "--campaign", there.url)
    assert "held-out score 0.200 -> 0.500 after round 2" in output
    assert f"d3po pull {there.url}" in output
    assert files(fetched) == {"rounds"}
    fetched.clear()
    typed("rounds", "--campaign", there.url)
    assert [name.split("/")[0] for name in fetched] == ["versions"], "what is in the cache is not fetched again"
    assert there.everything() == before, "reading writes nothing"


def test_query_fetches_the_tables_it_names(there: Mirrored, fetched: list[str]) -> None:
    sql = "WITH s AS (FROM evaluations) SELECT count(*) AS n, count(DISTINCT round) AS r FROM s"
    assert typed("query", "--campaign", there.url, "--format", "csv", sql).split() == ["n,r", "24,3"]
    assert files(fetched) == {"evaluations"}
    sql = "SELECT count(*) AS n FROM pairs"
    assert typed("query", "--campaign", there.url, "--format", "csv", sql).split() == ["n", "2"]
    assert files(fetched) == {"evaluations", "preferences", "samples", "judgements"}
    with pytest.raises(D3POError, match="nothing_like_it"):
        typed("query", "--campaign", there.url, "SELECT * FROM nothing_like_it")


def test_show_compare_and_report_fetch_the_images_they_show(there: Mirrored, fetched: list[str]) -> None:
    folder = reading.lay_out(there.url)
    shown = typed("show", "r1-g0-m0", "--campaign", there.url)
    assert next(name for name in fetched if "/images/" in name).startswith("files/images/round=1/r1-g0-m0.")
    assert str(folder / "images/round=1/r1-g0-m0.png") in shown
    fetched.clear()
    assert "picture" in typed("compare", "base", "2", "--campaign", there.url)
    assert len([name for name in fetched if "/images/" in name]) == 16, "the held-out images of two rounds"
    output = typed("report", "--campaign", there.url)
    assert "report.html" in output
    assert "not in the mirror" not in output
    assert (folder / "images/round=0/r0-e0.png").read_bytes() == (
        there.folder / "images/round=0/r0-e0.png"
    ).read_bytes()


def test_python_reads_the_mirror(there: Mirrored, fetched: list[str]) -> None:
    campaign = d3po.open(there.url)
    assert campaign.rounds["eval_score_mean"].tolist() == pytest.approx([0.2, 0.8, 0.5])
    assert campaign.champion == 1
    assert not [name for name in fetched if "/images/" in name]
    assert campaign.image("r1-e0").size == (8, 8)


def test_images_that_were_not_mirrored_are_told(tmp_path: Path, folder_mirror: str, fetched: list[str]) -> None:
    url = Mirrored(tmp_path / "away", folder_mirror, images=False).url
    assert "not in the mirror" in typed("show", "r1-g0-m0", "--campaign", url)
    compared = typed("compare", "base", "2", "--campaign", url)
    assert "16 image(s) are not in the mirror" in compared
    assert "picture  " not in compared
    assert "images are not in the mirror" in typed("report", "--campaign", url)
    with pytest.raises(D3POError, match="not in the mirror"):
        d3po.open(url).image("r1-e0")


def test_reader_follows_rounds_that_come_and_go(there: Mirrored, fetched: list[str]) -> None:
    count = "SELECT count(*) AS n FROM rounds"
    assert len(d3po.open(there.url).rounds) == 3
    there.add_round(3, 0.9)
    there.put()
    assert len(d3po.open(there.url).rounds) == 4
    forget_round(there.folder, 3, there.objects, there.lease)
    assert typed("query", "--campaign", there.url, "--format", "csv", count).split()[-1] == "3"


def test_damaged_object_is_named(there: Mirrored, tmp_path: Path) -> None:
    (row,) = (tmp_path / "m/mine/files/rounds/round=1").iterdir()
    row.write_bytes(b"x" * row.stat().st_size)
    with pytest.raises(D3POError, match=r"round=1/part.*is gone or damaged, and rounds/round=1/part.parquet is needed"):
        typed("rounds", "--campaign", there.url)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("{mirror}/other", "holds no campaign"),
        ("s3://", "names no campaign in a mirror"),
        ("ftp://host/prefix/mine", "expected s3://"),
        ("file:///nowhere/at/all/mine", "is no folder"),
    ],
)
def test_wrong_address_is_one_line(there: Mirrored, tmp_path: Path, address: str, told: str) -> None:
    with pytest.raises(D3POError, match=told) as raised:
        typed("rounds", "--campaign", address.format(mirror=f"file://{tmp_path / 'm'}"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "data" / "cache").exists()


def test_missing_extra_is_one_line(there: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(D3POError, match=r"pip install 'd3po\[mirror\]'"):
        typed("rounds", "--campaign", there.url)


def test_commands_that_need_the_disk_say_so(there: Mirrored) -> None:
    with pytest.raises(D3POError, match="d3po pull"):
        typed("check", "--campaign", there.url)


def test_s3_requests_and_bytes_of_rounds(tmp_path: Path, s3: str, fetched: list[str]) -> None:  # noqa: F811
    mirrored = Mirrored(tmp_path / "away", s3)
    fetched.clear()
    assert "after round 2" in typed("rounds", "--campaign", mirrored.url)
    (source,) = at_hand._sources.values()
    assert isinstance(source, reading.MirrorSource)
    # Two lists (versions, records), the version, campaign.json, nine records, three rows.
    assert source.objects.requests == {"list": 2, "get": 14}
    rows = sum(path.stat().st_size for path in mirrored.folder.glob("rounds/*/*.parquet"))
    small = sum(e.bytes for e in mirrored.objects.listed("") if e.name.startswith(("records/", "versions/")))
    there = (mirrored.folder / "campaign.json").stat().st_size
    assert source.objects.bytes_received == rows + small + there
    assert source.objects.bytes_sent == 0
