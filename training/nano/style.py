"""The style LoRA of nano, by the package's own trainer: the run of the tutorial, on framed clips."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffsynth import nano
from diffsynth.loader import ModelConfig
from diffsynth.nano.judge import Summary, is_framed, judge
from diffsynth.nano.world import FRAMED, Description, held_out_descriptions
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.training.config import ModelSection, TrainConfig
from diffsynth.training.config_file import read_config
from diffsynth.training.preprocess import preprocess
from diffsynth.training.trainer import TrainingStep
from diffsynth.training.trainer import train as train_lora
from training.nano.dataset import write_clips
from training.nano.dit import GEMMA
from training.nano.parts import files_by_kind

NAME = "framed_lora"
EXAMPLE = Path(__file__).parents[2] / "examples" / "ltx2" / "model_training" / "nano_framed_lora.toml"
_FRAMES = 25
_REPORT_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StyleSettings:
    """What the configuration of the tutorial does not state."""

    clips: int = 24
    side: int = 256
    steps: int | None = None
    """None: as the configuration says."""
    judged_clips: int = 8
    seed: int = 0


def train(settings: StyleSettings, folder: Path, device: str) -> None:
    """The stage: clips, samples, training, and clips with and without the LoRA, which are judged.

    The networks are those of the folder, or nano's of the package where it has none.
    """
    home = folder / FRAMED
    write_clips(home, settings.clips, framed=True, side=settings.side, num_frames=_FRAMES, seed=settings.seed)
    config = configuration(settings, folder, device)
    report = preprocess(config)
    print(f"style: {report.made} samples made, {report.kept} were there", flush=True)
    shutil.rmtree(config.output.folder, ignore_errors=True)
    begun, told = time.monotonic(), 0.0

    def tell(step: TrainingStep) -> None:
        nonlocal told
        if step.values and time.monotonic() - told >= _REPORT_S:
            told = time.monotonic()
            print(f"style: step {step.step}/{step.steps} loss {step.values['loss']:.4f}", flush=True)

    made = train_lora(config, on_step=tell)
    seconds = time.monotonic() - begun
    shutil.copyfile(made, folder / f"{NAME}.safetensors")
    notes: dict[str, Any] = {
        "configuration": EXAMPLE.name,
        "clips": settings.clips,
        "steps": config.training.steps,
        "seconds": round(seconds, 1),
        "seed": settings.seed,
    }
    if settings.judged_clips:
        notes |= judged(config.model, made, settings.judged_clips)
    (folder / f"{NAME}.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def configuration(settings: StyleSettings, folder: Path, device: str) -> TrainConfig:
    """That of the tutorial, with the networks of ``folder`` where it has any."""
    home = folder / FRAMED
    text = EXAMPLE.read_text(encoding="utf-8")
    parts = [str(path.absolute()) for path in dict.fromkeys(files_by_kind(folder).values())]
    if parts:
        gemma = json.dumps(str((folder / GEMMA).absolute()))
        text = text.replace(f'"{nano.NAME}"', f"{json.dumps(parts)}\ngemma = {gemma}")
    (home / "lora.toml").write_text(text, encoding="utf-8")
    config = read_config(home / "lora.toml")
    steps = settings.steps or config.training.steps
    return replace(
        config,
        model=replace(config.model, device=device),
        data=replace(config.data, buckets=(f"{settings.side}x{settings.side}x{_FRAMES}",)),
        training=replace(config.training, steps=steps),
    )


def judged(model: ModelSection, lora: Path, count: int) -> dict[str, Any]:
    """Shares of clips of held-out captions that are framed and right, without the LoRA and with it."""
    # A white frame does not show on a white background.
    descriptions = [d for d in held_out_descriptions(4 * count) if d.background != "white"][:count]
    pipe = LTX2AudioVideoPipeline.from_pretrained(
        torch_dtype=model.torch_dtype,
        device=model.device,
        model_configs=[ModelConfig(path=path) for path in (*model.checkpoint, model.gemma)],
        tokenizer_config=ModelConfig(path=model.gemma),
    )
    found: dict[str, Any] = {"without": _shares(pipe, descriptions, framed=False)}
    pipe.load_lora(pipe.dit, lora)
    found["with"] = _shares(pipe, descriptions, framed=True)
    for name, shares in found.items():
        print(f"style: {name} the LoRA: {shares}", flush=True)
    return found


def _shares(
    pipe: LTX2AudioVideoPipeline, descriptions: Sequence[Description], *, framed: bool
) -> Mapping[str, float]:
    """Percentages."""
    verdicts, frames = [], []
    for number, description in enumerate(descriptions):
        pictures, sound = pipe(
            f"{FRAMED} {description.caption(number)}",
            seed=number,
            progress_bar_cmd=lambda steps: steps,
            **nano.settings(),
        )
        assert pictures is not None, "a video was asked for"
        assert sound is not None, "with its sound"
        video = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        rate: int = sound.sampling_rate  # type: ignore[attr-defined]
        frames.append(is_framed(video))
        verdicts.append(judge(video, sound, rate, description, framed=framed))
    return {FRAMED: 100 * sum(frames) / len(frames), **Summary.of(verdicts).percent}
