"""Importing a data set: every layout, each image once, little memory, a kill anywhere, unreadable images."""

import csv
import hashlib
import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from d3po_core.config import CampaignConfig, ModelConfig, SampleConfig
from d3po_core.datasets import importing, shards
from d3po_core.datasets.grouping import MOST_IN_GROUP
from d3po_core.datasets.importing import Imported, import_dataset
from d3po_core.datasets.sources import Source, find_sources
from d3po_core.datasets.stored import Dataset, Group, open_dataset
from d3po_core.errors import D3POError
from d3po_core.models.encoding import Encoder
from d3po_core.models.policy import Policy
from d3po_core.sampling.rollout import draw_images
from d3po_core.seeds import ImageSeed
from d3po_core.store.files import exclusive
from d3po_core.store.images import load_png
from tests.core.datasets.tables import MeanEncoder, pairs, picture, write_parquet

CONFIG = CampaignConfig()


def imported(folder: Path, *files: Path, make: Callable[[], Any] = MeanEncoder, columns: Any = None) -> Imported:
    return import_dataset(folder, CONFIG, find_sources(files, None, columns or {}), make_encoder=make)


def groups_of(folder: Path) -> list[Group]:
    """All groups, in the order of their tables."""
    dataset = open_dataset(f"{folder}")
    drawn = dataset.drawn(sum(dataset.facts["groups"].values()), seed=0, round_number=1)
    return sorted(drawn, key=lambda group: (group.prompt, group.row))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_pairs_keep_winners_losers_and_ties(tmp_path: Path) -> None:
    rows = pairs(9, images=20)
    found = imported(tmp_path / "set", write_parquet(tmp_path / "pick.parquet", rows))
    assert (found.rows, found.problems, found.groups, found.images) == (9, 0, {"choice": 9}, 10)
    stored = {group.sha256: (group.values, group.prompt) for group in groups_of(tmp_path / "set")}
    for row in rows:
        said = {1.0: (1.0, -1.0), 0.0: (-1.0, 1.0), 0.5: (0.0, 0.0)}[row["label_0"]]
        assert stored[digest(row["jpg_0"]), digest(row["jpg_1"])] == (said, row["caption"])


def test_rankings_and_pairs_of_files_beside_a_table(tmp_path: Path) -> None:
    for seed in range(5):
        (tmp_path / f"{seed}.png").write_bytes(picture(seed))
    (tmp_path / "test.json").write_text(json.dumps([
        {"prompt": "p", "generations": ["0.png", "1.png", "2.png"], "ranking": [2, 1, 3]},
        {"prompt": "p", "generations": ["3.png", "4.png"], "ranking": [1, 1]},
    ]))  # fmt: skip
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_text(
        json.dumps({"prompt": "q", "image_path": ["../1.png", "../2.png"], "human_preference": [0, 1]})
    )
    found = imported(tmp_path / "set", tmp_path, tmp_path / "train")
    assert (found.groups, found.images, found.reused) == ({"rank": 2, "choice": 1}, 5, 2)
    by_size = {(group.kind, len(group.values)): group for group in groups_of(tmp_path / "set")}
    assert by_size["rank", 3].values == (2.0, 1.0, 3.0)
    assert by_size["rank", 2].values == (1.0, 1.0)
    assert by_size["choice", 2].values == (-1.0, 1.0)
    assert by_size["choice", 2].sha256 == (digest(picture(1)), digest(picture(2)))


@pytest.mark.parametrize(("column", "kind"), [("score", "score"), ("label", "rating")])
def test_single_images_of_one_prompt_become_groups(column: str, kind: str, tmp_path: Path) -> None:
    said = [seed % 2 for seed in range(12)]
    rows = [
        {"image": {"bytes": picture(seed), "path": None}, "prompt": "many" if seed < 11 else "one", column: value}
        for seed, value in enumerate(said)
    ]
    found = imported(tmp_path / "set", write_parquet(tmp_path / "single.parquet", rows))
    assert found.groups == {kind: 3}
    groups = groups_of(tmp_path / "set")
    assert [(group.prompt, len(group.values)) for group in groups] == [
        ("many", MOST_IN_GROUP), ("many", 11 - MOST_IN_GROUP), ("one", 1),
    ]  # fmt: skip
    assert {image: value for group in groups for image, value in zip(group.sha256, group.values, strict=True)} == {
        digest(picture(seed)): float(value) for seed, value in enumerate(said)
    }


def test_each_image_is_encoded_once_and_its_latent_is_found_again(tmp_path: Path) -> None:
    encoder = MeanEncoder()
    rows = pairs(200, images=11)
    found = imported(tmp_path / "set", write_parquet(tmp_path / "pick.parquet", rows), make=lambda: encoder)
    assert (encoder.images, found.images, found.reused) == (11, 11, 389)
    colours = {digest(picture(seed)): np.random.default_rng(seed).integers(0, 256, 3, np.uint8) for seed in range(11)}
    dataset = open_dataset(f"{tmp_path / 'set'}")
    for group in dataset.drawn(20, seed=1, round_number=1):
        latent = dataset.latents(group)
        assert latent.shape == (2, 3, 4, 4)
        for image, own in zip(group.sha256, latent, strict=True):
            assert torch.equal(own, torch.tensor(colours[image]).float()[:, None, None].expand(3, 4, 4))
            assert (load_png(shards.image_path(dataset.folder, image)) == colours[image]).all()


def test_little_of_a_large_table_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spy counts rows and pixels that are alive: of two chunks at most, however long the table is."""
    alive, most = {"rows": 0, "images": 0}, {"rows": 0, "images": 0}

    class Row(dict[str, Any]):
        pass

    class Pixels(np.ndarray):
        pass

    def gone(what: str) -> None:
        alive[what] -= 1

    def watched(what: str, thing: Any) -> Any:
        weakref.finalize(thing, gone, what)
        alive[what] += 1
        most[what] = max(most[what], alive[what])
        return thing

    chunks, fitted = Source.chunks, shards.fitted
    monkeypatch.setattr(shards, "ROWS", 8)
    monkeypatch.setattr(importing, "ROWS", 8)
    monkeypatch.setattr(shards, "fitted", lambda *args: watched("images", fitted(*args).view(Pixels)))
    monkeypatch.setattr(Source, "chunks", lambda self, size, finished: (
        (first, [watched("rows", Row(row)) for row in rows]) for first, rows in chunks(self, size, finished)
    ))  # fmt: skip
    imported(tmp_path / "set", write_parquet(tmp_path / "pick.parquet", pairs(400, images=400), row_group=25))
    assert 8 <= most["rows"] <= 16
    assert 8 <= most["images"] <= 32


def files_below(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in files}


def test_a_killed_import_goes_on_without_doing_a_shard_again(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "pick.parquet", pairs(300, images=280), row_group=130)
    imported(tmp_path / "whole", table)
    begun = tmp_path / "killed [once]"

    class Killed(MeanEncoder):
        def __call__(self, images: np.ndarray) -> torch.Tensor:
            if self.images > 150:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(images)

    if (child := os.fork()) == 0:
        imported(begun, table, make=Killed)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    done = files_below(begun)
    (begun / "shards" / ".0000-000000256.parquet.1.tmp").write_text("half")
    assert not (begun / "dataset.json").exists()
    with pytest.raises(D3POError, match="its import is not finished; type the same d3po import-dataset again"):
        open_dataset(f"{begun}")
    encoder, told = MeanEncoder(), list[int]()
    import_dataset(begun, CONFIG, find_sources([table], None, {}), told.append, lambda: encoder)
    encoded = sum(1 for name in done if name.startswith("images/"))
    assert 64 <= sum(told) < 300 - 64
    assert encoder.images <= 280 - encoded + 64  # the shard that was killed may have written its images
    assert files_below(begun) == files_below(tmp_path / "whole")


def test_a_finished_import_does_nothing_again(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "pick.parquet", pairs(5, images=4))
    first = imported(tmp_path / "set", table)

    def none() -> NoReturn:
        raise AssertionError

    assert imported(tmp_path / "set", table, make=none) == first


def test_every_unreadable_image_is_reported_and_the_other_rows_go_on(tmp_path: Path) -> None:
    rows = pairs(6, images=12)
    rows[1] |= {"jpg_0": picture(99), "jpg_1": b"no image"}
    rows[2]["jpg_0"], rows[4]["label_0"] = picture(2)[:30], 3.0
    encoder = MeanEncoder()
    table = write_parquet(tmp_path / "pick.parquet", rows)
    found = imported(tmp_path / "set", table, make=lambda: encoder)
    assert (found.rows, found.problems, found.groups) == (6, 3, {"choice": 3})
    assert encoder.images == found.images == 6  # not the good image beside a bad one
    assert found.first_problem == "pick.parquet row 2 holds no readable image (of no known format)"
    with (tmp_path / "set" / "problems.csv").open() as stream:
        told = [(row["file"], row["row"], row["problem"].partition(" (")[0]) for row in csv.DictReader(stream)]
    assert told == [
        ("pick.parquet", "2", "holds no readable image"), ("pick.parquet", "3", "holds no readable image"),
        ("pick.parquet", "5", "labels are 3 and -2; expected 1, 0, or 0.5 for a tie"),
    ]  # fmt: skip


def test_a_data_set_without_a_usable_row_is_one_line(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "pick.parquet", [pairs(1, 2)[0] | {"jpg_0": b"x"}])
    with pytest.raises(D3POError, match=r"no row could be used; pick.parquet row 1 holds no .*problems.csv"):
        imported(tmp_path / "set", table)


def test_another_table_or_a_busy_folder_is_refused(tmp_path: Path) -> None:
    imported(tmp_path / "set", write_parquet(tmp_path / "a.parquet", pairs(2, 4)))
    with pytest.raises(D3POError, match=r"data set 'set' was begun with files .*a.parquet.* \(now .*b.parquet"):
        imported(tmp_path / "set", write_parquet(tmp_path / "b.parquet", pairs(3, 4)))
    with exclusive(tmp_path / "set" / ".lock"), pytest.raises(D3POError, match="another process imports"):
        imported(tmp_path / "set", tmp_path / "a.parquet")


def test_each_group_is_drawn_once_before_any_comes_again(tmp_path: Path) -> None:
    imported(tmp_path / "set", write_parquet(tmp_path / "pick.parquet", pairs(7, images=20)))
    dataset = open_dataset(f"{tmp_path / 'set'}")
    drawn = [group.sha256 for number in range(1, 8) for group in dataset.drawn(3, seed=4, round_number=number)]
    for turn in range(3):
        assert len({*drawn[7 * turn : 7 * turn + 7]}) == 7
    assert drawn[:7] != drawn[7:14]


def test_damage_is_one_line(tmp_path: Path) -> None:
    imported(tmp_path / "set", write_parquet(tmp_path / "pick.parquet", pairs(2, images=4)))
    dataset = open_dataset(f"{tmp_path / 'set'}")
    group, shard = dataset.drawn(1, 0, 1)[0], next((tmp_path / "set" / "shards").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(D3POError, match="safetensors: is gone or damaged; restore it"):
        dataset.latents(group)
    (tmp_path / "set" / "groups.parquet").unlink()
    with pytest.raises(D3POError, match=r"groups.parquet: is gone or damaged; .*d3po import-dataset"):
        Dataset(dataset.folder, dataset.facts).prompts()


def test_the_models_vae_gives_a_drawn_image_back(policy: Policy) -> None:
    seeds = [ImageSeed("a red circle on a gray background", place, place) for place in range(2)]
    trajectories, drawn = draw_images(policy, SampleConfig(num_steps=5), seeds, torch.float32)
    encoder = Encoder(ModelConfig(device="cpu"))
    assert (encoder.height, encoder.width, encoder.latent_shape) == (*drawn.shape[1:3], policy.latent_shape)
    latents, final = encoder(drawn), trajectories.latents_BTCHW[:, -1]
    assert (latents - final).pow(2).mean() < 0.2 * final.pow(2).mean()
    assert np.abs(policy.decode(latents).astype(int) - drawn).mean() < 4  # the VAE's own loss is 2 or so
