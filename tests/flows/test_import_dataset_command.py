"""``d3po import-dataset`` as a command: what it prints, where it puts the data set, what it refuses."""

import json
from functools import partial
from pathlib import Path

import pytest
import typer

from d3po.flows.commands.import_dataset import import_dataset
from d3po_core.config import ModelConfig
from d3po_core.datasets import importing
from d3po_core.datasets.stored import open_dataset, vae_sha256
from d3po_core.errors import D3POError
from tests.core.datasets.tables import MeanEncoder, pairs, picture, write_parquet
from tests.flows.typing_commands import typed

app = typer.Typer()
app.command("import-dataset")(import_dataset)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(importing, "Encoder", lambda model, size: MeanEncoder())


run = partial(typed, app)


def test_it_says_what_was_imported_and_what_to_type_next(tmp_path: Path) -> None:
    rows = pairs(5, images=20)
    rows[3]["jpg_1"] = b"no image"
    table = write_parquet(tmp_path / "pick.parquet", rows)
    said = run(table)
    assert "data set pick: 4 pairs of 5 rows; 6 images encoded, 2 used again" in said
    assert "left out: 1, first pick.parquet row 4 holds no readable image (of no known format); all are in" in said
    assert str(tmp_path / "data" / "datasets" / "pick" / "problems.csv") in said.replace("\n", "")
    assert "next: d3po run round --campaign NAME --set sample.dataset=pick --set train.objective=diffusion_dpo" in said
    assert open_dataset("pick").facts["vae_sha256"] == vae_sha256(ModelConfig())
    assert run(table) == said


def test_names_layouts_and_columns_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "table.jsonl").write_text(json.dumps({"file": "a.png", "words": "p", "score": 2.0, "label": 1}))
    said = run(
        tmp_path, "--name", "mine", "--layout", "good-bad", "--columns", "image=file,prompt=words", "--deployment",
        "published", "--set", "sample.latent_dtype=float16",
    )  # fmt: skip
    assert "data set mine: 1 groups of good and bad of 1 rows; 1 images encoded, 0 used again" in said
    assert "d3po run published --campaign NAME --set sample.dataset=mine --set train.objective=kto" in said
    dataset = open_dataset("mine")
    assert str(dataset.latents(dataset.drawn(1, 0, 1)[0]).dtype) == "torch.float16"


@pytest.mark.parametrize(("arguments", "why"), [
    (("--name", "../x"), "--name '../x': expected up to 64 letters"),
    (("--layout", "hers"), "--layout 'hers': expected one of pick-a-pic"),
    (("--columns", "image"), "--columns 'image': expected ours=theirs"),
    (("--deployment", "none"), "'none' is no deployment of rounds"),
    (("--set", "model.pth=x"), "did you mean 'model.path'"),
])  # fmt: skip
def test_wrong_words_are_one_line_and_make_nothing(arguments: tuple[str, ...], why: str, tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "pick.parquet", pairs(1, 2))
    with pytest.raises(D3POError, match=why) as caught:
        run(table, *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data" / "datasets").exists()
