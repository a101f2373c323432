"""Commands that the README and the documents print, run as they stand on a campaign that the stages of a run made."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d3po.flows.commands.line import app
from tests.flows.test_printed_commands import arguments_of, printed

# These start servers, run rounds, change the campaign, or need a model and a GPU: they have tests of their own.
NOT_HERE = (
    "init", "plan", "doctor", "invite", "revoke", "run", "submit", "campaigns", "up", "down", "status", "label",
    "import", "import-dataset", "discard-round", "replay", "mirror", "pull", "push",
)  # fmt: skip
# Names of the documents' campaign, and what they are called in this one.
HERE = {"shapes": "tiny", "mine": "tiny", "bright": "tiny", "c": "tiny", "r3-g4-m1": "r2-g4-m1"}
LINES = sorted({line for place, line in printed() if place.endswith(".md") and place != "CHANGELOG.md"})


ALONE = ("compare", "report")  # a name alone mostly speaks of the command; these do something by it


def runnable() -> list[list[str]]:
    commands = [arguments_of(line) for line in LINES]
    commands = [
        words for words in commands if not any("://" in word for word in words)
    ]  # tests/flows/test_reading_mirror
    return [words for words in commands if words[0] not in NOT_HERE and (len(words) > 1 or words[0] in ALONE)]


@pytest.mark.parametrize("words", runnable(), ids=" ".join)
def test_a_documented_command_does_what_it_says(
    words: list[str], campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_DATA", str(campaign.parent.parent))
    monkeypatch.chdir(tmp_path)
    words = [HERE.get(word, word) for word in words]
    if words[-2:] == ["--campaign", "folder"]:
        words[-1] = str(campaign)
    if "--round" in words:
        words[words.index("--round") + 1] = "2"
    if words[0] != "replay" and "--campaign" not in words:
        words += ["--campaign", "tiny"]
    if words[0].startswith("export-") and words[0] != "export-sheet" and "--output" not in words:
        words += ["--output", "folder"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (words, done.output, done.exception)
    assert re.search(r"\w", done.output) or list(tmp_path.iterdir())
