"""What a run says of itself while it goes: a table, and TensorBoard where it is installed."""

import csv
import importlib.util
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from diffsynth.training.conditions import AUDIO, VIDEO
from diffsynth.training.strategy import BatchLoss
from diffsynth.utils.files import write_file

QUARTERS = 4
"""Losses are also told apart by quarters of the noise level: each behaves differently."""

_QUARTER_NAMES = [f"{name}_loss_quarter_{q}" for name in (VIDEO, AUDIO) for q in range(1, QUARTERS + 1)]
COLUMNS = (
    *("step", "loss", "video_loss", "audio_loss"),
    *("learning_rate", "gradient_norm", "seconds", "bytes_to_device"),
    *_QUARTER_NAMES,
)


class LossMeans:
    """Means over all passes of a step."""

    def __init__(self, losses: Iterable[BatchLoss] = ()) -> None:
        """Args: losses: of the passes, in the end: reading one waits until the device has computed it."""
        self._values: dict[str, list[float]] = defaultdict(list)
        for loss in losses:
            self._add(loss)

    def _add(self, loss: BatchLoss) -> None:
        self._values["loss"].append(float(loss.total))
        for name, pair in ((VIDEO, loss.video), (AUDIO, loss.audio)):
            if pair is None:
                continue
            values, sigmas = torch.stack(pair).tolist()
            self._values[f"{name}_loss"].append(sum(values) / len(values))
            for value, sigma in zip(values, sigmas, strict=True):
                quarter = min(int(sigma * QUARTERS), QUARTERS - 1) + 1
                self._values[f"{name}_loss_quarter_{quarter}"].append(value)

    @classmethod
    def merged(cls, others: Iterable["LossMeans"]) -> "LossMeans":
        """Over the passes of all."""
        merged = cls()
        for other in others:
            for name, values in other._values.items():
                merged._values[name] += values
        return merged

    def means(self) -> dict[str, float]:
        """By column; only those that something was added to."""
        return {name: sum(values) / len(values) for name, values in self._values.items()}


class Metrics(Protocol):
    """Where the numbers of a step go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers after a step."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class CsvMetrics:
    """``metrics.csv``: a row per step, columns as in :data:`COLUMNS`; some stay empty."""

    def __init__(self, path: Path, step: int) -> None:
        """Args: step: rows of later steps, which a stopped run left, are dropped."""
        rows = _rows(path)
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(row for row in rows if int(row["step"]) <= step)
        write_file(path, text.getvalue())
        self._file = path.open("a", encoding="utf-8", newline="", buffering=1)
        self._table = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Metrics`."""
        self._table.writerow({"step": step, **{name: f"{value:.6g}" for name, value in values.items()}})

    def close(self) -> None:
        """See :class:`Metrics`."""
        self._file.close()


class TensorBoardMetrics:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Metrics`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See :class:`Metrics`."""
        self._writer.close()


def open_metrics(output: Path, step: int) -> list[Metrics]:
    """What the numbers of a run go to that goes on after ``step``."""
    metrics: list[Metrics] = [CsvMetrics(output / "metrics.csv", step)]
    if importlib.util.find_spec("tensorboard") is not None:
        metrics.append(TensorBoardMetrics(output / "tensorboard", step))
    return metrics


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # The last row of a run that was killed may be cut off.
    return [row for row in rows if row.get("step", "").isdigit() and None not in row.values()]
