"""What a request needs, phase by phase: the bridge from a generation to the planner of the memory manager.

The phases follow the units of the pipeline.  Bytes of weights are exact (networks without data, packed as
they will be), bytes of activations are those of :mod:`diffsynth.pipelines.costs`.  Allowances for what
libraries and allocators take beside tensors: 15 % with matrix products (fragmentation costs 5 to 20 %), 90 %
with convolutions, whose libraries want workspaces; tiles are verified on the first one at run time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TypeAlias

from diffsynth.conditioning.enhance import Chat
from diffsynth.conditioning.tokens import video_latent_shape
from diffsynth.pipelines.costs.audio import audio_decoder_cost, audio_encoder_cost, vocoder_cost
from diffsynth.pipelines.costs.cost import Cost
from diffsynth.pipelines.costs.text import connectors_cost, gemma_cost
from diffsynth.pipelines.costs.transformer import DenoiseSizes, denoise_cost, free_chunk
from diffsynth.pipelines.costs.video import upsampler_cost
from diffsynth.pipelines.enhance_demand import enhance_demands
from diffsynth.pipelines.parts import ModelVersion, Parts
from diffsynth.pipelines.sizes import ModelSizes, PartSizes, model_sizes, released_sizes
from diffsynth.pipelines.stages import Stage, guided, plan_stages
from diffsynth.pipelines.storage import Storage
from diffsynth.pipelines.tiles import decode_choices, encode_choices
from diffsynth.pipelines.workload import (
    audio_frames,
    carried_copies,
    distinct_timesteps,
    encoded_clips,
    video_tokens,
)
from diffsynth.request import GenerateRequest
from diffsynth.sampling.guidance import PassKind, guidance_passes
from diffsynth.vram.binding import REST
from diffsynth.vram.planner import Block, Choice, PhaseDemand

DISTILLED_LORA_RANK = 384
MATRIX_WORKSPACE = 0.15
"""Share of the activations that matrix products and the allocator take besides."""
CONVOLUTION_WORKSPACE = 0.9
"""The same with convolutions: published peaks are 1.9 times the live tensors."""
MEL_PER_LATENT = 4
FLOAT32 = 4
SCRAP_BYTES = 1024
"""Scalars, indices and tables whose size depends on nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSize:
    """The LoRAs of one stage, all together.

    Attributes:
        rank: the sum of their ranks.
        nbytes: by block of the transformer the packed bytes of what travels with it; under
            :data:`~diffsynth.vram.binding.REST` what belongs to layers outside the blocks.
    """

    rank: int = 0
    nbytes: Mapping[str, int] = field(default_factory=dict)


Loras: TypeAlias = bool | int | Mapping[int, LoraSize]
"""Rank of the user's LoRAs, all together, on every layer of every block, True for 384; the distilled LoRA
that two stages of a dev checkpoint need is counted without being asked for.  Or, where the files are known,
the sizes by number of the stage, the distilled LoRA included; a stage that is not named has none."""

Prompts: TypeAlias = bool | Sequence[int]
"""Whether prompts have to be encoded: as many as the request needs, of the longest length there is; False
when their encodings are known.  Or the tokens of those that have to be."""


def demands_for(
    request: GenerateRequest,
    version: ModelVersion,
    *,
    storage: Storage | str,
    lora: Loras = False,
    parts: Parts | ModelSizes | None = None,
    text: Prompts = True,
    chat: Chat | None = None,
) -> tuple[PhaseDemand, ...]:
    """The phases of a request in their order.

    Args:
        request: it need not be valid in everything, but its sizes must be.
        version: "2.0" or "2.3".
        storage: how weights are stored; unused when ``parts`` are sizes, which were measured with one.
        lora: see :data:`Loras`.
        parts: networks of a pipeline, or their sizes; None: those of the released checkpoint.
        text: see :data:`Prompts`.
        chat: what the text model is given where it has to write the prompt.

    Returns:
        Named ``enhance prompt``, ``text``, ``connectors``, ``encode audio``, ``encode inputs N``,
        ``denoise N``, ``upsample``, ``decode video`` and ``decode audio``, as far as the request has them; of
        parts that are missing there are none.

    Raises:
        RequestError: tiles that cannot work, an unknown storage name.
    """
    return tuple(phases(request, measured(version, storage, parts), lora=lora, text=text, chat=chat))


def phases(
    request: GenerateRequest,
    sizes: ModelSizes,
    *,
    lora: Loras = False,
    text: Prompts = True,
    chat: Chat | None = None,
) -> Iterator[PhaseDemand]:
    """What :func:`demands_for` returns, one by one: whoever looks for one that does not fit need not wait."""
    if text is True:
        text = (sizes.text_length,) * (2 if guided(request) else 1)
    held = _statistics_bytes(sizes)
    if chat is not None:
        yield from (_holding(demand, held) for demand in enhance_demands(chat, sizes, MATRIX_WORKSPACE))
    if text:
        yield from (_holding(demand, held) for demand in _text_phases(text, sizes))
    if request.retake_audio is not None and sizes.has("audio_vae_encoder"):
        yield _holding(_encode_audio(request, sizes), held)
    stages = plan_stages(request, sizes.version)
    sound = _audio_latent_bytes(request, sizes)
    heard = sound if request.retake_audio is not None else 0
    for stage in stages:
        given = _given_bytes(request, stage, sizes)
        made = sound + _latent_bytes(request, stage, sizes) if stage.number > 1 else heard
        if stage.number > 1 and sizes.has("upsampler"):
            beside = sound + _second_copy(request, stages[0], sizes)
            yield _holding(_upsample(request, sizes), held + beside)
        if sizes.has("video_vae_encoder"):
            encodings = _encode_inputs(request, stage, sizes)
            yield from (_holding(demand, held + made + given) for demand in encodings)
        if sizes.has("dit"):
            lora_size = _lora_size(request, stage, sizes, lora)
            # What is given makes a new clean latent of the one that was there, which stays as well.
            before = made + given if given else 0
            yield _holding(_denoise(request, stage, sizes, lora_size), held + before)
    yield from decoding_phases(request, sizes)


def decoding_phases(request: GenerateRequest, sizes: ModelSizes) -> Iterator[PhaseDemand]:
    """The last of :func:`phases`: all that is needed once there are final latents.

    Raises:
        RequestError: tiles that cannot work.
    """
    last = plan_stages(request, sizes.version)[-1]
    held = _statistics_bytes(sizes) + _audio_latent_bytes(request, sizes)
    if not request.audio_only and sizes.has("video_vae_decoder"):
        yield _holding(_decode_video(request, sizes), held + _second_copy(request, last, sizes))
    if sizes.has("audio_vae_decoder") and sizes.has("audio_vocoder"):
        yield _holding(_decode_audio(request, sizes), held + _latent_bytes(request, last, sizes))


def _holding(demand: PhaseDemand, nbytes: int) -> PhaseDemand:
    """The phase while latents of other phases, so many bytes, are on the device as well."""
    nbytes += SCRAP_BYTES
    choices = (replace(c, activation_bytes=c.activation_bytes + nbytes) for c in demand.choices)
    return replace(demand, choices=tuple(choices))


def _statistics_bytes(sizes: ModelSizes) -> int:
    """Mean and deviation of the video latent's channels, which are always there."""
    part = next((p for p in ("video_vae_decoder", "video_vae_encoder") if sizes.has(p)), None)
    return 2 * sizes.video_vae(part).latent_channels * sizes.itemsize if part else 0


def _audio_latent_bytes(request: GenerateRequest, sizes: ModelSizes) -> int:
    if not (sizes.has("dit") and sizes.transformer.has_audio):
        return 0
    return audio_frames(request) * sizes.transformer.audio_in_channels * FLOAT32


def _latent_bytes(request: GenerateRequest, stage: Stage, sizes: ModelSizes) -> int:
    """Of the video latent that a stage leaves; keyframes stay in its memory."""
    if request.audio_only or not sizes.has("dit"):
        return 0
    return video_tokens(request, stage) * sizes.transformer.in_channels * FLOAT32


def _second_copy(request: GenerateRequest, stage: Stage, sizes: ModelSizes) -> int:
    """What the latent of a stage takes beside its form in the compute dtype, which costs count."""
    kept = _latent_bytes(request, stage, sizes)
    if sizes.itemsize != FLOAT32 or not kept:
        return kept
    target = prod(video_latent_shape(request.num_frames, stage.height, stage.width))
    return kept - target * sizes.transformer.in_channels * FLOAT32


def _given_bytes(request: GenerateRequest, stage: Stage, sizes: ModelSizes) -> int:
    """Of the float32 latents of everything that is encoded for a stage."""
    if not sizes.has("video_vae_encoder"):
        return 0
    channels = sizes.video_vae("video_vae_encoder").latent_channels
    clips = encoded_clips(request, stage)
    return sum(prod(video_latent_shape(*clip)) for clip in clips) * channels * FLOAT32


def measured(version: ModelVersion, storage: Storage | str, parts: Parts | ModelSizes | None) -> ModelSizes:
    """Sizes of parts, or of the released model; measure once when many requests are asked about."""
    if isinstance(parts, ModelSizes):
        return parts
    policy = Storage.named(storage) if isinstance(storage, str) else storage
    return released_sizes(version, policy) if parts is None else model_sizes(parts, policy)


def _text_phases(tokens: Sequence[int], sizes: ModelSizes) -> Iterable[PhaseDemand]:
    length, itemsize = sizes.text_length, sizes.itemsize
    if not sizes.has("text_encoder_post_modules"):
        return
    config, post = sizes.connectors, sizes.parts["text_encoder_post_modules"]
    if sizes.has("text_encoder"):
        gemma = sizes.parts["text_encoder"]
        # The slice of the projection for a hidden state comes with the layer that reads the state; the last
        # state has no layer, and its slice comes alone.
        blocks = tuple(
            Block(block.name, block.nbytes, companion)
            for block, companion in zip(gemma.blocks, post.slice_bytes, strict=False)
        )
        cost = gemma_cost(sizes.gemma, config.features, tokens, length, itemsize)
        yield _phase(
            "text",
            "text_encoder",
            replace(gemma, rest_bytes=gemma.rest_bytes + post.rest_bytes),
            [_choice(cost, MATRIX_WORKSPACE)],
            blocks=blocks,
            weight_cause="the storage format of the text encoder",
        )
    cost = connectors_cost(config, tokens, length, itemsize)
    yield _phase(
        "connectors",
        "text_encoder_post_modules",
        post,
        [_choice(cost, MATRIX_WORKSPACE)],
        blocks=_blocks(post),
        weight_cause="the storage format of the connectors",
    )


def _denoise(request: GenerateRequest, stage: Stage, sizes: ModelSizes, lora: LoraSize) -> PhaseDemand:
    part, config = sizes.parts["dit"], sizes.transformer
    kinds = guidance_passes(stage.video_guidance, stage.audio_guidance)
    video = 0 if request.audio_only else video_tokens(request, stage)
    audio = audio_frames(request) if config.has_audio else 0
    step = DenoiseSizes(
        video=video,
        audio=audio,
        text=sizes.text_length,
        passes=len(kinds),
        contexts=2 if PassKind.UNCOND in kinds else 1,
        prompts=2 if guided(request) else 1,
        timesteps=distinct_timesteps(request, stage),
        # A rule, not a choice: what lies where must not show in the results.
        chunk_tokens=free_chunk(max(video, audio)),
        itemsize=sizes.itemsize,
        lora_rank=lora.rank,
        carried=carried_copies(stage.sampler, has_float64=sizes.has_float64),
        weighted=stage.number == 1 and request.weighs_references,
    )
    return _phase(
        f"denoise {stage.number}",
        "dit",
        replace(part, rest_bytes=part.rest_bytes + lora.nbytes.get(REST, 0)),
        [_choice(denoise_cost(config, step), MATRIX_WORKSPACE)],
        blocks=_blocks(part, lora.nbytes),
        traversals=stage.evaluations,
        activation_cause=_size_of(request),
        weight_cause="the storage format of the transformer",
    )


def _lora_size(request: GenerateRequest, stage: Stage, sizes: ModelSizes, lora: Loras) -> LoraSize:
    if isinstance(lora, Mapping):
        return lora.get(stage.number, LoraSize())
    rank = DISTILLED_LORA_RANK if lora is True else int(lora)
    if stage.number == 1:
        rank += DISTILLED_LORA_RANK if request.stage1_lora_strength else 0
    else:
        rank = 0 if request.clear_lora_before_state_two else rank
        rank += 0 if request.use_distilled_pipeline else DISTILLED_LORA_RANK
    blocks = sizes.parts["dit"].blocks
    return LoraSize(rank=rank, nbytes={b.name: rank * sizes.itemsize * b.lora_width for b in blocks})


def _upsample(request: GenerateRequest, sizes: ModelSizes) -> PhaseDemand:
    latent = video_latent_shape(request.num_frames, *request.stage_1_size)
    return _phase(
        "upsample",
        "upsampler",
        sizes.parts["upsampler"],
        [_choice(upsampler_cost(sizes.upsampler, latent, sizes.itemsize), CONVOLUTION_WORKSPACE)],
        activation_cause=_size_of(request),
    )


def _encode_inputs(request: GenerateRequest, stage: Stage, sizes: ModelSizes) -> Iterable[PhaseDemand]:
    clips = encoded_clips(request, stage)
    if clips:
        config, itemsize = sizes.video_vae("video_vae_encoder"), sizes.itemsize
        yield _phase(
            f"encode inputs {stage.number}",
            "video_vae_encoder",
            sizes.parts["video_vae_encoder"],
            encode_choices(request, config, clips, itemsize, CONVOLUTION_WORKSPACE),
            activation_cause=_tiles_of(request, _size_of(request)),
        )


def _decode_video(request: GenerateRequest, sizes: ModelSizes) -> PhaseDemand:
    config = sizes.video_vae("video_vae_decoder")
    return _phase(
        "decode video",
        "video_vae_decoder",
        sizes.parts["video_vae_decoder"],
        decode_choices(request, config, sizes.itemsize, CONVOLUTION_WORKSPACE),
        activation_cause=_tiles_of(request, _size_of(request)),
    )


def _encode_audio(request: GenerateRequest, sizes: ModelSizes) -> PhaseDemand:
    frames = audio_frames(request) + 1  # the last window reaches beyond the video
    cost = audio_encoder_cost(sizes.audio_vae("audio_vae_encoder"), frames, sizes.itemsize)
    return _phase(
        "encode audio",
        "audio_vae_encoder",
        sizes.parts["audio_vae_encoder"],
        [_choice(cost, CONVOLUTION_WORKSPACE)],
        activation_cause=f"num_frames={request.num_frames}",
    )


def _decode_audio(request: GenerateRequest, sizes: ModelSizes) -> PhaseDemand:
    """The vocoder works on the spectrogram that the decoder made."""
    frames = audio_frames(request)
    first = audio_decoder_cost(sizes.audio_vae("audio_vae_decoder"), frames, sizes.itemsize)
    second = vocoder_cost(sizes.vocoder, MEL_PER_LATENT * frames)
    both = (sizes.parts["audio_vae_decoder"], sizes.parts["audio_vocoder"])
    cost = Cost(max(first.nbytes, second.nbytes), first.flops + second.flops)
    return _phase(
        "decode audio",
        "audio_vocoder",
        PartSizes(rest_bytes=sum(part.rest_bytes for part in both)),
        [_choice(cost, CONVOLUTION_WORKSPACE)],
        activation_cause=f"num_frames={request.num_frames}",
    )


def _phase(
    name: str,
    part: str,
    sizes: PartSizes,
    choices: Sequence[Choice],
    *,
    blocks: tuple[Block, ...] = (),
    traversals: int = 1,
    activation_cause: str = "the prompt",
    weight_cause: str = "the weights",
) -> PhaseDemand:
    return PhaseDemand(
        name=name,
        part=part,
        choices=tuple(choices),
        blocks=blocks,
        rest_bytes=sizes.rest_bytes,
        scratch_bytes=sizes.scratch_bytes,
        traversals=traversals,
        on_disk=sizes.on_disk,
        activation_cause=activation_cause,
        weight_cause=weight_cause,
    )


def _choice(cost: Cost, workspace: float, **settings: int | None) -> Choice:
    return Choice(
        activation_bytes=cost.nbytes,
        workspace_bytes=int(workspace * cost.nbytes),
        flops=cost.flops,
        settings=settings,
    )


def _blocks(part: PartSizes, companions: Mapping[str, int] | None = None) -> tuple[Block, ...]:
    travelling = companions or {}
    return tuple(Block(block.name, block.nbytes, travelling.get(block.name, 0)) for block in part.blocks)


def _size_of(request: GenerateRequest) -> str:
    if request.audio_only:
        return f"num_frames={request.num_frames}"
    return f"height={request.height}, width={request.width}, num_frames={request.num_frames}"


def _tiles_of(request: GenerateRequest, size: str) -> str:
    return size if request.tiled else f"tiled=False with {size}"
