"""Configuration of the video VAE: read from a checkpoint's metadata, or inferred from parameter shapes.

Source: official ltx-core 1.0.0 (CausalVideoAutoencoder), released files LTX-2 19B and LTX-2.3 22B.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any, Literal, Self

from diffsynth.errors import CheckpointError
from diffsynth.models.ltx2.config import Sections, Shapes, parse_section

SPATIAL_SCALE = 32
"""Pixels per latent cell, in height and in width."""
TEMPORAL_SCALE = 8
"""Frames per latent frame; latent frame 0 stands for the first frame alone."""

PaddingMode = Literal["zeros", "reflect"]
Strides = tuple[int, int, int]

RES = "res_x"
_AXES: dict[str, Strides] = {
    "compress_all": (2, 2, 2),
    "compress_space": (1, 2, 2),
    "compress_time": (2, 1, 1),
}
_ENCODER_STRIDES = {f"{kind}_res": strides for kind, strides in _AXES.items()}
_STRIDES = {RES: (1, 1, 1), **_AXES, **_ENCODER_STRIDES}
_OTHER_MODEL = "the file belongs to another model: `diffsynth inspect FILE`"

# Fields that the network implements with one value only, and those that change no arithmetic.
_REQUIRED: dict[str, Any] = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "timestep_conditioning": False,
    "use_quant_conv": False,
    "normalize_latent_channels": False,
    "scaling_factor": 1.0,
}
_IGNORED = frozenset({"encoder_base_channels"})  # ltx-core takes latent_channels in its place
_PADDING_KEYS = ("spatial_padding_mode", "encoder_spatial_padding_mode", "decoder_spatial_padding_mode")
_CONDITIONING_KEYS = ("time_embedder", "scale_shift_table", "timestep_scale_multiplier", "per_channel_scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One entry of ``encoder_blocks`` or ``decoder_blocks``."""

    kind: str
    """``res_x``, or ``compress_{all,space,time}`` (decoder), the same with ``_res`` (encoder)."""
    num_layers: int = 0
    """Residual blocks of a ``res_x``."""
    multiplier: int = 1
    """How much the number of channels grows in a down block, shrinks in an up block."""
    residual: bool = False
    """An up block with a shortcut; only ``compress_all`` reads it."""

    @property
    def strides(self) -> Strides:
        """Change of scale over (frames, height, width)."""
        return _STRIDES[self.kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoVAEConfig:
    """Both halves; the stages of a half that the file does not hold are an empty tuple."""

    encoder_blocks: tuple[Stage, ...] = ()
    """From pixels to latent, as the modules are numbered."""
    decoder_blocks: tuple[Stage, ...] = ()
    """From pixels to latent, as the file lists them: module ``up_blocks.0`` is the last entry."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    patch_size: int = 4
    decoder_base_channels: int = 128
    causal_decoder: bool = False
    encoder_padding: PaddingMode = "zeros"
    decoder_padding: PaddingMode = "reflect"

    def __post_init__(self) -> None:
        for half, stages in (("encoder", self.encoder_blocks), ("decoder", self.decoder_blocks)):
            if not stages:
                continue
            scale = tuple(prod(stage.strides[axis] for stage in stages) for axis in range(3))
            scale = (scale[0], scale[1] * self.patch_size, scale[2] * self.patch_size)
            if scale != (TEMPORAL_SCALE, SPATIAL_SCALE, SPATIAL_SCALE):
                raise CheckpointError(
                    f"the video {half} has scale {scale} over frames, height, width;"
                    f" LTX-2 has {TEMPORAL_SCALE}, {SPATIAL_SCALE}, {SPATIAL_SCALE}",
                    hint=_OTHER_MODEL,
                )

    @classmethod
    def from_sections(cls, sections: Sections) -> Self:
        """Read the member ``vae`` of the metadata ``config``.

        The padding of both halves follows ``spatial_padding_mode``.  Without it the encoder pads with zeros
        and the decoder reflects (LTX-2); LTX-2.3 states ``zeros`` for both.

        Raises:
            CheckpointError: no such member, a key this network does not know, or a variant that it does not
                implement (conditioning on a timestep, injected noise, group norm, another VAE class).
        """
        if not isinstance(sections.get("vae"), Mapping):
            raise CheckpointError("the metadata has no section `vae`", hint=_OTHER_MODEL)
        section = dict(sections["vae"])
        if section.get("timestep_conditioning", True) is not False:
            raise CheckpointError(
                "the video decoder is conditioned on a timestep (timestep_conditioning is true, or absent,"
                " which means true); no LTX-2 or LTX-2.3 file is, and it is not supported",
                hint=_OTHER_MODEL,
            )
        both, encoder, decoder = (section.pop(key, None) for key in _PADDING_KEYS)
        section["encoder_padding"] = _padding(both or encoder or "zeros")
        section["decoder_padding"] = _padding(both or decoder or "reflect")
        section["encoder_blocks"] = _parse_stages(section.get("encoder_blocks", ()), {RES, *_ENCODER_STRIDES})
        section["decoder_blocks"] = _parse_stages(section.get("decoder_blocks", ()), {RES, *_AXES})
        return parse_section(cls, section, ignored=_IGNORED, required=_REQUIRED)

    @classmethod
    def infer(cls, shapes: Shapes) -> Self:
        """Reconstruct the configuration from shapes, for files without metadata; one half may be missing.

        Args:
            shapes: the file's keys, with or without the leading ``vae.``, or those of one bare module.

        Padding and shortcuts leave no trace in shapes: a decoder whose up blocks are all ``compress_all`` is
        LTX-2 (reflect, with shortcuts), any other LTX-2.3 (zeros, without).

        Raises:
            CheckpointError: neither half is there, or the keys belong to another VAE.
        """
        encoder = _half(shapes, "encoder", "down_blocks")
        decoder = _half(shapes, "decoder", "up_blocks")
        if not encoder and not decoder:
            raise CheckpointError("no key of a video VAE: no down_blocks, no up_blocks", hint=_OTHER_MODEL)
        conditioned = [key for key in (*encoder, *decoder) if any(part in key for part in _CONDITIONING_KEYS)]
        if conditioned:
            raise CheckpointError(
                f"the video VAE is conditioned on a timestep or on noise ({conditioned[0]}): not supported",
                hint=_OTHER_MODEL,
            )
        try:
            values = {**_infer_encoder(encoder), **_infer_decoder(decoder)}
        except (KeyError, IndexError) as error:
            raise CheckpointError(
                f"the keys of the video VAE are incomplete: {error}", hint=_OTHER_MODEL
            ) from error
        return cls(**values)


def _padding(mode: object) -> PaddingMode:
    if mode == "zeros":
        return "zeros"
    if mode == "reflect":
        return "reflect"
    raise CheckpointError(f"padding mode {mode!r} of the video VAE is not supported", hint=_OTHER_MODEL)


def _parse_stages(entries: Iterable[Any], kinds: set[str]) -> tuple[Stage, ...]:
    return tuple(_parse_stage(kind, parameters, kinds) for kind, parameters in entries)


def _parse_stage(kind: str, parameters: Any, kinds: set[str]) -> Stage:
    if kind not in kinds:
        raise CheckpointError(f"video VAE block {kind!r} is not supported", hint=_OTHER_MODEL)
    if kind == RES and isinstance(parameters, int):
        return Stage(kind=RES, num_layers=parameters)
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"video VAE block {kind!r}: cannot read {parameters!r}", hint=_OTHER_MODEL)
    if parameters.get("inject_noise"):
        raise CheckpointError(
            "the video decoder injects noise after its convolutions (inject_noise is true); no LTX-2 or"
            " LTX-2.3 file does, and it is not supported",
            hint=_OTHER_MODEL,
        )
    known = {"num_layers", "inject_noise"} if kind == RES else {"multiplier", "residual"}
    needed = {"num_layers"} if kind == RES else {"multiplier"} if kind in _ENCODER_STRIDES else set()
    if parameters.keys() - known or needed - parameters.keys():
        raise CheckpointError(
            f"video VAE block {kind!r}: unknown {sorted(parameters.keys() - known)},"
            f" missing {sorted(needed - parameters.keys())}",
            hint=_OTHER_MODEL,
        )
    if kind == RES:
        return Stage(kind=RES, num_layers=int(parameters["num_layers"]))
    # The official decoder looks at `residual` in `compress_all` alone.
    residual = kind == "compress_all" and bool(parameters.get("residual", False))
    return Stage(kind=kind, multiplier=int(parameters.get("multiplier", 1)), residual=residual)


def _half(shapes: Shapes, half: str, blocks: str) -> dict[str, tuple[int, ...]]:
    """The keys of one half, without their prefix; empty when the file does not hold it."""
    for prefix in (f"vae.{half}.", f"{half}.", ""):
        if any(key.startswith(f"{prefix}{blocks}.") for key in shapes):
            return {
                key.removeprefix(prefix): tuple(shape)
                for key, shape in shapes.items()
                if key.startswith(prefix)
            }
    return {}


def _infer_encoder(shapes: Shapes) -> dict[str, Any]:
    if not shapes:
        return {}
    latent_channels = shapes["conv_out.conv.weight"][0] - 1
    stages = tuple(_infer_stages(shapes, "down_blocks", up=False))
    patch_size = isqrt(_divide(shapes["conv_in.conv.weight"][1], 3))
    return {"encoder_blocks": stages, "latent_channels": latent_channels, "patch_size": patch_size}


def _infer_decoder(shapes: Shapes) -> dict[str, Any]:
    if not shapes:
        return {}
    stages = _infer_stages(shapes, "up_blocks", up=True)
    ltx2 = all(stage.kind in (RES, "compress_all") for stage in stages)
    width, latent_channels = shapes["conv_in.conv.weight"][:2]
    return {
        "decoder_blocks": tuple(
            Stage(
                kind=s.kind, num_layers=s.num_layers, multiplier=s.multiplier, residual=ltx2 and s.kind != RES
            )
            for s in reversed(stages)
        ),
        "latent_channels": latent_channels,
        "decoder_base_channels": _divide(width, 8),
        "patch_size": isqrt(_divide(shapes["conv_out.conv.weight"][0], 3)),
        "decoder_padding": "reflect" if ltx2 else "zeros",
    }


def _infer_stages(shapes: Shapes, blocks: str, *, up: bool) -> list[Stage]:
    """Stages in module order; the width after a stage is what the next one takes in."""
    pattern = re.compile(rf"{blocks}\.(\d+)\.(?:res_blocks\.(\d+)\.)?conv")
    layers: dict[int, set[str]] = {}
    for match in filter(None, map(pattern.match, shapes)):
        layers.setdefault(int(match[1]), set()).update({match[2]} - {None})
    stages = []
    for index in range(len(layers)):
        if layers[index]:
            stages.append(Stage(kind=RES, num_layers=len(layers[index])))
            continue
        rows, width_in = shapes[f"{blocks}.{index}.conv.conv.weight"][:2]
        width_out = _width_in(shapes, blocks, index + 1, last=index + 1 == len(layers))
        factor = _divide(rows, width_out) if up else _divide(width_out, rows)
        kinds = {prod(strides): kind for kind, strides in (_AXES if up else _ENCODER_STRIDES).items()}
        multiplier = _divide(width_in, width_out) if up else _divide(width_out, width_in)
        stages.append(Stage(kind=kinds[factor], multiplier=multiplier))
    return stages


def _width_in(shapes: Shapes, blocks: str, index: int, *, last: bool) -> int:
    if last:
        return shapes["conv_out.conv.weight"][1]
    resampling = shapes.get(f"{blocks}.{index}.conv.conv.weight")
    return (resampling or shapes[f"{blocks}.{index}.res_blocks.0.conv1.conv.weight"])[1]


def _divide(number: int, divisor: int) -> int:
    if divisor == 0 or number % divisor:
        raise CheckpointError(
            f"widths of the video VAE do not fit together: {number} is no multiple of {divisor}",
            hint=_OTHER_MODEL,
        )
    return number // divisor
