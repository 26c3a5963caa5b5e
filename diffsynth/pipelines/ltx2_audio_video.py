"""``LTX2AudioVideoPipeline``: video with sound from text and pictures, through one call."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffsynth import __version__
from diffsynth.conditioning.text import PromptContext
from diffsynth.conditioning.tokens import audio_latent_frames
from diffsynth.device import resolve_device
from diffsynth.errors import RequestError
from diffsynth.loader import ModelConfig
from diffsynth.lora import Lora, LoraHandle, LoraStack
from diffsynth.pipelines.arguments import check_models, request_fields
from diffsynth.pipelines.assemble import (
    DECODERS,
    MODEL_NAMES,
    Assembly,
    open_models,
    read_transformer_lora,
)
from diffsynth.pipelines.checks import (
    check_blocks,
    check_rand_device,
    check_sampler,
    check_sizes,
    check_two_stages,
    tell_doubts,
)
from diffsynth.pipelines.course import decoding, making, needs, run_unit
from diffsynth.pipelines.encode_inputs import kept_sound
from diffsynth.pipelines.enhance import chat_for, known_enhancement
from diffsynth.pipelines.inputs import (
    Clip,
    Clips,
    Inputs,
    Picture,
    Sound,
    fit_request,
    inputs_by_path,
    load_inputs,
)
from diffsynth.pipelines.limits import MemoryLimits
from diffsynth.pipelines.manage import manage
from diffsynth.pipelines.memory import ManagedMemory
from diffsynth.pipelines.negative_prompt import NEGATIVE_PROMPT
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.progress import OnProgress, ProgressBar, ignore, with_bar
from diffsynth.pipelines.rescue import FinalLatents, kept
from diffsynth.pipelines.result import Result, VideoFrames
from diffsynth.pipelines.stage_loras import StageLoraBook
from diffsynth.pipelines.stages import guided, plan_stages
from diffsynth.pipelines.state import GenerationState
from diffsynth.pipelines.states import check_states
from diffsynth.pipelines.units import (
    known_contexts,
    unknown_prompts,
)
from diffsynth.request import GenerateRequest, GuidanceParams, Region
from diffsynth.sampling.conventions import get_conventions
from diffsynth.sampling.noise import noise_source, resolve_seed
from diffsynth.validation import check_finite

if TYPE_CHECKING:
    pass

__all__ = ["GuidanceParams", "LTX2AudioVideoPipeline", "ModelConfig"]

logger = logging.getLogger(__name__)

GEMMA_ID = "google/gemma-3-12b-it-qat-q4_0-unquantized"


class LTX2AudioVideoPipeline:
    """LTX-2 and LTX-2.3 behind the call that DiffSynth-Studio made public.

    Networks are attributes by their public names (``dit``, ``video_vae_decoder``, ``audio_vocoder``, ...).
    Two pipelines can live in one process; nothing is shared between them.
    """

    default_negative_prompt: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("LTX-2", "LTX-2.3"), NEGATIVE_PROMPT
    )

    def __init__(
        self, assembly: Assembly, *, stage2_lora: Lora | None = None, stage2_lora_strength: float = 0.8
    ) -> None:
        self.parts: Parts = assembly.parts
        self._assembly = assembly
        self._loras: LoraStack | None = None
        if self.parts.dit is not None:
            managed = isinstance(self.parts.memory, ManagedMemory)
            self._loras = LoraStack(self.parts.dit, hooked=not managed)
        if isinstance(self.parts.memory, ManagedMemory):
            self.parts.memory.loras = self._loras
        self._book = StageLoraBook(stack=self._loras, distilled=stage2_lora, strength=stage2_lora_strength)

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        model_configs: Sequence[ModelConfig] = (),
        tokenizer_config: ModelConfig | None = None,
        stage2_lora_config: ModelConfig | None = None,
        stage2_lora_strength: float = 0.8,
        vram_limit: float | str | None = None,
        host_limit: float | None = None,
        storage: str | None = None,
        cache: bool = True,
        prefetch_count: int | None = None,
        loras: Sequence[tuple[str | Path | ModelConfig, float]] = (),
        request: GenerateRequest | None = None,
        networks: Collection[str] | None = None,
    ) -> Self:
        """Load a pipeline.

        Args:
            torch_dtype: what the networks compute in.
            device: the best one of this machine if None.
            model_configs: the files; what they hold is recognised from their content.
            tokenizer_config: folder with the Gemma tokenizer; fetched by its public id if None.
            stage2_lora_config: the distilled LoRA, active in the second stage only.
            stage2_lora_strength: its strength.
            vram_limit: device memory to stay under, in GB (2**30 bytes); "auto" for what is free now; or the
                name of a :class:`~diffsynth.pipelines.limits.VRAMPreset`, such as "8gb".  None is no limit,
                also where other arguments bring weights block by block.
            host_limit: host memory to stay under, in GB; what is free now if None.
            storage: format of the weights while they wait: bf16, int8, int4, fp8, e4m3 or e5m2; if None int8,
                or for networks of an fp8 file what that file has.  With this or a limit, or with states in
                ``model_configs`` that ask for it, weights come to the device block by block; with none of
                them they all lie there.
            cache: keep converted weights on the disk, so that the next start is quick.
            prefetch_count: blocks that may be on their way to the device while one computes; one if None.
            loras: files and strengths, activated as :meth:`load_lora` does; they are read before any weight.
            request: one that will be made: if these files cannot serve it, the error comes before any weight
                is read.
            networks: load only these of what the files hold, by their public names; all if None.

        Raises:
            RequestError: an argument that cannot work.
            CheckpointError: files that are missing, damaged, unknown, or do not belong together.
            DownloadError: a file could not be fetched.
        """
        check_models(model_configs, tokenizer_config, loras)
        limits = MemoryLimits(
            vram_limit=vram_limit,
            host_limit=host_limit,
            storage=storage,
            cache=cache,
            prefetch_count=prefetch_count,
        )
        if not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
            raise RequestError(f"torch_dtype={torch_dtype!r} is not a floating dtype", hint="torch.bfloat16")
        target = resolve_device(device)
        check_finite("stage2_lora_strength", stage2_lora_strength)
        for source, alpha in loras:
            named = source.path or source.model_id if isinstance(source, ModelConfig) else source
            check_finite(f"loras: the strength of {named}", alpha)
        check_states(model_configs, target, torch_dtype)
        if networks is None or "text_encoder" in networks:
            tokenizer_config = tokenizer_config or ModelConfig(model_id=GEMMA_ID)
        opened = open_models(model_configs, tokenizer_config)
        if networks is not None:
            opened = opened.only(networks)
        outline, lora = opened.outline(target, torch_dtype), None
        if stage2_lora_config is not None:
            lora = read_transformer_lora(outline.parts, stage2_lora_config)
        own = [(read_transformer_lora(outline.parts, source), alpha) for source, alpha in loras]
        if request is not None:
            outlined = cls(outline, stage2_lora=lora)
            for read, alpha in own:
                outlined._stack.add(read, alpha)
            request = outlined.check(request)
        if limits.asks_for_management(opened.configs):
            assembly = manage(opened, limits, target, torch_dtype)
        else:
            assembly = opened.load(target, torch_dtype)
        pipe = cls(assembly, stage2_lora=lora, stage2_lora_strength=stage2_lora_strength)
        for read, alpha in own:
            pipe._stack.add(read, alpha)
        if request is not None:
            pipe._plan(request, known_contexts(pipe.parts, request))
        return pipe

    def __getattr__(self, name: str) -> Any:
        """The networks by their public names."""
        if name != "parts" and name in Parts.__dataclass_fields__:
            return getattr(self.parts, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def decoder_files(self) -> tuple[Path, ...]:
        """Files of the networks that decode, as they were given or where they were put."""
        paths = self._assembly.paths
        return tuple(dict.fromkeys(path for name in DECODERS for path in paths.get(name, ())))

    def load_lora(
        self, module: nn.Module, lora: str | Path | ModelConfig | Mapping[str, Tensor], alpha: float = 1.0
    ) -> LoraHandle:
        """Activate a LoRA for all stages of the coming calls.

        Args:
            module: ``pipe.dit``, the only network that LoRAs of this family change.
            lora: a file, a configuration, or tensors by key, in any known key format.
            alpha: the strength; negative and above 1 are legal.

        Returns:
            What :meth:`set_lora_strength` and :meth:`remove_lora` take; ``handle.report`` says which keys of
            the file matched.

        Raises:
            RequestError: another module, or a strength that is no number.
            CheckpointError: unreadable, nothing in it matches, or it does not fit because it was made for
                the other model version; one that fits all the same is warned about.
        """
        if self._loras is None or module is not self.parts.dit:
            raise RequestError("load_lora changes the transformer only", hint="pipe.load_lora(pipe.dit, ...)")
        return self._stack.add(read_transformer_lora(self.parts, lora), alpha)

    @property
    def active_loras(self) -> dict[LoraHandle, float]:
        """Handles and strengths of the user's LoRAs, in the order of adding."""
        return {} if self._loras is None else self._loras.active

    def set_lora_strength(self, handle: LoraHandle, alpha: float) -> None:
        """Change the strength of one LoRA for the coming calls; 0 switches it off exactly.

        Raises:
            RequestError: not active here, or a strength that is no number.
        """
        self._stack.set_strength(handle, alpha)

    def remove_lora(self, handle: LoraHandle) -> None:
        """Take one LoRA away; the results are those of the others, bit for bit.

        Raises:
            RequestError: not active here.
        """
        self._stack.remove(handle)

    @property
    def _stack(self) -> LoraStack:
        if self._loras is None:
            raise RequestError("no transformer was loaded, so no LoRA is active", hint="load one")
        return self._loras

    def clear_lora(self) -> None:
        """Take all LoRAs of :meth:`load_lora` away; the weights are what they were, bit for bit."""
        if self._loras is not None:
            self._loras.clear()

    def __call__(
        self,
        prompt: str = "",
        negative_prompt: str = "",
        enhance_prompt: bool = False,
        denoising_strength: float = 1.0,
        input_images: Sequence[Picture] | None = None,
        input_images_indexes: Sequence[int] = (0,),
        input_images_strength: float | Sequence[float] = 1.0,
        input_images_crf: int | None = None,
        input_images_as_keyframes: bool = False,
        in_context_videos: Sequence[Clip] | None = None,
        in_context_downsample_factor: int | None = None,
        in_context_temporal_factor: int | None = None,
        in_context_strength: float | Sequence[float] = 1.0,
        in_context_attention_strength: float = 1.0,
        in_context_attention_mask: Clip | None = None,
        retake_video: Clip | None = None,
        retake_video_regions: Sequence[Region] | None = None,
        retake_audio: Sound | None = None,
        audio_sample_rate: int = 48000,
        retake_audio_regions: Sequence[Region] | None = None,
        audio_start_time: float = 0.0,
        audio_max_duration: float | None = None,
        seed: int | None = None,
        rand_device: str = "cpu",
        height: int = 512,
        width: int = 768,
        num_frames: int = 121,
        frame_rate: float = 24,
        fit: bool = False,
        audio_only: bool = False,
        cfg_scale: float | None = None,
        video_guidance: GuidanceParams | None = None,
        audio_guidance: GuidanceParams | None = None,
        num_inference_steps: int | None = None,
        sampler: str = "euler",
        ancestral_eta: float = 1.0,
        dynamic_shift: bool = False,
        tiled: bool = True,
        tile_size_in_pixels: int = 512,
        tile_overlap_in_pixels: int = 128,
        tile_size_in_frames: int = 128,
        tile_overlap_in_frames: int = 24,
        use_two_stage_pipeline: bool = False,
        stage2_spatial_upsample_factor: float = 2,
        clear_lora_before_state_two: bool = False,
        stage1_lora_strength: float = 0.0,
        stage2_lora_strength: float | None = None,
        use_distilled_pipeline: bool = False,
        conventions: str = "official",
        progress_bar_cmd: ProgressBar = tqdm,
        on_progress: OnProgress = ignore,
    ) -> tuple[VideoFrames | None, Tensor | None]:
        """Generate a video with sound.

        The arguments are the fields of :class:`~diffsynth.request.GenerateRequest`, where each is explained
        (``diffsynth generate --help`` shows the same text).  Pictures may be PIL images or paths, clips lists
        of PIL images or paths, sounds float tensors (channels, samples) or paths.

        Args:
            progress_bar_cmd: wraps the list of timesteps of each stage, and of a network that has to be
                converted a list of its hundredths; ``lambda x: x`` shows nothing.
            on_progress: called after every step of every phase.

        Returns:
            ``num_frames`` PIL RGB images, and float32 samples (2, samples) on the CPU.  Both carry what a
            writer needs: ``video.frame_rate``, ``video.record``, ``audio.sampling_rate``.  The video is None
            with ``audio_only``.

        Raises:
            RequestError: an argument that cannot work; raised before any weight is touched.
            CheckpointError: a part that this request needs was not loaded.
        """
        arguments = dict(locals())
        for name in ("self", "progress_bar_cmd", "on_progress"):
            del arguments[name]
        fields = request_fields(arguments)
        clips: Clips = {
            "in_context_videos": in_context_videos or (),
            "in_context_attention_mask": in_context_attention_mask,
            "retake_video": retake_video,
        }
        request = fit_request(GenerateRequest(**fields).validate(), **clips)
        inputs = load_inputs(request, input_images=input_images or (), retake_audio=retake_audio, **clips)
        result = self.generate(request, inputs, with_bar(progress_bar_cmd, on_progress))
        return result.frames, result.audio_tensor()

    @torch.inference_mode()
    def generate(
        self, request: GenerateRequest, inputs: Inputs | None = None, on_progress: OnProgress = ignore
    ) -> Result:
        """Run a request; :meth:`__call__` is this with arguments instead of a request.

        Args:
            request: what to make.
            inputs: the objects that it names; None reads them from the paths that it names.
            on_progress: called after every step of every phase.

        Raises:
            RequestError: an argument that cannot work; raised before any weight is touched.
            CheckpointError: a part that this request needs was not loaded.
        """
        request = request.validate()
        fitted = fit_request(request) if inputs is None else fit_request(request, **inputs.clips())
        request = self.check(fitted)
        tell_doubts(request)
        inputs = inputs_by_path(request) if inputs is None else inputs
        inputs.check(request)
        inputs = inputs.cut(request.num_frames)
        request = replace(request, seed=resolve_seed(request.seed))
        assert request.seed is not None
        conventions = get_conventions(request.conventions)
        stages = plan_stages(request, self.parts.version)
        state = GenerationState(
            request=request,
            inputs=inputs,
            conventions=conventions,
            stages=stages,
            noise=noise_source(conventions.noise_source, request.seed, request.rand_device),
            audio_shape=self._audio_shape(request),
            on_progress=on_progress,
            enhanced_prompt=known_enhancement(self.parts, request, inputs),
        )
        state.contexts = known_contexts(self.parts, state.prompted)
        self._plan(state.prompted, state.contexts)
        for unit in making(request, stages, partial(self._book.of_stage, request)):
            run_unit(unit, self.parts, state)
        record = self._record(request, state.enhanced_prompt)
        latents = FinalLatents(
            video=state.video_latent, audio=state.audio_latent, sound=kept_sound(state), record=record
        )
        with kept(latents, self.decoder_files):
            return self._decoded(state, record)

    @torch.inference_mode()
    def decode(
        self,
        latents: str | Path | FinalLatents | tuple[Tensor | None, Tensor | None],
        record: Mapping[str, Any] | None = None,
        on_progress: OnProgress = ignore,
    ) -> Result:
        """Decode final latents, such as those that a run left when it was stopped while decoding.

        With the same decoders, dtype and limits the result equals that of an unbroken run, bit for bit.

        Args:
            latents: the file that the run named; or :class:`~diffsynth.pipelines.rescue.FinalLatents`; or the
                normalised latents (1, C, F, H, W) of the video and (1, C, T, M) of the sound.
            record: what made them, ``result.record``; with two tensors only.
            on_progress: called after every step of every phase.

        Raises:
            CheckpointError: the file is damaged, comes from the other model, or a decoder was not loaded.
            RequestError: a record is missing.
            MemoryBudgetError: decoding does not fit the limits.
        """
        if isinstance(latents, tuple):
            if record is None:
                raise RequestError("latents without a record", hint="pipe.decode(latents, result.record)")
            latents = FinalLatents(video=latents[0], audio=latents[1], record=record)
        elif not isinstance(latents, FinalLatents):
            latents = FinalLatents.load(latents)
        latents.check_model(MODEL_NAMES[self.parts.version])
        request = latents.request
        self.parts.require(needs(decoding(request, self.parts)))
        check_sizes(request, self.parts, ())
        conventions = get_conventions(request.conventions)
        state = GenerationState(
            request=request,
            inputs=Inputs(retake_audio=latents.sound),
            conventions=conventions,
            stages=(),
            noise=noise_source(conventions.noise_source, 0, "cpu"),  # decoders draw none
            on_progress=on_progress,
            video_latent=latents.video,
            audio_latent=latents.audio,
        )
        self.parts.memory.prepare_decoding(request)
        return self._decoded(state, dict(latents.record))

    def _decoded(self, state: GenerationState, record: dict[str, Any]) -> Result:
        request, frames = state.request, None
        for unit in decoding(request, self.parts):
            run_unit(unit, self.parts, state)
        if state.frames is not None:
            frames = VideoFrames(state.frames, frame_rate=request.frame_rate, record=record)
        return Result(
            request=request,
            frames=frames,
            waveform=state.waveform,
            video_latent=state.video_latent,
            audio_latent=state.audio_latent,
            record=record,
        )

    def _plan(self, request: GenerateRequest, contexts: Mapping[str, PromptContext]) -> None:
        """Decide what lies where; nothing is read.  Raises MemoryBudgetError where it does not fit."""
        self.parts.memory.prepare(
            request,
            loras=partial(self._book.of_stage, request),
            prompts=unknown_prompts(request, contexts),
            chat=chat_for(self.parts, request),
        )

    def memory_report(self) -> dict[str, Any]:
        """What the last run was planned to take, what it took, and what moved; ready for JSON."""
        return self.parts.memory.report()

    def check(self, request: GenerateRequest) -> GenerateRequest:
        """Everything that a request needs of this pipeline, before any of it runs.

        Returns: the request as it will run: cut with ``fit``, reference clips as the LoRAs want them.

        Raises:
            RequestError, CheckpointError: see :meth:`generate`.
        """
        request = self._book.with_reference_factor(request.validate()).validate()
        stages = plan_stages(request, self.parts.version)
        check_sampler(request)
        check_blocks(request, self.parts)
        check_rand_device(request)
        check_sizes(request, self.parts, stages)
        if request.use_two_stage_pipeline:
            check_two_stages(
                request, self.parts, self._assembly.sources, has_lora=self._book.distilled is not None
            )
        elif request.stage1_lora_strength and self._book.distilled is None:
            raise RequestError(
                "stage1_lora_strength needs the distilled LoRA", hint="stage2_lora_config (--distilled-lora)"
            )
        if request.retake_audio is not None and not self.parts.has_audio:
            raise RequestError("retake_audio: this model makes no sound", hint="leave retake_audio out")
        if self._assembly.says_distilled and guided(request):
            raise RequestError(
                f"{self._assembly.sources['dit']} is a distilled checkpoint, but guidance is asked for",
                hint="use_distilled_pipeline=True, or cfg_scale=1, or a dev checkpoint",
            )
        units = making(request, stages, partial(self._book.of_stage, request))
        self.parts.require(needs([*units, *decoding(request, self.parts)]))
        return request

    def _audio_shape(self, request: GenerateRequest) -> tuple[int, int, int, int] | None:
        decoder = self.parts.audio_vae_decoder
        if decoder is None or not self.parts.has_audio:
            return None
        frames = audio_latent_frames(request.num_frames, request.frame_rate)
        return (1, decoder.config.z_channels, frames, decoder.config.latent_bins)

    def _record(self, request: GenerateRequest, enhanced_prompt: str | None) -> dict[str, Any]:
        """What made a result: it goes into the metadata of the file."""
        memory = self.parts.memory
        return {
            "diffsynth": __version__,
            "model": MODEL_NAMES[self.parts.version],
            "files": dict(self._assembly.sources),
            "dtype": str(self.parts.dtype).removeprefix("torch."),
            **({"storage": memory.storage} if isinstance(memory, ManagedMemory) else {}),
            "loras": self._book.record(request),
            "request": request.to_dict(),
            **({} if enhanced_prompt is None else {"enhanced_prompt": enhanced_prompt}),
        }
