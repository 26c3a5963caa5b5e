"""What a request needs, phase by phase: the bridge from a generation to the planner of the memory manager.

The phases follow the units of the pipeline.  Bytes of weights are exact (networks without data, packed as
they will be), bytes of activations are those of :mod:`diffsynth.pipelines.costs`.  Allowances for what
libraries and allocators take beside tensors: 15 % with matrix products (fragmentation costs 5 to 20 %), 90 %
with convolutions, whose libraries want workspaces; tiles are verified on the first one at run time.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from diffsynth.conditioning.text import CONTEXT_LENGTH
from diffsynth.conditioning.tokens import audio_latent_frames, video_latent_shape
from diffsynth.pipelines.costs.audio import audio_decoder_cost, audio_encoder_cost, vocoder_cost
from diffsynth.pipelines.costs.cost import Cost
from diffsynth.pipelines.costs.text import connectors_cost, gemma_cost
from diffsynth.pipelines.costs.transformer import DenoiseSizes, denoise_cost, free_chunk
from diffsynth.pipelines.costs.video import upsampler_cost
from diffsynth.pipelines.parts import ModelVersion, Parts
from diffsynth.pipelines.sizes import ModelSizes, PartSizes, model_sizes, released_sizes
from diffsynth.pipelines.stages import Stage, guided, plan_stages
from diffsynth.pipelines.storage import Storage
from diffsynth.pipelines.tiles import decode_choices, encode_choices
from diffsynth.request import GenerateRequest
from diffsynth.sampling.guidance import PassKind, guidance_passes
from diffsynth.vram.planner import Block, Choice, PhaseDemand

DISTILLED_LORA_RANK = 384
MATRIX_WORKSPACE = 0.15
"""Share of the activations that matrix products and the allocator take besides."""
CONVOLUTION_WORKSPACE = 0.9
"""The same with convolutions: published peaks are 1.9 times the live tensors."""
MEL_PER_LATENT = 4


def demands_for(
    request: GenerateRequest,
    version: ModelVersion,
    *,
    storage: Storage | str,
    lora: bool | int = False,
    parts: Parts | ModelSizes | None = None,
    text: bool = True,
) -> tuple[PhaseDemand, ...]:
    """The phases of a request in their order.

    Args:
        request: it need not be valid in everything, but its sizes must be.
        version: "2.0" or "2.3".
        storage: how weights are stored; unused when ``parts`` are sizes, which were measured with one.
        lora: rank of the user's LoRAs, all together; True for 384.  The distilled LoRA that two stages of a
            dev checkpoint need is counted without being asked for.
        parts: networks of a pipeline, or their sizes; None: those of the released checkpoint.
        text: whether prompts have to be encoded; False when their encodings are known.

    Returns:
        Named ``text``, ``connectors``, ``encode audio``, ``encode inputs N``, ``denoise N``, ``upsample``,
        ``decode video`` and ``decode audio``, as far as the request has them; of parts that are missing there
        are none.

    Raises:
        RequestError: tiles that cannot work, an unknown storage name.
    """
    return tuple(phases(request, measured(version, storage, parts), lora=lora, text=text))


def phases(
    request: GenerateRequest, sizes: ModelSizes, *, lora: bool | int = False, text: bool = True
) -> Iterator[PhaseDemand]:
    """What :func:`demands_for` returns, one by one: whoever looks for one that does not fit need not wait."""
    if text:
        yield from _text_phases(request, sizes)
    if request.retake_audio is not None and sizes.has("audio_vae_encoder"):
        yield _encode_audio(request, sizes)
    for stage in plan_stages(request, sizes.version):
        if stage.number > 1 and sizes.has("upsampler"):
            yield _upsample(request, sizes)
        if sizes.has("video_vae_encoder"):
            yield from _encode_inputs(request, stage, sizes)
        if sizes.has("dit"):
            yield _denoise(request, stage, sizes, _lora_rank(request, stage, lora))
    if not request.audio_only and sizes.has("video_vae_decoder"):
        yield _decode_video(request, sizes)
    if sizes.has("audio_vae_decoder") and sizes.has("audio_vocoder"):
        yield _decode_audio(request, sizes)


def measured(version: ModelVersion, storage: Storage | str, parts: Parts | ModelSizes | None) -> ModelSizes:
    """Sizes of parts, or of the released model; measure once when many requests are asked about."""
    if isinstance(parts, ModelSizes):
        return parts
    policy = Storage.named(storage) if isinstance(storage, str) else storage
    return released_sizes(version, policy) if parts is None else model_sizes(parts, policy)


def _text_phases(request: GenerateRequest, sizes: ModelSizes) -> Iterable[PhaseDemand]:
    """Prompts count with the longest length there is: how many tokens they have is known only later."""
    prompts = 2 if guided(request) else 1
    length, itemsize = CONTEXT_LENGTH, sizes.itemsize
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
        cost = gemma_cost(sizes.gemma, config.features, length, prompts, length, itemsize)
        yield _phase(
            "text",
            "text_encoder",
            replace(gemma, rest_bytes=gemma.rest_bytes + post.rest_bytes),
            [_choice(cost, MATRIX_WORKSPACE)],
            blocks=blocks,
            weight_cause="the storage format of the text encoder",
        )
    cost = connectors_cost(config, length, prompts, length, itemsize)
    yield _phase(
        "connectors",
        "text_encoder_post_modules",
        post,
        [_choice(cost, MATRIX_WORKSPACE)],
        blocks=_blocks(post),
        weight_cause="the storage format of the connectors",
    )


def _denoise(request: GenerateRequest, stage: Stage, sizes: ModelSizes, lora_rank: int) -> PhaseDemand:
    part, config = sizes.parts["dit"], sizes.transformer
    kinds = guidance_passes(stage.video_guidance, stage.audio_guidance)
    video = 0 if request.audio_only else video_tokens(request, stage)
    audio = _audio_frames(request) if config.has_audio else 0
    step = DenoiseSizes(
        video=video,
        audio=audio,
        text=CONTEXT_LENGTH,
        passes=len(kinds),
        contexts=2 if PassKind.UNCOND in kinds else 1,
        prompts=2 if guided(request) else 1,
        timesteps=_distinct_timesteps(request),
        # A rule, not a choice: what lies where must not show in the results.
        chunk_tokens=free_chunk(max(video, audio)),
        itemsize=sizes.itemsize,
        lora_rank=lora_rank,
    )
    return _phase(
        f"denoise {stage.number}",
        "dit",
        part,
        [_choice(denoise_cost(config, step), MATRIX_WORKSPACE)],
        blocks=_blocks(part, lora_rank * sizes.itemsize),
        traversals=stage.steps,
        activation_cause=_size_of(request),
        weight_cause="the storage format of the transformer",
    )


def video_tokens(request: GenerateRequest, stage: Stage) -> int:
    """Tokens of the video stream in a stage: the target, keyframes, and reference clips in the first."""
    frames, height, width = video_latent_shape(request.num_frames, stage.height, stage.width)
    tokens = frames * height * width
    tokens += height * width * sum(1 for frame in request.image_frames() if frame != 0)
    if stage.number == 1:
        factor = request.in_context_downsample_factor
        tokens += len(request.in_context_videos) * frames * (height // factor) * (width // factor)
    return tokens


def _distinct_timesteps(request: GenerateRequest) -> int:
    """Noise levels among the tokens of a stream: one, and one for every strength of something given."""
    given = set(request.image_strengths()) if request.input_images else set()
    if request.in_context_videos or request.retake_video_regions or request.retake_audio_regions:
        given.add(1.0)
    return 1 + len(given)


def _lora_rank(request: GenerateRequest, stage: Stage, lora: bool | int) -> int:
    rank = DISTILLED_LORA_RANK if lora is True else int(lora)
    if stage.number == 1:
        return rank
    if request.clear_lora_before_state_two:
        rank = 0
    return rank + (0 if request.use_distilled_pipeline else DISTILLED_LORA_RANK)


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
    clips = _encoded_clips(request, stage)
    if clips:
        config, itemsize = sizes.video_vae("video_vae_encoder"), sizes.itemsize
        yield _phase(
            f"encode inputs {stage.number}",
            "video_vae_encoder",
            sizes.parts["video_vae_encoder"],
            encode_choices(request, config, clips, itemsize, CONVOLUTION_WORKSPACE),
            activation_cause=_tiles_of(request, _size_of(request)),
        )


def _encoded_clips(request: GenerateRequest, stage: Stage) -> list[tuple[int, int, int]]:
    """Frames, height and width of everything that is encoded for a stage; pictures are clips of one frame."""
    clips = [(1, stage.height, stage.width)] * len(request.input_images)
    if request.retake_video is not None:
        clips.append((request.num_frames, stage.height, stage.width))
    if stage.number == 1:
        factor = request.in_context_downsample_factor
        one = (request.num_frames, stage.height // factor, stage.width // factor)
        clips += [one] * len(request.in_context_videos)
    return clips


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
    cost = audio_encoder_cost(sizes.audio_vae("audio_vae_encoder"), _audio_frames(request), sizes.itemsize)
    return _phase(
        "encode audio",
        "audio_vae_encoder",
        sizes.parts["audio_vae_encoder"],
        [_choice(cost, CONVOLUTION_WORKSPACE)],
        activation_cause=f"num_frames={request.num_frames}",
    )


def _decode_audio(request: GenerateRequest, sizes: ModelSizes) -> PhaseDemand:
    """The vocoder works on the spectrogram that the decoder made."""
    frames = _audio_frames(request)
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


def _blocks(part: PartSizes, lora_bytes_per_width: int = 0) -> tuple[Block, ...]:
    return tuple(
        Block(block.name, block.nbytes, block.lora_width * lora_bytes_per_width) for block in part.blocks
    )


def _audio_frames(request: GenerateRequest) -> int:
    return audio_latent_frames(request.num_frames, request.frame_rate)


def _size_of(request: GenerateRequest) -> str:
    if request.audio_only:
        return f"num_frames={request.num_frames}"
    return f"height={request.height}, width={request.width}, num_frames={request.num_frames}"


def _tiles_of(request: GenerateRequest, size: str) -> str:
    return size if request.tiled else f"tiled=False with {size}"
