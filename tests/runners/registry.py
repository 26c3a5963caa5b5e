"""Which runner serves which component, and how a file becomes an outcome."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path

import torch

from tests.runners.case import Case, GoldenMismatch, Outcome

Runner = Callable[[Case], None]

# component of the case -> "module of tests.runners:function"
RUNNERS: dict[str, str] = {
    "transformer": "transformer:full",
    "transformer.block": "transformer:block",
    "transformer.rope": "transformer:rope",
    "transformer.timestep_embedding": "transformer:timestep_embedding",
    "transformer.video_only": "transformer:video_only",
    "transformer.perturbations": "transformer:perturbations",
    "transformer.patchify_positions": "tokens:patchify_positions",
    "text.gemma3": "text:gemma3",
    "text.path": "text:path",
    "text.post": "text:post",
    "tokenizer": "text:tokenizer",
    "video_vae_encoder": "video_vae:encoder",
    "video_vae_decoder": "video_vae:decoder",
    "video_vae_tile_plans": "video_vae:tile_plans",
    "video_vae_tiled_decode": "video_vae:tiled_decode",
    "video_vae_tiled_encode": "video_vae:tiled_encode",
    "latent_upsampler": "upsampler:upsampler",
    "antialias_ops": "audio:antialias_ops",
    "audio_decoder": "audio:decoder",
    "audio_encoder": "audio:encoder",
    "decode_audio": "audio:decode_audio",
    "mel_processor": "audio:mel_processor",
    "audio_patchifier": "tokens:audio_patchifier",
    "audio lengths": "tokens:audio_lengths",
    "vocoder_ltx2": "audio:vocoder",
    "vocoder_bwe_ltx2.3": "audio:vocoder_bwe",
    "sigma schedules": "sampling:schedules",
    "guiders": "sampling:guiders",
    "euler step and conversions": "sampling:euler_and_conversions",
    "denoising loop": "sampling:loop",
    "gaussian noiser": "sampling:noiser",
    "res_2s coefficients": "sampling:res2s_coefficients",
    "stochastic steps": "sampling:stochastic_steps",
    "DiffSynth-style scheduler step": "sampling:diffsynth_step",
    "conditioning state": "conditioning:state",
    "lora fuse": "lora:fuse",
    "lora file": "lora:file",
    "pipeline": "pipelines:official",
    "LTX2AudioVideoPipeline": "pipelines:diffsynth",
    "text conditioning": "pipelines:contexts",
    "pipeline defaults": "pipelines:defaults",
}

# Component of cases of features that are not built yet -> the feature: they are listed, never passed over.
LATER: dict[str, str] = {
    "calibrators": "caching across steps",
    "step_cache_decisions": "caching across steps",
    "two_stream_block_cache": "caching across steps",
    "ltx-2 causal audio-video streaming": "streaming generation",
    "ltx-video transformer, chunked causal streaming": "streaming generation",
    "ltx-video scheduler": "LTX-Video",
    "ltx-video transformer": "LTX-Video",
    "ltx-video vae decoder": "LTX-Video",
    "ltx-video vae encoder": "LTX-Video",
}


def collect(paths: Iterable[Path]) -> Iterator[Path]:
    """Case files among ``paths``; folders are searched, checkpoints and tokenizers in them are left out."""
    for path in paths:
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.suffix in {".safetensors", ".json"}]
            yield from (p for p in found if identify(p) is not None)
        elif path.exists():
            yield path
        else:
            raise SystemExit(f"{path}: no such file or folder")


def identify(path: Path) -> str | None:
    """The component of a file, or None when it is only material of a case (a checkpoint, a configuration)."""
    case = Case.load(path)
    if case.component:
        return case.component
    if path.suffix == ".json":
        if "tokenizer" in case.meta and "cases" in case.meta:
            return "tokenizer"
        if "options_1_0_0" in case.meta:
            return "pipeline defaults"
        if "encoder_rows" in case.meta:
            return "audio lengths"
        return None
    if case.tensors and not any(key.startswith(("in/", "out/")) for key in case.tensors):
        lora = import_module("tests.runners.lora")
        # A LoRA file is a case only beside the result that it must give.
        if lora.is_lora(case.tensors) and lora.fuse_case_beside(path) is not None:
            return "lora file"
    return None


def run(path: Path) -> Outcome:
    """Run one case; every exception becomes a failed outcome with its reason."""
    component = identify(path) or "unknown"
    case = Case.load(path)
    if component in LATER:
        return Outcome(path, component, "later", f"{LATER[component]} is not built yet")
    if component not in RUNNERS:
        return Outcome(path, component, "failed", "no runner knows this component")
    module, _, function = RUNNERS[component].partition(":")
    try:
        runner: Runner = getattr(import_module(f"tests.runners.{module}"), function)
        with torch.inference_mode():
            runner(case)
        case.finish()
    except GoldenMismatch as error:
        return Outcome(path, component, "failed", str(error), case.comparisons)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return Outcome(path, component, "failed", message, case.comparisons)
    return Outcome(path, component, "passed", "", case.comparisons)
