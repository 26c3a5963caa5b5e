"""Trains by one of the configurations of this folder, on clips that are drawn for it:

    python train.py LTX-2-T2AV-LoRA

The folder LTX-2-T2AV-LoRA is made where you are, with a copy of the configuration in it.  For clips of yours
edit that copy and its clips; from then on ``diffsynth preprocess`` and ``diffsynth train`` do the same.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from clips import FRAME_RATE, draw

from diffsynth.training.config import Bucket, TrainConfig
from diffsynth.training.config_file import read_config
from diffsynth.training.preprocess import preprocess
from diffsynth.training.trainer import TrainingStep, train

HERE = Path(__file__).parent


def main() -> None:
    """Draw, encode, train; a second run goes on where the first one stopped."""
    asked = options()
    folder = Path(asked.name)
    folder.mkdir(exist_ok=True)
    copy = folder / "run.toml"
    if not copy.exists():
        shutil.copy(HERE / f"{asked.name}.toml", copy)
    config = adjusted(read_config(copy), asked)
    size = config.validation
    draw(folder, size.width, size.height, size.frames)
    preprocess(config)
    states = (config.output.folder / "checkpoints").glob("training_state_*")
    print(train(config, resume=any(states), on_step=show))


def show(step: TrainingStep) -> None:
    """A line every ten steps."""
    if step.values and (step.step % 10 == 0 or step.step == step.steps):
        print(f"step {step.step} of {step.steps}: loss {step.values['loss']:.4f}", flush=True)


def adjusted(config: TrainConfig, asked: argparse.Namespace) -> TrainConfig:
    """The configuration with what the command line says instead."""
    model = {name: getattr(asked, name) for name in ("device", "dtype") if getattr(asked, name)}
    config = replace(config, model=replace(config.model, **model))
    if asked.steps:
        config = replace(config, training=replace(config.training, steps=asked.steps))
    if asked.bucket:
        size = Bucket.parse(asked.bucket)
        length = {"buckets": (asked.bucket,)}
        if config.data.audio_durations:
            length = {"audio_durations": (size.frames / FRAME_RATE,)}
        config = replace(config, data=replace(config.data, **length))
        small = {"width": size.width, "height": size.height, "frames": size.frames}
        config = replace(config, validation=replace(config.validation, **small))
    if asked.validation_steps:
        few = replace(config.validation, steps=asked.validation_steps, cfg_scale=3.0)
        config = replace(config, validation=few)
    return config


def options() -> argparse.Namespace:
    """Of the command line."""
    names = sorted(path.stem for path in HERE.glob("LTX-*.toml"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--steps", type=int, help="instead of what the configuration says")
    parser.add_argument("--bucket", help="WIDTHxHEIGHTxFRAMES of samples and validation clips")
    parser.add_argument("--validation-steps", type=int, help="of denoising, then with plain guidance")
    parser.add_argument("--device", help="cuda, cpu, ...")
    parser.add_argument("--dtype", help="bfloat16 or float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
