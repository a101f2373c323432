"""Find a learned scorer's files: in a folder or hub id, and in a second hub id for files the first lacks.

Weights are read from safetensors only, since reading them runs no code.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from d3po_core.errors import D3POError
from d3po_core.paths import resolve_path

WEIGHTS = "model.safetensors"
UNSAFE = (".bin", ".ckpt", ".pt", ".pth")


class Source:
    """The locations of one scorer's files."""

    def __init__(self, scorer: str, where: str, rest: str | None) -> None:
        """Check the locations; a local folder must exist.

        Args:
            scorer: the scorer's name, for messages.
            where: folder (relative to the project) or hub id of its weights.
            rest: hub id of a configuration, a tokenizer and an image processor, in case ``where`` lacks them.
        """
        self.scorer, self.given = scorer, where
        local = resolve_path(where)
        if not local.is_dir() and (where.startswith((".", "/", "~")) or where.count("/") != 1):
            raise self.error(f"no such folder ({local}); expected a folder or a hub id")
        self.where = str(local) if local.is_dir() else where
        self._places = [self.where, *([rest] if rest else [])]

    def error(self, problem: str) -> D3POError:
        """Return an error that names the scorer and its configured location."""
        return D3POError(f"scorer {self.scorer!r}: {self.given}: {problem}")

    def find(self, filename: str, place: str | None = None) -> Path | None:
        """Return a file's path, downloaded if needed, or None if ``place`` (``where`` by default) lacks it."""
        from transformers.utils import cached_file

        with self.explained():
            found = cached_file(place or self.where, filename, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    def place_of(self, filename: str) -> str:
        """Return the first location that has a file.

        Raises:
            D3POError: no location has it.
        """
        for place in self._places:
            if self.find(filename, place):
                return place
        raise self.error(f"{filename} is missing; expected a folder written by save_pretrained (docs/scorers.md)")

    def weights(self) -> Path:
        """Return the weights file, or the index if the weights are in several files.

        Raises:
            D3POError: there are no weights, or only files that would run code.
        """
        found = self.find(WEIGHTS) or self.find(f"{WEIGHTS}.index.json")
        if found:
            return found
        folder = Path(self.where)
        unsafe = sorted(path.name for path in folder.iterdir() if path.suffix in UNSAFE) if folder.is_dir() else []
        if unsafe:
            raise self.error(
                f"holds {', '.join(unsafe)} and no {WEIGHTS}; only safetensors are read, convert it with "
                f"safetensors.torch.save_file(torch.load(file, weights_only=True), '{WEIGHTS}') (docs/scorers.md)"
            )
        raise self.error(
            f"{WEIGHTS} is missing, or the hub cannot be reached; only safetensors are read (docs/scorers.md)"
        )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn library errors about an unreadable model into a one-line error."""
        try:
            yield
        except D3POError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise self.error(f"cannot be loaded ({reason})") from None
