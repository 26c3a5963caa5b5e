"""The settings of a training run; the sections of the configuration file are the fields."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffsynth.conditioning.tokens import AUDIO_LATENTS_PER_S, VIDEO_SCALE
from diffsynth.errors import RequestError
from diffsynth.pipelines.limits import MemoryLimits
from diffsynth.training.adapters import ATTENTION_TARGETS
from diffsynth.training.schedule import ScheduleConfig
from diffsynth.training.sigmas import SigmaConfig
from diffsynth.training.strategy import Role, StrategyConfig
from diffsynth.training.validation_config import ValidationSection

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""What the base computes in.  float16 is not among them: its gradients underflow."""

LORA, FULL = "lora", "full"
DEVICE, HOST = "device", "host"
OPTIMIZERS = (ADAMW, ADAMW_8BIT) = "adamw", "adamw8bit"

_BUCKET = re.compile(r"(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which model is trained, and where.

    Attributes:
        checkpoint: files, or MODEL_ID:FILE_PATTERN as on the hubs.  In a file ``nano`` names the model of the
            package, with its text model.
        gemma: text model with its tokenizer, named alike; read by ``preprocess`` alone.
        device: the best one of this machine if None.
        dtype: of the frozen weights and the arithmetic, bfloat16 or float32.
    """

    checkpoint: tuple[str, ...]
    gemma: str = "google/gemma-3-12b-it-qat-q4_0-unquantized:model-*.safetensors"
    device: str | None = None
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself.  Raises RequestError for an unknown name."""
        if self.dtype not in DTYPES:
            raise RequestError(f"dtype={self.dtype!r} is not known", hint=", ".join(DTYPES))
        return DTYPES[self.dtype]

    def check(self) -> None:
        """Raise RequestError, naming the setting, for a value that cannot work."""
        if not self.checkpoint:
            raise RequestError("checkpoint=[] names no model", hint='checkpoint = "FILE"')
        _ = self.torch_dtype


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size that clips are brought to, in pixels and frames."""

    width: int
    height: int
    frames: int

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """``WIDTHxHEIGHTxFRAMES``.

        Raises:
            RequestError: other text, or a size that no latent has.
        """
        match = _BUCKET.fullmatch(text)
        if match is None:
            raise RequestError(f"buckets={text!r}", hint='"WIDTHxHEIGHTxFRAMES", "768x512x97" for instance')
        width, height, frames = (int(number) for number in match.groups())
        time, rows, columns = VIDEO_SCALE
        if width < columns or height < rows or width % columns or height % rows or frames % time != 1:
            raise RequestError(
                f"buckets={text!r} is no size of a latent",
                hint=f"width and height multiples of {rows}, frames one more than a multiple of {time}",
            )
        return cls(width, height, frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """The clips, and the samples that they become.

    Attributes:
        source: CSV, JSON or JSONL file, or a folder of clips with a text file of the same name beside each.
        folder: where the samples lie.
        buckets: sizes as WIDTHxHEIGHTxFRAMES; a clip takes the one nearest in aspect that it is long enough
            for.
        audio_durations: seconds, instead of buckets where only sound is encoded; a sound takes the longest
            that it is long enough for.
        trigger: put in front of every caption.
        video: make latents of the pictures.
        audio: make latents of the sound; clips without a sound track are left out and named.
        reference_scale: width and height of the clips, divided by those of their reference clips; 0 without
            references.
        reference_temporal_scale: frames of the clips per frame of their reference clips, the first ones left
            out; of a reference clip as long as its clip so many are taken.
        audio_reference: the clips have reference sounds.
        video_masks, audio_masks: folders with a mask for every clip, files of the names of the clips; a mask
            that the list of clips names comes first.
    """

    source: Path
    folder: Path
    buckets: tuple[str, ...] = ()
    audio_durations: tuple[float, ...] = ()
    trigger: str = ""
    video: bool = True
    audio: bool = True
    reference_scale: int = 0
    reference_temporal_scale: int = 1
    audio_reference: bool = False
    video_masks: Path | None = None
    audio_masks: Path | None = None

    @property
    def sizes(self) -> tuple[Bucket, ...]:
        """The buckets; none with audio_durations.  Raises RequestError for an impossible one, or a lack."""
        if not self.buckets and not self.audio_durations:
            raise RequestError("buckets is missing", hint='buckets = ["768x512x97"]')
        return tuple(Bucket.parse(text) for text in self.buckets)

    def check(self) -> None:
        """Raise RequestError, naming the setting, for a value that cannot work."""
        scale, cell = self.reference_scale, VIDEO_SCALE[1]
        if scale < 0 or (scale and not self.video):
            raise RequestError(
                f"reference_scale={scale}, video={self.video}", hint="reference_scale = 1, video = true"
            )
        time = self.reference_temporal_scale
        if time < 1 or (time > 1 and not scale):
            raise RequestError(
                f"reference_temporal_scale={time}, reference_scale={scale}", hint="reference_scale = 1"
            )
        if self.audio_reference and not self.audio:
            raise RequestError("audio_reference with audio=False", hint="audio = true")
        self._check_durations()
        if not self.video and not self.audio:
            raise RequestError("video=False and audio=False: nothing is encoded", hint="audio = true")
        for bucket in self.sizes:
            if scale and (bucket.width % (cell * scale) or bucket.height % (cell * scale)):
                raise RequestError(
                    f"reference_scale={scale} with a bucket of {bucket.width}x{bucket.height}",
                    hint=f"width and height multiples of {cell * scale}",
                )
            if (bucket.frames - 1) % (VIDEO_SCALE[0] * time):
                raise RequestError(
                    f"bucket of {bucket.frames} frames with reference_temporal_scale={time}",
                    hint=f"frames one more than a multiple of {VIDEO_SCALE[0] * time}",
                )

    def _check_durations(self) -> None:
        stated = f"audio_durations={list(self.audio_durations)}"
        if self.audio_durations and (self.video or not self.audio or self.buckets):
            raise RequestError(
                f"{stated} with video={self.video}, audio={self.audio}, buckets={list(self.buckets)}: these "
                "are lengths of sounds alone",
                hint="video = false, audio = true, no buckets",
            )
        if not all(1 / AUDIO_LATENTS_PER_S <= seconds < float("inf") for seconds in self.audio_durations):
            raise RequestError(stated, hint="seconds, [5.0] for instance")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSection:
    """The adapter.

    Attributes:
        rank: of every pair of factors.
        alpha: the product counts ``alpha / rank`` times; the rank if None.
        targets: names of linear layers or their last parts.
    """

    rank: int = 32
    alpha: float | None = None
    targets: tuple[str, ...] = ATTENTION_TARGETS

    def check(self) -> None:
        """Raise RequestError for numbers that make no adapter."""
        if self.rank < 1:
            raise RequestError(f"rank={self.rank}", hint="1 or more")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise RequestError(f"alpha={self.alpha}", hint="a number above 0, or left out")
        if not self.targets:
            raise RequestError("targets=[] trains nothing", hint=f"targets = {list(ATTENTION_TARGETS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSection:
    """The loop.

    Attributes:
        optimizer: ``adamw``, or ``adamw8bit`` where bitsandbytes is installed.
        mode: ``lora``, or ``full`` for all weights of the transformer, which then are float32.
        steps: of the optimiser.
        batch_size: samples of equal shapes per pass.
        gradient_accumulation: passes per step, those of all processes together.
        learning_rate: the highest.
        weight_decay: of AdamW.
        betas: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        gradient_checkpointing: keep only what lies between the blocks, and compute the rest twice.
        ema_decay: share of the old mean in each step, 0.999 for instance; 0 keeps no mean.
        seed: decides the adapter's start, the order and all draws.
    """

    mode: str = LORA
    optimizer: str = ADAMW
    steps: int = 2000
    batch_size: int = 1
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = True
    ema_decay: float = 0.0
    seed: int = 42

    def check(self) -> None:
        """Raise RequestError, naming the setting, for a value that cannot work."""
        if self.mode not in {LORA, FULL}:
            raise RequestError(f"mode={self.mode!r} is not known", hint=f"{LORA}, {FULL}")
        if self.optimizer not in OPTIMIZERS:
            raise RequestError(f"optimizer={self.optimizer!r} is not known", hint=", ".join(OPTIMIZERS))
        for name in ("steps", "batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}={getattr(self, name)}", hint="1 or more")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RequestError(f"{name}={getattr(self, name)}", hint="0 or more")
        if not 0 < self.learning_rate < float("inf"):
            raise RequestError(f"learning_rate={self.learning_rate}", hint="1e-4")
        for name, shares in (("betas", self.betas), ("ema_decay", (self.ema_decay,))):
            if not all(0 <= share < 1 for share in shares):
                raise RequestError(f"{name}={getattr(self, name)}", hint="0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySection:
    """What the training of an adapter may take, and before it the encoding of its data.

    With any of the first three, networks wait on the host and come to the device as they are used: the blocks
    of the frozen base forward and backward.

    Attributes:
        vram_limit: GB of 2**30 bytes, "auto" (what is free now), or the name of a card such as "24gb".
        host_limit: GB of host memory for each process; None: what is free now, in equal parts.
        storage: format of the base and the text model: bf16, f16, f32, fp8, int8, int4, e4m3, e5m2; None: as
            for generation, int8 or what the limit suggests.
        activations: where the hidden states between the blocks wait for the way back, ``device`` or ``host``;
            None: on the device, unless the memory manager finds that only the host has room.
        cache: whether converted networks are kept on the disk.
    """

    vram_limit: float | str | None = None
    host_limit: float | None = None
    storage: str | None = None
    activations: str | None = None
    cache: bool = True

    @property
    def limits(self) -> MemoryLimits:
        """As for a pipeline.  Raises RequestError for a value that cannot work."""
        return MemoryLimits(
            vram_limit=self.vram_limit, host_limit=self.host_limit, storage=self.storage, cache=self.cache
        )

    @property
    def managed(self) -> bool:
        """Whether the memory manager brings the base."""
        return {self.vram_limit, self.host_limit, self.storage} != {None}

    def check(self) -> None:
        """Raise RequestError, naming the setting, for a value that cannot work."""
        if self.activations not in (None, DEVICE, HOST):
            raise RequestError(f"activations={self.activations!r} is not known", hint=f"{DEVICE}, {HOST}")
        if self.managed:
            self.limits.asks_for_management({})


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSection:
    """What is written.

    Attributes:
        folder: adapters, the state to go on from, and metrics.csv.
        save_every: steps between checkpoints; the last step is saved too.
        dtype: of the adapter files.
    """

    folder: Path
    save_every: int = 250
    dtype: str = "bfloat16"

    def check(self) -> None:
        """Raise RequestError, naming the setting, for a value that cannot work."""
        if self.save_every < 1:
            raise RequestError(f"save_every={self.save_every}", hint="1 or more steps")
        if self.dtype not in DTYPES:
            raise RequestError(f"dtype={self.dtype!r} is not known", hint=", ".join(DTYPES))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole run, from clips to an adapter."""

    model: ModelSection
    data: DataSection
    output: OutputSection
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    sigmas: SigmaConfig = field(default_factory=SigmaConfig)
    lora: LoraSection = field(default_factory=LoraSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    validation: ValidationSection = field(default_factory=ValidationSection)
    memory: MemorySection = field(default_factory=MemorySection)

    def check(self) -> None:
        """Make sure that every value can work, as far as that shows without any file.

        Raises:
            RequestError: naming the section and the setting.
        """
        checks: dict[str, Callable[[], object]] = {
            "model": self.model.check,
            "data": self.data.check,
            "output": self.output.check,
            "strategy": self.strategy.check,
            "sigmas": self.sigmas.make,
            "lora": self.lora.check,
            "training": self.training.check,
            "schedule": lambda: self.schedule.check(self.training.steps),
            "validation": self.validation.check,
            "memory": self.memory.check,
        }
        for section, check in checks.items():
            try:
                check()
            except RequestError as error:
                raise RequestError(f"[{section}] {error.message}", hint=error.hint) from error
        if self.strategy.reference_probability and not self.data.reference_scale:
            raise RequestError(
                f"[strategy] reference_probability={self.strategy.reference_probability} without [data] "
                "reference_scale",
                hint="reference_scale = 1",
            )
        if self.strategy.audio_reference_probability and not self.data.audio_reference:
            raise RequestError(
                f"[strategy] audio_reference_probability={self.strategy.audio_reference_probability} without "
                "[data] audio_reference",
                hint="audio_reference = true",
            )
        if self.data.audio_durations and self.strategy.video != Role.NONE:
            raise RequestError(
                f"[strategy] video={str(self.strategy.video)!r} with [data] audio_durations: no pictures",
                hint='video = "none"',
            )
        if self.memory.managed and self.training.mode == FULL:
            raise RequestError(
                f"[memory] with [training] mode={FULL!r}: only a frozen base comes block by block",
                hint='mode = "lora"',
            )
        if (self.memory.managed or self.memory.activations) and not self.training.gradient_checkpointing:
            raise RequestError(
                "[memory] without gradient_checkpointing: all blocks would have to stay",
                hint="gradient_checkpointing = true",
            )
        if self.training.mode == FULL and self.model.torch_dtype != torch.float32:
            raise RequestError(
                f"[training] mode={FULL!r} with [model] dtype={self.model.dtype!r}: steps are lost",
                hint='dtype = "float32"',
            )
