"""Golden cases of the video VAE: encoder, decoder, tile plans, tiled decode and encode."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from diffsynth.models.ltx2.tiling import Interval, TileConfig, TilePlan, decode_plan, encode_plan
from diffsynth.models.ltx2.video_tiling import decode_tiles, encode_tiled
from diffsynth.models.ltx2.video_vae import IGNORED_KEYS, VideoDecoder, VideoEncoder, VideoVAEConfig
from tests.runners.case import Case, GoldenMismatch

Half = TypeVar("Half", VideoEncoder, VideoDecoder)
AXES = ("t", "h", "w")


def encoder(case: Case) -> None:
    module = build(VideoEncoder, case)
    for tag, pixels in tagged(case, "in/video_u8"):
        latent = run_with_mids(case, module, from_uint8(pixels).to(case.dtype), tag)
        for name, frames in outputs(case, "out/latent", tag, "first"):
            case.check(
                name, latent if frames is None else module(from_uint8(pixels[:, :, :frames]).to(case.dtype))
            )


def decoder(case: Case) -> None:
    module = build(VideoDecoder, case)
    for tag, latent in tagged(case, "in/latent"):
        pixels = run_with_mids(case, module, latent, tag)
        for name, step in outputs(case, "out/video", tag):
            case.check(name, pixels[..., :: step or 1, :: step or 1])


def tile_plans(case: Case) -> None:
    for name, stated in case.meta["plans"].items():
        frames, height, width = stated["axis_lengths_TxHxW"]
        tiling = TileConfig(**stated["tiling"])
        kind = stated["kind"]
        if kind == "decode":
            plan = decode_plan((frames, height, width), tiling)
        else:
            scheme = "official" if kind == "encode_ltx_core" else "diffsynth"
            plan = encode_plan((frames, height, width), tiling, scheme)  # type: ignore[arg-type]
        check_plan(case, f"out/{name}/", plan)


def tiled_decode(case: Case) -> None:
    module = build(VideoDecoder, case)
    tiling = TileConfig(**case.meta["tiling"])
    for tag, latent in tagged(case, "in/latent"):
        frames, height, width = latent.shape[2:]
        plan = decode_plan((frames, height, width), tiling)
        check_plan(case, "mid/tiles/", plan)
        t, h, w = plan.time[0], plan.height[0], plan.width[0]
        first = latent[:, :, t.start : t.stop, h.start : h.stop, w.start : w.stop]
        for name, step in outputs(case, "mid/first_tile_decoded", tag):
            case.check(name, module(first)[..., :: step or 1, :: step or 1])
        for name, step in outputs(case, "mid/video_untiled", tag):
            case.check(name, module(latent)[..., :: step or 1, :: step or 1])
        chunks = list(decode_tiles(module, latent, tiling))
        if "mid/chunk_frame_counts" in case:
            counts = [chunk.shape[2] for chunk in chunks]
            case.check_equal("mid/chunk_frame_counts", counts, case["mid/chunk_frame_counts"].tolist())
        for name, step in outputs(case, "out/video_tiled", tag):
            case.check(name, torch.cat(chunks, dim=2)[..., :: step or 1, :: step or 1])


def tiled_encode(case: Case) -> None:
    module = build(VideoEncoder, case)
    tiling = TileConfig(**case.meta["tiling"])
    scheme = "diffsynth" if "diffsynth" in case.variant.lower() else "official"
    for half, factor in (("in/video_u8_half", 2), ("in/video_u8", 1)):
        for tag, small in tagged(case, half):
            pixels = from_uint8(small).repeat_interleave(factor, -1).repeat_interleave(factor, -2)
            plan = encode_plan(tuple(pixels.shape[2:]), tiling, scheme)  # type: ignore[arg-type]
            check_plan(case, "mid/tiles/", plan)
            for name, _ in outputs(case, "mid/latent_untiled", tag):
                case.check(name, module(pixels))
            for name, _ in outputs(case, "out/latent_tiled", tag):
                case.check(name, encode_tiled(module, pixels, tiling, scheme))  # type: ignore[arg-type]


def from_uint8(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def build(half: type[Half], case: Case) -> Half:
    """The module of the case, built on the meta device and loaded strictly."""
    with torch.device("meta"):
        module = half(VideoVAEConfig.from_sections(case.meta["config"]))
    state = rename(case.weights(), half.KEY_PREFIXES)
    module.load_state_dict(
        {k: v for k, v in state.items() if k not in IGNORED_KEYS}, strict=True, assign=True
    )
    return module.eval()


def rename(weights: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights below ``prefixes`` under their module names."""
    return {
        inside + key.removeprefix(outside): value
        for outside, inside in prefixes.items()
        for key, value in weights.items()
        if key.startswith(outside)
    }


def tagged(case: Case, stem: str) -> list[tuple[str, Tensor]]:
    """Inputs ``<stem>`` and ``<stem>_<tag>``, the tag being empty for the first."""
    pattern = re.compile(rf"{re.escape(stem)}(?:_(?P<tag>(?!half).+))?")
    matches = [(pattern.fullmatch(name), tensor) for name, tensor in case.tensors.items()]
    return [(match["tag"] or "", tensor) for match, tensor in matches if match]


def outputs(case: Case, stem: str, tag: str, word: str = "every") -> Iterable[tuple[str, int | None]]:
    """Expected tensors of one input: name, and the number of a suffix ``_<word><number>`` if there is one."""
    start = f"{stem}_{tag}" if tag else stem
    pattern = re.compile(rf"{re.escape(start)}(?:_{word}(\d+))?")
    for name in case.tensors:
        match = pattern.fullmatch(name)
        if match:
            yield name, int(match[1]) if match[1] else None


def run_with_mids(case: Case, module: nn.Module, x: Tensor, tag: str) -> Tensor:
    """The module's result; ``mid/<tag>/<submodule>`` are compared in the order of computation."""
    names = {name for name in case.group(f"mid/{tag}/") if isinstance(case[f"mid/{tag}/{name}"], Tensor)}
    computed: dict[str, Tensor] = {}
    handles = []
    for name, submodule in module.named_modules():
        if name in names:
            # Later layers work in place on what earlier ones returned.
            def keep(_module: nn.Module, _args: object, result: Tensor, name: str = name) -> None:
                computed[name] = result.clone()

            handles.append(submodule.register_forward_hook(keep))
    result = module(x)
    for handle in handles:
        handle.remove()
    if names - computed.keys():
        raise GoldenMismatch(f"no such modules: {sorted(names - computed.keys())}")
    for name, tensor in computed.items():
        case.check(f"mid/{tag}/{name}", tensor)
    return result


def check_plan(case: Case, prefix: str, plan: TilePlan) -> None:
    """Compare every table and mask below ``prefix``."""
    for axis, intervals in zip(AXES, (plan.time, plan.height, plan.width), strict=True):
        table = f"{prefix}{axis}_intervals"
        if table in case:
            case.check_equal(table, *rows(intervals, case[table].tolist()))
        for index, interval in enumerate(intervals):
            mask = f"{prefix}{axis}_mask_{index}"
            if mask in case:
                actual, expected = torch.tensor(interval.mask), case[mask]
                if expected.numel() == 1:  # stands for a whole axis
                    expected = expected.expand_as(actual)
                if actual.shape != expected.shape:
                    raise GoldenMismatch(f"{mask}: {len(actual)} values, expected {len(expected)}")
                case.compare(mask, actual, expected)


def rows(
    intervals: tuple[Interval, ...], expected: list[list[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Both tables; where the expected one says -1 for a whole axis, so does the actual one."""
    end, out_end = intervals[-1].stop, intervals[-1].out_stop
    actual = [[i.start, i.stop, i.out_start, i.out_stop] for i in intervals]
    for mine, other in zip(actual, expected, strict=False):
        mine[1] = -1 if other[1] == -1 and mine[:2] == [0, end] else mine[1]
        mine[3] = -1 if other[3] == -1 and mine[2:] == [0, out_end] else mine[3]
    return actual, expected
