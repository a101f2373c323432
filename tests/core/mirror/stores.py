"""Stores of the tests: a virtual one whose clock the test sets, and a real S3 server on the loopback."""

from datetime import UTC, datetime, timedelta

from d3po_core.mirror.objects import Listed, Objects


class VirtualStore(Objects):
    """Objects in memory, with a clock of their own; shared by the machines of a test."""

    def __init__(self, contents: dict[str, tuple[bytes, float]], clock: list[float]) -> None:
        super().__init__(None, "s3://virtual", "c")
        self.contents, self.clock = contents, clock

    def create(self, name: str, content: bytes) -> bool:
        if name in self.contents:
            return False
        self.contents[name] = (content, float(int(self.clock[0])))  # S3 tells whole seconds
        return True

    def get(self, name: str) -> bytes | None:
        return self.contents[name][0] if name in self.contents else None

    def modified(self, name: str) -> datetime | None:
        return self._time(self.contents[name][1]) if name in self.contents else None

    def listed(self, folder: str) -> list[Listed]:
        return [
            Listed(name, len(content), self._time(at))
            for name, (content, at) in sorted(self.contents.items())
            if name.startswith(folder)
        ]

    def delete(self, name: str) -> None:
        self.contents.pop(name, None)

    @staticmethod
    def _time(at: float) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=at)
