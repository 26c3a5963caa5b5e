"""The units of a generation.  Each names the parts it needs, does one thing, and can be run alone."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from diffsynth.conditioning.items import apply_items
from diffsynth.conditioning.state import ModalityState
from diffsynth.conditioning.text import PromptContext, contexts_from_features, prompt_features
from diffsynth.conditioning.tokens import video_latent_shape
from diffsynth.device import exact_float32
from diffsynth.models.ltx2.tiling import decode_plan
from diffsynth.models.ltx2.upsampler import upsample_latent
from diffsynth.models.ltx2.video_tiling import decode_tiles
from diffsynth.models.ltx2.video_vae import to_uint8
from diffsynth.models.ltx2.vocoder import decode_audio
from diffsynth.pipelines.checks import tile_config
from diffsynth.pipelines.costs.transformer import free_chunk
from diffsynth.pipelines.denoiser import Denoiser
from diffsynth.pipelines.encode_inputs import kept_sound
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.progress import Denoised, Progress
from diffsynth.pipelines.sample import sample
from diffsynth.pipelines.sanity import check_finite_values, tell_plain_frames
from diffsynth.pipelines.stages import Stage, guided, positive_only
from diffsynth.pipelines.state import GenerationState, Unfinished
from diffsynth.request import GenerateRequest
from diffsynth.sampling.loops import Step
from diffsynth.sampling.noise import add_noise
from diffsynth.utils.audio import Waveform
from diffsynth.utils.images import frames_to_images


class Unit(Protocol):
    """One step of a generation."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the parts that must be there."""

    def run(self, parts: Parts, state: GenerationState) -> None:
        """Read from the state and write into it."""


@dataclass(frozen=True, slots=True)
class EncodePrompts:
    """Prompt, and negative prompt if anything is guided -> contexts."""

    needs: tuple[str, ...] = ("tokenizer", "text_encoder", "text_encoder_post_modules")

    def run(self, parts: Parts, state: GenerationState) -> None:
        """Encode both prompts in one pass through the text model, as far as they are not known."""
        request = state.prompted
        prompts = prompts_of(request)
        state.report("encode prompt", 0, 1)
        contexts = state.contexts
        contexts |= known_contexts(parts, request)
        missing = unknown_prompts(request, contexts)
        if missing:
            contexts |= dict(zip(missing, encode_with(parts, missing), strict=True))
        state.positive = contexts[prompts[0]]
        state.negative = contexts[prompts[1]] if len(prompts) > 1 else None
        state.report("encode prompt", 1, 1)


@dataclass(frozen=True, slots=True)
class Denoise:
    """Noise, conditionings and prompt -> the latents of a stage.

    ``lora``: makes what is entered for the length of the stage, such as the distilled LoRA of the second;
    once more when the stage has to be taken up again.
    """

    stage: Stage
    lora: Callable[[], AbstractContextManager[object]] = nullcontext
    needs: tuple[str, ...] = ("dit",)

    def run(self, parts: Parts, state: GenerationState) -> None:
        """Replace ``video_latent`` and ``audio_latent`` by the result of the stage."""
        assert parts.dit is not None
        assert state.positive is not None
        stage, conventions = self.stage, state.conventions
        if state.unfinished is None:
            state.unfinished = self._start(parts, state)
        video, audio = state.unfinished.video, state.unfinished.audio
        longest = max(stream.num_tokens for stream in (video, audio) if stream is not None)
        denoiser = Denoiser(
            transformer=parts.dit,
            positive=state.positive.to(parts.device),
            negative=None if state.negative is None else state.negative.to(parts.device),
            video_guidance=stage.video_guidance,
            audio_guidance=stage.audio_guidance,
            conventions=conventions,
            dtype=parts.dtype,
            positive_only=positive_only(state.request, conventions),
            chunk_tokens=free_chunk(longest),
            estimates=state.unfinished.estimates,
        )
        on_step = partial(self._on_step, state, denoiser)
        with self.lora(), parts.memory.phase(f"denoise {stage.number}"):
            video, audio = sample(
                stage, state, denoiser, state.unfinished, device=parts.device, on_step=on_step
            )
        for stream in filter(None, (video, audio)):
            check_finite_values(f"denoise stage {stage.number}", stream.latent, parts.dtype)
        state.unfinished = None
        state.video_latent = None if video is None else video.unpatchified()
        state.audio_latent = None if audio is None else audio.unpatchified()
        state.video_items = []

    def _start(self, parts: Parts, state: GenerationState) -> Unfinished:
        """The noisy states."""
        video = None if state.request.audio_only else self._noisy(self._video(parts, state), state)
        audio = None
        if state.audio_shape is not None:
            audio = self._noisy(self._audio(state.audio_shape, parts, state), state)
        self._tell(state, 0, Denoised(stage=self.stage, video=video, audio=audio))
        return Unfinished(video=video, audio=audio, next_step=0)

    def _on_step(self, state: GenerationState, denoiser: Denoiser, step: Step[ModalityState]) -> None:
        state.unfinished = Unfinished(
            video=step.video,
            audio=step.audio,
            next_step=step.index + 1,
            carry=step.carry,
            estimates=denoiser.estimates,
        )
        denoised = Denoised(
            stage=self.stage,
            video=step.video,
            audio=step.audio,
            sigma=step.sigma,
            video_x0=step.video_x0,
            audio_x0=step.audio_x0,
        )
        self._tell(state, step.index + 1, denoised)

    def _tell(self, state: GenerationState, done: int, denoised: Denoised) -> None:
        phase = f"denoise stage {self.stage.number}"
        state.on_progress(Progress(phase=phase, done=done, total=self.stage.steps, denoised=denoised))

    def _video(self, parts: Parts, state: GenerationState) -> ModalityState:
        assert parts.dit is not None
        grid = video_latent_shape(state.request.num_frames, self.stage.height, self.stage.width)
        video = ModalityState.video(
            (1, parts.dit.config.in_channels, *grid),
            state.request.frame_rate,
            latent=state.video_latent,
            device=parts.device,
        )
        return apply_items(video, state.video_items, state.conventions)

    def _audio(self, shape: tuple[int, int, int, int], parts: Parts, state: GenerationState) -> ModalityState:
        audio = ModalityState.audio(shape, latent=state.audio_latent, device=parts.device)
        return apply_items(audio, state.audio_items, state.conventions)

    def _noisy(self, stream: ModalityState, state: GenerationState) -> ModalityState:
        return add_noise(stream, state.noise, self.stage.noise_scale, state.conventions.noiser)


@dataclass(frozen=True, slots=True)
class Upsample:
    """The video latent of the first stage -> twice the height and width."""

    needs: tuple[str, ...] = ("upsampler", "video_statistics")

    def run(self, parts: Parts, state: GenerationState) -> None:
        """Replace ``video_latent``."""
        assert parts.upsampler is not None
        assert parts.video_statistics is not None
        assert state.video_latent is not None
        state.report("upsample", 0, 1)
        latent = state.video_latent.to(device=parts.device, dtype=parts.dtype)
        with parts.memory.phase("upsample"):
            state.video_latent = upsample_latent(parts.upsampler, parts.video_statistics, latent).float()
        state.report("upsample", 1, 1)


@dataclass(frozen=True, slots=True)
class DecodeVideo:
    """The video latent -> frames; tile by tile they leave the device as 8-bit pictures."""

    needs: tuple[str, ...] = ("video_vae_decoder",)

    def run(self, parts: Parts, state: GenerationState) -> None:
        """Fill ``frames``."""
        assert parts.video_vae_decoder is not None
        assert state.video_latent is not None
        latent = state.video_latent.to(device=parts.device, dtype=parts.dtype)
        frames, height, width = latent.shape[2:]
        pictures: list[Image.Image] = []
        with parts.memory.phase("decode video") as phase:
            tiling = tile_config(state.request, phase.settings)
            state.report("decode video", 0, decode_plan((frames, height, width), tiling).num_tiles)
            for chunk in decode_tiles(
                parts.video_vae_decoder,
                latent,
                tiling,
                accumulate_on=torch.device("cpu"),
                on_tile=lambda done, total: state.report("decode video", done, total),
            ):
                check_finite_values("decode video", chunk, parts.dtype)
                pictures += _as_pictures(chunk)
        tell_plain_frames(pictures)
        state.frames = pictures


@dataclass(frozen=True, slots=True)
class DecodeAudio:
    """The audio latent -> sound; a sound that was given and kept whole is handed back as it came."""

    needs: tuple[str, ...] = ("audio_vae_decoder", "audio_vocoder")

    def run(self, parts: Parts, state: GenerationState) -> None:
        """Fill ``waveform``."""
        assert parts.audio_vae_decoder is not None
        assert parts.audio_vocoder is not None
        assert state.audio_latent is not None
        state.waveform = kept_sound(state)
        if state.waveform is not None:
            return
        state.report("decode audio", 0, 1)
        latent = state.audio_latent.to(device=parts.device, dtype=parts.dtype)
        with parts.memory.phase("decode audio"), exact_float32():
            samples = decode_audio(parts.audio_vae_decoder, parts.audio_vocoder, latent).cpu()
        check_finite_values("decode audio", samples, parts.dtype)
        state.waveform = Waveform(samples, parts.audio_vocoder.output_sampling_rate)
        state.report("decode audio", 1, 1)


def encode_with(parts: Parts, prompts: Sequence[str]) -> list[PromptContext]:
    """Encode prompts with the networks of a pipeline, and store them in its cache; on the CPU."""
    assert parts.tokenizer is not None
    assert parts.text_encoder is not None
    assert parts.text_encoder_post_modules is not None
    connectors = parts.text_encoder_post_modules
    with parts.memory.phase("text") as phase:
        features = prompt_features(
            parts.text_encoder,
            connectors,
            parts.tokenizer,
            prompts,
            device=parts.device,
            dtype=parts.dtype,
            slices=phase.slices,
        )
    with parts.memory.phase("connectors"):
        contexts = [c.to("cpu") for c in contexts_from_features(connectors, features)]
    if parts.prompt_cache is not None:
        for prompt, context in zip(prompts, contexts, strict=True):
            parts.prompt_cache.put(prompt, context)
    return contexts


def prompts_of(request: GenerateRequest) -> list[str]:
    """The prompt, and the negative one if anything is guided."""
    return [request.prompt, request.negative_prompt] if guided(request) else [request.prompt]


def known_contexts(parts: Parts, request: GenerateRequest) -> dict[str, PromptContext]:
    """By prompt the encodings of earlier runs: with all of them there, the text model is never loaded."""
    cache = parts.prompt_cache
    found = {} if cache is None else {prompt: cache.get(prompt) for prompt in prompts_of(request)}
    return {prompt: context for prompt, context in found.items() if context is not None}


def unknown_prompts(request: GenerateRequest, contexts: Mapping[str, PromptContext]) -> list[str]:
    """The prompts that have to be encoded, each once; one that has yet to be written is not among them."""
    prompts = prompts_of(request)[1 if request.enhance_prompt else 0 :]
    return [prompt for prompt in dict.fromkeys(prompts) if prompt not in contexts]


def _as_pictures(chunk: Tensor) -> list[Image.Image]:
    """(1, 3, f, H, W) float -> f pictures."""
    return frames_to_images(to_uint8(chunk[0]).cpu().permute(1, 2, 3, 0))
