"""A hub in memory: its files, what was asked of it, and the ways in which a real one fails."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth.loader.download import RemoteFile


@dataclass
class FakeHub:
    """``contents`` by path; ``sizes`` overrides what the list states; ``stops`` interrupts inside a file."""

    contents: Mapping[str, bytes]
    name: str = "modelscope"
    sizes: Mapping[str, int] = field(default_factory=dict)
    stops: dict[str, BaseException] = field(default_factory=dict)
    listed: int = 0
    downloads: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)

    def list_files(self, model_id: str) -> list[RemoteFile]:
        self.listed += 1
        return [RemoteFile(path, self.sizes.get(path, len(data))) for path, data in self.contents.items()]

    def download(self, model_id: str, path: str, into: Path) -> Path:
        """Writes a partial file first, as the real libraries do, and goes on with one that is there."""
        self.downloads.append(path)
        data = self.contents[path]
        final = into / path
        partial = final.with_name(final.name + ".incomplete")
        partial.parent.mkdir(parents=True, exist_ok=True)
        start = partial.stat().st_size if partial.exists() else 0
        self.resumed.append(start)
        with partial.open("ab") as file:
            file.write(data[start : len(data) // 2])
            file.flush()
            if path in self.stops:
                raise self.stops.pop(path)
            file.write(data[max(start, len(data) // 2) :])
        return partial.rename(final)
