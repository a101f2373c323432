"""Raters' reports of images that are unsafe or broken; they stop no round and change no judgement.

A report is a file of the table ``image_reports``, in the round of its image. Its name is the id that the page gave its
message. A rater's last report on an image counts. A report is about a file: it does not carry over to a redrawn image.
"""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from d3po_core.errors import D3POError
from d3po_core.image_ids import round_of
from d3po_core.store.integrity import sha256_of
from d3po_core.store.tables import partition, read_rows, table_from_rows, write_table

TABLE = "image_reports"
Reason = Literal["unsafe", "broken", "withdrawn"]


class ImageReports:
    """A campaign's reports; threads may share it.

    Args:
        campaign: the campaign's folder.
    """

    def __init__(self, campaign: Path) -> None:
        self._campaign, self._lock = campaign, threading.Lock()
        self._files: tuple[Path, ...] = ()
        self._latest = datetime.min
        self._standing: dict[str, dict[str, str]] = {}

    def standing(self) -> dict[str, dict[str, str]]:
        """Return the reason per rater of each reported image, by image id; withdrawn reports are left out.

        Raises:
            D3POError: a file of reports is damaged.
        """
        with self._lock:
            files = tuple(sorted(self._campaign.glob(f"{TABLE}/round=*/*.parquet")))
            if files != self._files:
                self._standing = self._read(files)
                self._files = files
            return self._standing

    def lines(self, round_number: int | None = None) -> list[str]:
        """Return a line for people per reported image, of one round or of all: the image, why, and who says so."""
        images = self.standing().items()
        of_rounds = [(image, said) for image, said in images if round_number in (None, round_of(image))]
        return [
            f"reported: {image} is {' and '.join(sorted(set(said.values())))} ({', '.join(sorted(said))})"
            for image, said in sorted(of_rounds, key=lambda entry: (round_of(entry[0]), entry[0]))
        ]

    def add(self, rater: str, sample_id: str, image_path: str, reason: Reason, name: str) -> None:
        """Store or withdraw a report; return once it is on disk.

        A report that is on record already is not stored twice.

        Args:
            rater: who reports.
            sample_id: the image's id.
            image_path: the image's file, relative to the campaign's folder.
            reason: why, or ``withdrawn``.
            name: the page's id for this message.

        Raises:
            D3POError: the image's file is gone, or the report cannot be written.
        """
        image, number = self._campaign / image_path, round_of(sample_id)
        if (partition(self._campaign, TABLE, number) / f"{name}.parquet").exists():
            return
        if not image.is_file():
            raise D3POError(f"{image}: is gone, so there is nothing to report; reload the page")
        if self.standing().get(sample_id, {}).get(rater, "withdrawn") == reason:
            return
        with self._lock:  # times must grow even if the clock is set back, because the last word counts by time
            self._latest = max(datetime.now(UTC).replace(tzinfo=None), self._latest + timedelta(microseconds=1))
            row = {
                "sample_id": sample_id, "rater": rater, "reason": reason, "image_sha256": sha256_of(image),
                "reported_at": self._latest,
            }  # fmt: skip
            write_table(self._campaign, TABLE, number, table_from_rows(TABLE, [row]), name=name)

    def _read(self, files: tuple[Path, ...]) -> dict[str, dict[str, str]]:
        rows = sorted((row for path in files for row in read_rows(path)), key=lambda row: row["reported_at"])
        self._latest = max([self._latest, *(row["reported_at"] for row in rows)])
        last_word = {(row["sample_id"], row["rater"]): row for row in rows}
        found: dict[str, dict[str, str]] = {}
        for (sample_id, rater), row in last_word.items():
            if row["reason"] != "withdrawn" and self._is_the_file(row):
                found.setdefault(sample_id, {})[rater] = row["reason"]
        return found

    def _is_the_file(self, row: dict[str, str]) -> bool:
        number = round_of(row["sample_id"])
        return any(
            sha256_of(path) == row["image_sha256"]
            for path in self._campaign.glob(f"images/round={number}/{row['sample_id']}.*")
        )
