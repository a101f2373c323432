"""Every kind of file of a finished campaign, damaged in five ways, then every command that reads a campaign.

Counts how each ends: with the same output as undamaged, in one line that names the file or its round, in another line,
in a traceback, or silently in something else.

    python tests/benchmarks/damage.py
"""

import argparse
import collections
import contextlib
import hashlib
import io
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.common import clean_environment

BIG = ("trajectories", "checkpoints")
READERS: dict[str, list[str]] = {
    "rounds": ["rounds"],
    "show": ["show", "r2-g0-m0"],
    "show held-out": ["show", "r2-e0"],
    "query": ["query", "SELECT round, count(*), sum(score) FROM evaluations GROUP BY round ORDER BY round"],
    "report": ["report", "--output", "out.html"],
    "compare": ["compare", "base", "2", "--output", "out.png"],
    "export-preferences": ["export-preferences", "--output", "out"],
    "export-lora": ["export-lora", "--round", "2", "--output", "out"],
    "export-sheet": ["export-sheet", "out", "--round", "2"],
    "raters": ["raters"],
    "prune": ["prune", "--dry-run"],
    "check": ["check"],
    "import": ["import", "said.csv", "--dry-run", "--late"],
    "regenerate": ["regenerate", "r2-g0-m0"],
    "replay": ["replay", "tiny", "--round", "2"],
    "run": [],  # one more round, stage by stage
}
Damage = Callable[[Path], object]


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
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


def main() -> None:
    """Print each bad ending, and a table of endings by command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", nargs="*", default=list(READERS), choices=list(READERS))
    parser.add_argument("--files", default="", help="only files whose path matches this regular expression")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ.clear(), os.environ.update(clean_environment(Path(place)))  # before anything reads it
        whole, campaign = make_campaign(Path(place)), Path(place) / "runs" / "tiny"
        work = Path(place) / "work"
        work.mkdir()
        os.chdir(work)
        (work / "said.csv").write_text("sample_id,rating,rater\nr2-g0-m0,good,ann\n")
        shutil.copytree(whole, campaign)
        right = {name: ending_of(READERS[name], campaign) for name in arguments.commands}
        if failed := [f"{name}: {told}" for name, (kind, told) in right.items() if kind == "traceback"]:
            raise SystemExit("undamaged, these end in a traceback:\n" + "\n".join(failed))
        table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for file in kinds_of_file(whole):
            if not re.search(arguments.files, file):
                continue
            for how, damage in DAMAGES.items():
                for name in arguments.commands:
                    shutil.rmtree(campaign)
                    shutil.copytree(whole, campaign, copy_function=os.link)
                    unlink_shared(whole, campaign, file)
                    damage(campaign / file)
                    kind, told = ending_of(READERS[name], campaign)
                    ending = judged(kind, told, right[name][1], file)
                    table[name][ending] += 1
                    if ending not in ("right", "named"):
                        print(f"{file} {how}, {name}: {ending}: {told[-160:]!r}", flush=True)
        show(table)


def make_campaign(place: Path) -> Path:
    """A finished campaign of two rounds, with judgements of the page and a report."""
    import torch

    from tests.tasks import conftest as small

    torch.set_num_threads(1)

    class Factory:
        def mktemp(self, name: str) -> Path:
            folder = place / name
            folder.mkdir()
            return folder

    config = small.config.__wrapped__(Factory())  # type: ignore[attr-defined]
    from d3po.tasks.publishing import note_published
    from d3po_core.people.journal import Journal, Submission, export_judgements, sampling_of
    from d3po_core.report.write import write_report
    from d3po_core.reproducing.frozen import freeze

    folder = config.folder
    for name, prompts in (("train", small.TRAIN), ("held_out", small.HELD_OUT)):
        (place / "data" / f"{name}.txt").write_text("\n".join(prompts))
    with contextlib.closing(Journal(folder)) as journal:
        sampling = sampling_of(folder, 2)
        shown, answer = ("r2-g0-m0", "r2-g0-m1", "r2-g0-m2"), (1.0, 0.0, 0.0)
        journal.append(Submission("a", str(sampling), "ann", "r2-g0", 0, "answer", "mark_bad", shown, answer, 3.0))
    export_judgements(folder, 2)
    freeze(config, small.HELD_OUT)
    for number in range(3):
        note_published(folder, number)
    write_report(config)
    return folder


def kinds_of_file(campaign: Path) -> list[str]:
    """One file of each kind: of those that differ only in numbers, the last."""
    names = sorted(path.relative_to(campaign).as_posix() for path in campaign.rglob("*") if path.is_file())
    return sorted({re.sub(r"\d+", "#", name): name for name in names if not name.endswith(("-wal", "-shm"))}.values())


def unlink_shared(whole: Path, campaign: Path, file: str) -> None:
    """Give what a command or a damage may change a copy of its own; the rest stays linked."""
    for name in {file, "labels.sqlite", *(p.relative_to(whole).as_posix() for p in whole.glob("re*/*") if p.is_file())}:
        if (whole / name).exists():
            (campaign / name).unlink(missing_ok=True)
            shutil.copyfile(whole / name, campaign / name)


def ending_of(words: list[str], campaign: Path) -> tuple[str, str]:
    """How a command ends (done, error, traceback), and what it said, with a digest of what it wrote."""
    from typer.testing import CliRunner

    from d3po.flows.commands.line import app
    from d3po_core.errors import D3POError

    for output in Path().glob("out*"):
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    if not words:
        return ending_of_a_round(campaign)
    words = words if words[0] == "replay" else [*words, "--campaign", "tiny"]
    with contextlib.redirect_stderr(io.StringIO()):
        done = CliRunner().invoke(app, words)
    if isinstance(done.exception, D3POError):
        return "error", str(done.exception)
    if done.exception and not isinstance(done.exception, SystemExit):
        return "traceback", "".join(traceback.format_exception(done.exception))
    written = sorted(path for path in Path().rglob("out*/**/*") if path.is_file()) + sorted(Path().glob("out*.*"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in written if path.suffix != ".html"]
    # What a campaign takes of the disk changes with any damage; what may be dropped does not.
    output = done.output.splitlines()[-1] if words[0] == "prune" else done.output
    return ("done" if done.exit_code == 0 else "error"), output + "".join(digests)


def ending_of_a_round(campaign: Path) -> tuple[str, str]:
    """How one more round ends: with the digest of its checkpoint, or an error."""
    from d3po.tasks.evaluating import _evaluate
    from d3po.tasks.judging import _derive, _judge
    from d3po.tasks.sampling import _sample
    from d3po.tasks.training import _train
    from d3po_core.errors import D3POError
    from d3po_core.models.weights import weights_sha256
    from d3po_core.reproducing.frozen import freeze
    from d3po_core.store.campaign import begin_round, campaign_named, open_campaign
    from d3po_core.store.stages import finished_numbers
    from tests.tasks.conftest import HELD_OUT

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            config = campaign_named("tiny")
            open_campaign(config)
            freeze(config, HELD_OUT)
            number = max(finished_numbers(campaign)) + 1
            begin_round(config, number)
            for work in (_sample, _judge, _derive, _train, _evaluate):
                work(config, number)
        return "done", f"round {number}: {weights_sha256(campaign / f'checkpoints/round={number}')}"
    except D3POError as error:
        return "error", str(error)
    except Exception:
        return "traceback", traceback.format_exc()


def judged(kind: str, told: str, right: str, file: str) -> str:
    """An ending in one or two words."""
    if kind == "traceback":
        return kind
    if told == right:
        return "right"
    named = file in told or Path(file).name in told or str(Path(file).parent) in told
    if kind == "done" and not named:
        return "silently other"
    return "named" if named else "another line"


def show(table: dict[str, collections.Counter[str]]) -> None:
    """Print endings by command."""
    endings = ("right", "named", "another line", "traceback", "silently other")
    print(f"{'command':20}" + "".join(f"{ending:>16}" for ending in endings))
    for name, counts in table.items():
        print(f"{name:20}" + "".join(f"{counts[ending]:16}" for ending in endings))
    totals = sum(table.values(), collections.Counter())
    print(f"{'all':20}" + "".join(f"{totals[ending]:16}" for ending in endings))


if __name__ == "__main__":
    main()
