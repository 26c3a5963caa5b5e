"""What can be known of a request before anything runs, given the parts of a pipeline: sizes and devices."""

import logging
from collections.abc import Mapping, Sequence
from itertools import count
from math import prod

import torch

from diffsynth.conditioning.tokens import audio_latent_frames, video_latent_shape
from diffsynth.device import resolve_device
from diffsynth.errors import RequestError
from diffsynth.models.ltx2.tiling import TileConfig
from diffsynth.models.ltx2.upsampler import NORM_GROUPS
from diffsynth.models.ltx2.video_tiling import decode_tiles
from diffsynth.pipelines.assemble import MODEL_NAMES, is_spatial_x2
from diffsynth.pipelines.negative_prompt import NEGATIVE_PROMPT
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.stages import Stage, guided
from diffsynth.request import SPATIAL_STEP_PX, TEMPORAL_STEP, GenerateRequest, GuidanceParams
from diffsynth.sampling.conventions import MaskedStep, get_conventions

logger = logging.getLogger(__name__)

MAX_DURATION_S = 20
"""The longest that the released models were made for; a few frames more do not matter."""


def check_sizes(request: GenerateRequest, parts: Parts, stages: Sequence[Stage]) -> None:
    """Sizes that the autoencoders cannot work with, whole or in tiles.

    Raises:
        RequestError: it names the argument.
    """
    _check_smallest(request, parts)
    if len(stages) > 1 and not request.audio_only:
        _check_upsampled(request, parts)
    if audio_latent_frames(request.num_frames, request.frame_rate) < 1:
        raise RequestError(
            f"num_frames={request.num_frames} at frame_rate={request.frame_rate} is too short for sound",
            hint=f"num_frames={_shortest(request.frame_rate)} or more",
        )
    if not request.tiled:
        return
    tiling = tile_config(request)
    moving = bool(request.in_context_videos) or request.retake_video is not None
    if moving or request.input_images:
        for stage in stages:
            tiling.for_official_encode((request.num_frames if moving else 1, stage.height, stage.width))
    if parts.video_vae_decoder is not None and not request.audio_only:
        grid = video_latent_shape(request.num_frames, request.height, request.width)
        # Nothing is decoded: the sizes are checked when the stream of chunks is made.
        decode_tiles(parts.video_vae_decoder, torch.empty(1, 1, *grid, device="meta"), tiling)


def check_sampler(request: GenerateRequest) -> None:
    """Whether the sampler knows what the conventions do with partial masks.

    Raises:
        RequestError: unknown conventions, or a sampler that cannot follow them.
    """
    conventions = get_conventions(request.conventions)
    if request.sampler != "euler" and conventions.masked_step is not MaskedStep.X0_BLEND:
        raise RequestError(
            f"sampler={request.sampler!r} does not follow conventions={request.conventions!r}",
            hint="sampler='euler', or conventions='official'",
        )


def check_blocks(request: GenerateRequest, parts: Parts) -> None:
    """Whether the transformer has the blocks that guidance names.

    Raises:
        RequestError: it has fewer.
    """
    num_blocks = 0 if parts.dit is None else parts.dit.config.num_layers
    for name in ("video_guidance", "audio_guidance"):
        params: GuidanceParams | None = getattr(request, name)
        if num_blocks and params is not None and max(params.stg_blocks, default=0) >= num_blocks:
            raise RequestError(
                f"{name}.stg_blocks={list(params.stg_blocks)}: this model has {num_blocks} blocks",
                hint=f"blocks from 0 to {num_blocks - 1}",
            )


def check_rand_device(request: GenerateRequest) -> None:
    """Whether noise can be drawn where the request says.

    Raises:
        RequestError: no such device here.
    """
    try:
        resolve_device(request.rand_device)
    except RequestError as error:
        raise RequestError(f"rand_{error.message}", hint=error.hint) from error


def tile_config(request: GenerateRequest, planned: Mapping[str, int | None] | None = None) -> TileConfig:
    """The tiles of a plan, else those of the request; whole clips when it is not tiled.

    Raises:
        RequestError: sizes that cannot be cut.
    """
    if planned and "tile_size_in_pixels" in planned:
        return TileConfig(**planned)
    if not request.tiled:
        return TileConfig(None, None, None, None)
    return TileConfig(
        request.tile_size_in_pixels,
        request.tile_overlap_in_pixels,
        request.tile_size_in_frames,
        request.tile_overlap_in_frames,
    )


def check_two_stages(
    request: GenerateRequest, parts: Parts, sources: Mapping[str, str], *, has_lora: bool
) -> None:
    """Whether there is what the second stage needs.

    Args:
        request: one of two stages.
        parts: the networks.
        sources: files by part, for messages.
        has_lora: whether the distilled LoRA was loaded.

    Raises:
        RequestError: no upsampler, one that does not double, or no distilled LoRA for a dev checkpoint.
    """
    model = MODEL_NAMES[parts.version]
    if parts.upsampler is None:
        raise RequestError(
            "use_two_stage_pipeline needs a latent upsampler",
            hint=f"add the spatial upscaler x2 of Lightricks/{model} to model_configs (--upsampler)",
        )
    if not is_spatial_x2(parts.upsampler.config):
        raise RequestError(
            f"{sources['upsampler']} does not double height and width, as two stages need",
            hint=f"the spatial upscaler x2 of Lightricks/{model}",
        )
    if not has_lora and not request.use_distilled_pipeline:
        raise RequestError(
            "use_two_stage_pipeline with a dev checkpoint needs stage2_lora_config",
            hint=f"the distilled LoRA of Lightricks/{model} (--distilled-lora), or a distilled "
            "checkpoint and use_distilled_pipeline=True",
        )


def tell_doubts(request: GenerateRequest) -> None:
    """What is allowed, but may not be what was meant."""
    if not request.prompt.strip():
        logger.warning("the prompt is empty: the model chooses what to show")
    if request.use_distilled_pipeline and request.num_inference_steps is not None:
        logger.warning("num_inference_steps is not used: a distilled model has its own list of steps")
    if request.negative_prompt not in ("", NEGATIVE_PROMPT) and not guided(request):
        logger.warning("negative_prompt is not used: there is no guidance")
    if (request.num_frames - 4) / request.frame_rate > MAX_DURATION_S:
        logger.warning("models are made for up to %d s: what follows may get worse", MAX_DURATION_S)


def _shortest(frame_rate: float) -> int:
    """The smallest 8k+1 frames that last long enough for sound."""
    return next(n for n in count(1, TEMPORAL_STEP) if audio_latent_frames(n, frame_rate) >= 1)


def _check_smallest(request: GenerateRequest, parts: Parts) -> None:
    if parts.video_vae_decoder is None or request.audio_only:
        return
    smallest = parts.video_vae_decoder.min_cells * SPATIAL_STEP_PX
    for name in ("height", "width"):
        if getattr(request, name) < smallest:
            raise RequestError(
                f"{name}={getattr(request, name)} is too small for this model's decoder", hint=f"{smallest}"
            )


def _check_upsampled(request: GenerateRequest, parts: Parts) -> None:
    """The upsampler normalises over groups of channels, each of which needs more than one value."""
    if parts.upsampler is None:
        return
    cells = prod(video_latent_shape(request.num_frames, *request.stage_1_size))
    if cells * parts.upsampler.config.mid_channels == NORM_GROUPS:
        raise RequestError(
            f"num_frames={request.num_frames} at height={request.height} and width={request.width} is too "
            "little for this model's upsampler",
            hint=f"num_frames={request.num_frames + TEMPORAL_STEP}, or height={2 * request.height}",
        )
