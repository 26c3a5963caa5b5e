"""The picture that the documentation shows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.nano import bundle
from training.nano.stills import LABEL_PX, MARGIN_PX, PICTURE_PX, PROMPTS, main, strip


def test_a_row_shows_first_and_last_frame_and_the_louder_channel() -> None:
    frames = [Image.new("RGB", (8, 8), (10 * n, 0, 0)) for n in range(25)]
    row = np.asarray(strip("a prompt", frames, torch.stack((torch.ones(4800), torch.zeros(4800)))))
    assert (row[LABEL_PX, 0].tolist(), row[LABEL_PX, -1].tolist()) == ([0, 0, 0], [240, 0, 0])
    left, right = np.split(row[LABEL_PX + PICTURE_PX + MARGIN_PX : -MARGIN_PX], 2)
    assert (left < 100).mean() > 5 * (right < 100).mean() > 0


def test_the_command_writes_a_small_picture(
    untrained_nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "WEIGHTS", untrained_nano)
    main(tmp_path / "stills.png", device="cpu")
    with Image.open(tmp_path / "stills.png") as picture:
        assert picture.height % len(PROMPTS) == 0
        assert picture.width > 4 * PICTURE_PX
