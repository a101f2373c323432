"""The report of an import of judgements, and its text."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from d3po_core.judgement_files.delimited import shown
from d3po_core.store.files import atomic_path

MAX_LINES = 20


@dataclass(frozen=True)
class ImportReport:
    """What an import found and did.

    Attributes:
        file: the file's name.
        campaign: the campaign's name.
        round_number: the round that the judgements belong to.
        format: the recognised format.
        noun: what its rows are called.
        num_rows: rows of the file, without the header.
        num_good: rows that are right.
        num_bad: rows that are wrong.
        num_empty: rows that are not filled in; they are left out.
        raters: number of good rows per rater.
        problems: row, column, value and message of everything that is wrong.
        written: the Parquet file with the judgements, None if nothing was written.
        already: the same file was imported before; nothing changed.
        late: the round's preferences are already derived; its training does not change any more.
        accepted: the file is right, or the user asked for its good rows; false if it must be corrected.
        num_repeated: rows that repeat another row of the file with the same time; kept once.
        num_known: rows that are on record already, from an earlier import or the page.
        elsewhere: number of rows of each other round; they are left out.
        notes: how the file was interpreted, and the outcome.
    """

    file: str
    campaign: str
    round_number: int
    format: str
    noun: str
    num_rows: int
    num_good: int
    num_bad: int
    num_empty: int
    raters: dict[str, int]
    problems: pa.Table
    written: Path | None
    already: bool
    late: bool
    accepted: bool
    num_repeated: int = 0
    num_known: int = 0
    elsewhere: dict[int, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def problem_lines(self) -> Iterator[str]:
        """One line per problem: file, row, column, value, and what to do."""
        for batch in self.problems.to_batches(max_chunksize=10_000):
            for problem in batch.to_pylist():
                said = [problem["column"], "" if problem["value"] is None else shown(problem["value"])]
                what = " ".join(part for part in (*said, problem["message"]) if part)
                yield f"{self.file} {self.noun} {problem['row']}: {what}"

    def summary(self) -> list[str]:
        """The outcome and the first problems, as lines to print."""
        place = f"round {self.round_number} of campaign {self.campaign!r}"
        lines = [line for line, _ in zip(self.problem_lines(), range(MAX_LINES), strict=False)]
        if len(self.problems) > MAX_LINES:
            lines.append(f"... and {len(self.problems) - MAX_LINES:,} more problems")
        parts = [f"{_count(self.num_good, 'judgement')} by {_count(len(self.raters), 'rater')}"]
        parts += [f"{_count(self.num_bad, self.noun)} wrong"] if self.num_bad else []
        parts += [f"{_count(self.num_empty, self.noun)} not filled in, left out"] if self.num_empty else []
        parts += [f"{_count(self.num_repeated, self.noun)} repeated, kept once"] if self.num_repeated else []
        parts += [f"{_count(self.num_known, 'judgement')} on record already, left out"] if self.num_known else []
        lines.append(f"{self.file} ({self.format}), {place}: {'; '.join(parts)}")
        lines += [f"  {note}" for note in self.notes]
        if self.elsewhere:
            rounds = ", ".join(f"{count:,} of round {number}" for number, count in sorted(self.elsewhere.items()))
            lines.append(f"  left out: rows of other rounds ({rounds}); import them with their own --round")
        if self.already:
            lines.append("the same file was imported before; nothing changed")
        elif self.written is None:
            everything = self.num_known and self.num_known == self.num_good
            lines.append("all of it is on record already; nothing changed" if everything else "nothing was written")
        else:
            left_out = f"; left out: {_count(self.num_bad, 'wrong ' + self.noun)}" if self.num_bad else ""
            lines.append(f"written to {self.written}{left_out}")
        if self.late:
            lines.append(f"the preferences of {place} are derived already: its training does not change any more")
        return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def write_problems(report: ImportReport, path: Path) -> Path:
    """Write all problems of a report as lines of text, as a whole file or none."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in report.problem_lines())
    return path
