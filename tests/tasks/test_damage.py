"""Files of a finished campaign that were damaged: every command is right, or says in one line which file it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d3po.flows.commands.line import app
from d3po_core.errors import D3POError
from d3po_core.people.journal import Journal
from d3po_core.store.integrity import damages, record_files, require_whole

Damage = Callable[[Path], object]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Damage] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "braces": lambda path: path.write_text("{}"),
    "deleted": lambda path: path.unlink(),
}
TABLES = ("samples", "judgements", "preferences", "updates", "update_steps", "evaluations", "rounds")
READERS = {
    "query": ["query", "SELECT count(*) FROM samples", "--campaign", "tiny"],
    "rounds": ["rounds", "--campaign", "tiny"],
    "report": ["report", "--campaign", "tiny"],
    "compare": ["compare", "--campaign", "tiny"],
    "show": ["show", "r2-g0-m0", "--campaign", "tiny"],
    "export-preferences": ["export-preferences", "--campaign", "tiny", "--output", "out"],
}


@pytest.fixture
def run(campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], tuple[int, str]]:
    monkeypatch.setenv("D3PO_DATA", str(campaign.parent.parent))
    monkeypatch.chdir(tmp_path)

    def command(words: list[str]) -> tuple[int, str]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        done = CliRunner().invoke(app, words)
        if done.exception and not isinstance(done.exception, SystemExit):
            assert isinstance(done.exception, D3POError), (words, repr(done.exception))
            return 2, str(done.exception)
        return done.exit_code, done.output

    return command


def only_file(campaign: Path, table: str) -> Path:
    (path,) = (campaign / table / "round=2").glob("*.parquet")
    return path


def test_a_whole_campaign_checks(run: Callable[[list[str]], tuple[int, str]], campaign: Path) -> None:
    code, output = run(["check", "--campaign", "tiny"])
    assert (code, output.count("0 damaged or gone")) == (0, 1)
    assert not damages(campaign)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("table", TABLES[:-1])
def test_a_damaged_table_is_named_in_one_line_by_whoever_reads_it(
    table: str, how: str, run: Callable[[list[str]], tuple[int, str]], campaign: Path
) -> None:
    path = only_file(campaign, table)
    name = path.relative_to(campaign).as_posix()
    DAMAGES[how](path)
    code, output = run(["check", "--campaign", "tiny"])
    assert code == 1
    assert name in output
    for words in READERS.values():
        code, message = run(words)
        if code:
            assert code == 2
            assert name in message
            assert "\n" not in message
        else:  # what does not read the file may answer
            answers = {"rounds": True, "compare": table != "evaluations", "show": table in ("updates", "update_steps")}
            assert answers.get(words[0]), (words, message)


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "deleted"])
def test_a_damaged_row_of_a_round_is_named(
    how: str, run: Callable[[list[str]], tuple[int, str]], campaign: Path
) -> None:
    record_files(campaign, 2, "publish")
    DAMAGES[how](only_file(campaign, "rounds"))
    for words in READERS.values():
        code, message = run(words)
        assert code == 2
        assert "rounds/round=2/part.parquet" in message
        assert "\n" not in message


@pytest.mark.parametrize("how", ["truncated", "emptied", "braces"])
def test_a_row_that_an_earlier_version_wrote_without_a_digest_is_named_too(
    how: str, run: Callable[[list[str]], tuple[int, str]], campaign: Path
) -> None:
    DAMAGES[how](only_file(campaign, "rounds"))
    for words in READERS.values():
        code, message = run(words)
        assert code == 2
        assert "rounds/round=2/part.parquet is no readable Parquet file" in message


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_image_is_not_exported(how: str, run: Callable[[list[str]], tuple[int, str]], campaign: Path) -> None:
    DAMAGES[how](campaign / "images/round=2/r2-g0-m0.png")
    code, message = run(["export-sheet", "out", "--campaign", "tiny", "--round", "2"])
    assert code == 2
    assert "images/round=2/r2-g0-m0.png" in message


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_record_is_one_line(how: str, run: Callable[[list[str]], tuple[int, str]], campaign: Path) -> None:
    DAMAGES[how](campaign / "stages/round=2/evaluate.json")
    code, message = run(["export-lora", "--campaign", "tiny", "--round", "2", "--output", "out"])
    assert code == 2
    assert "stages/round=2/evaluate.json" in message


def test_a_bit_in_the_optimizer_or_a_trajectory_stops_training(campaign: Path) -> None:
    optimizer = campaign / "checkpoints/round=2/optimizer.safetensors"
    shard = next((campaign / "trajectories/round=2").glob("*.safetensors"))
    for path in (optimizer, shard):
        flip(path)
    with pytest.raises(D3POError, match=r"optimizer.safetensors has other content .* \(and 1 more files: d3po check"):
        require_whole(campaign, [2])


def test_trajectories_that_were_pruned_are_not_missed(run: Callable[[list[str]], tuple[int, str]]) -> None:
    assert run(["prune", "--campaign", "tiny"])[0] == 0
    code, output = run(["check", "--campaign", "tiny"])
    assert code == 0, output


def test_a_digest_is_noted_for_every_file_of_a_round(campaign: Path) -> None:
    noted = {name for path in (campaign / "stages/round=2").glob("*.files") for name in json.loads(path.read_text())}
    records = {path.relative_to(campaign).as_posix() for path in (campaign / "stages/round=2").glob("*.json")}
    assert records <= noted
    noted -= records
    there = {
        path.relative_to(campaign).as_posix()
        for folder in campaign.glob("*/round=2") if folder.parent.name not in ("stages", "staging")
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip
    assert noted == there - {"rounds/round=2/part.parquet"} | (noted & {"rounds/round=2/part.parquet"})
    assert len(noted) > 30


def test_a_round_whose_row_is_gone_is_not_a_round_that_never_was(
    run: Callable[[list[str]], tuple[int, str]], campaign: Path
) -> None:
    record_files(campaign, 2, "publish")
    only_file(campaign, "rounds").unlink()
    code, message = run(["rounds", "--campaign", "tiny"])
    assert (code, "rounds/round=2/part.parquet is gone" in message) == (2, True)


def test_nothing_is_pruned_that_what_stays_could_not_make_again(
    run: Callable[[list[str]], tuple[int, str]], campaign: Path
) -> None:
    flip(campaign / "checkpoints/round=2/optimizer.safetensors")
    code, message = run(["prune", "--campaign", "tiny"])
    assert (code, "optimizer.safetensors has other content" in message) == (2, True)
    assert list((campaign / "trajectories/round=2").iterdir())


def test_lists_of_digests_are_missed_too(run: Callable[[list[str]], tuple[int, str]], campaign: Path) -> None:
    (campaign / "stages/round=2/evaluate.files").unlink()
    code, output = run(["check", "--campaign", "tiny"])
    assert (code, "stages/round=2/evaluate.files is gone" in output) == (1, True)


def test_a_journal_that_is_gone_is_not_begun_anew(campaign: Path) -> None:
    (campaign / "judgements/round=2/page-0123456789abcdef-1-4.parquet").touch()
    with pytest.raises(D3POError, match=r"labels\.sqlite: is gone, although judgements/round=2/page-"):
        Journal(campaign)
    assert not (campaign / "labels.sqlite").exists()


@pytest.mark.parametrize("words", [["replay", "tiny", "--round", "2"], ["regenerate", "r2-e0", "--campaign", "tiny"]])
@pytest.mark.parametrize("file", ["checkpoint.json", "pytorch_lora_weights.safetensors"])
def test_a_damaged_checkpoint_is_not_drawn_or_trained_from(
    file: str, words: list[str], run: Callable[[list[str]], tuple[int, str]], campaign: Path
) -> None:
    path = campaign / "checkpoints/round=2" / file
    path.write_bytes(path.read_bytes()[:100])
    code, message = run(words)
    assert (code, f"checkpoints/round=2/{file} has 100 bytes" in message) == (2, True), message


@pytest.mark.parametrize("name", ["config.files", "evaluate.files", "publish.files"])
def test_a_list_of_digests_that_is_gone_is_missed(
    name: str, run: Callable[[list[str]], tuple[int, str]], campaign: Path
) -> None:
    number = 1 if name == "publish.files" else 2
    (campaign / f"stages/round={number}" / name).unlink()
    code, output = run(["check", "--campaign", "tiny"])
    assert code == 1
    assert f"stages/round={number}/{name} is gone" in output


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_identity_is_named_by_every_command(
    how: str, run: Callable[[list[str]], tuple[int, str]], campaign: Path
) -> None:
    DAMAGES[how](campaign / "campaign.json")
    for words in READERS.values():
        code, message = run(words)
        assert code == 2
        assert "campaign.json: " in message
        assert "\n" not in message


def test_one_digit_of_the_campaigns_seed_is_noticed(
    run: Callable[[list[str]], tuple[int, str]], campaign: Path
) -> None:
    path = campaign / "campaign.json"
    text = path.read_text()
    assert text.count('"seed": 5') == 1
    path.write_text(text.replace('"seed": 5', '"seed": 6'))
    code, message = run(["rounds", "--campaign", "tiny"])
    assert code == 2
    assert "campaign.json: has other content than was written" in message


def test_a_table_of_samples_that_is_gone_is_not_a_round_without_images(
    run: Callable[[list[str]], tuple[int, str]], campaign: Path
) -> None:
    (campaign / "samples/round=2/part.parquet").unlink()
    for words in (["export-sheet", "out", "--round", "2"], ["import", "said.csv", "--dry-run", "--late"]):
        (Path.cwd() / "said.csv").write_text("sample_id,rating,rater\nr2-g0-m0,good,ann\n")
        code, message = run([*words, "--campaign", "tiny"])
        assert code == 2
        assert "samples/round=2/part.parquet is gone" in message


def test_compare_says_which_image_it_draws_without(run: Callable[[list[str]], tuple[int, str]], campaign: Path) -> None:
    (campaign / "images/round=2/r2-e0.png").unlink()
    code, output = run(["compare", "base", "2", "--campaign", "tiny"])
    assert code == 0
    assert "1 image(s) are gone" in output.replace("\n", " ")


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "deleted"])
def test_a_replay_names_a_damaged_trajectory(
    how: str, run: Callable[[list[str]], tuple[int, str]], campaign: Path
) -> None:
    path = sorted((campaign / "trajectories/round=2").glob("*.safetensors"))[-1]
    DAMAGES[how](path)
    code, message = run(["replay", "tiny", "--round", "2"])
    assert code == 2
    assert path.relative_to(campaign).as_posix() in message
    assert "\n" not in message
