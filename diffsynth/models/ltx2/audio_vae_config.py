"""Configuration of the audio VAE: from the checkpoint's metadata, or from the shapes of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from diffsynth.errors import CheckpointError
from diffsynth.models.ltx2.config import Sections, Shapes, parse_section
from diffsynth.models.ltx2.mel import MelConfig

# Keys of the metadata that change nothing here; the spectrogram spans 0 Hz to half the rate with a window of
# n_fft whatever mel_fmin, mel_fmax and win_length say, and the log-variance half is dropped in any case.
_KNOWN_KEYS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "audio_vae": frozenset({"model", "preprocessing", "variables"}),
        "model": frozenset({"params"}),
        "params": frozenset({"ddconfig", "sampling_rate", "embed_dim"}),
        "preprocessing": frozenset({"audio", "mel", "stft"}),
        "audio": frozenset({"causal_padding", "duration", "max_wav_value", "sampling_rate", "stereo"}),
        "mel": frozenset({"n_mel_channels", "mel_fmin", "mel_fmax"}),
        "stft": frozenset({"filter_length", "hop_length", "win_length", "causal"}),
        "variables": frozenset({"mel_bins"}),
    }
)
_IGNORED_DDCONFIG = frozenset(
    {"double_z", "downsample_time", "dropout", "resolution", "attn_resolutions", "mid_block_add_attention"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioVAEConfig:
    """Architecture of encoder and decoder; the defaults are those of every released checkpoint.

    ``ch`` is the width of the finest level, ``ch_mult`` the width of each level in multiples of it, ``mel``
    the spectrogram that the networks were trained on.  ``latent_bins`` is F, frequency bins of the latent:
    the released files do not state it, since their ``ch`` is also the number of statistics, one per latent
    channel and bin.  A network narrower than that states it.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    in_channels: int = 2
    out_ch: int = 2
    z_channels: int = 8
    latent_bins: int = 0
    mel: MelConfig = field(default_factory=MelConfig)

    def __post_init__(self) -> None:
        stated = self.latent_bins > 0
        if (
            not self.ch_mult
            or min(self.ch, self.z_channels) <= 0
            or self.latent_bins < 0
            or (self.ch % self.z_channels and not stated and not self.shares_statistic)
        ):
            raise CheckpointError(
                f"audio VAE: ch={self.ch}, z_channels={self.z_channels}, ch_mult={self.ch_mult}, "
                f"latent_bins={self.latent_bins} do not fit",
                hint="the metadata is damaged: `diffsynth inspect FILE`",
            )
        if not stated:
            # Where a single value serves all, every level but the last halves the mel bins.
            halved = self.mel.mel_bins // 2 ** (len(self.ch_mult) - 1)
            object.__setattr__(
                self, "latent_bins", self.ch // self.z_channels if self.ch >= self.z_channels else halved
            )

    @property
    def shares_statistic(self) -> bool:
        """Whether one mean and one deviation serve all latent features."""
        return self.ch == 1

    @property
    def num_statistics(self) -> int:
        """Length of the two statistics vectors: one value per latent channel and bin, or one for all."""
        return 1 if self.shares_statistic else self.z_channels * self.latent_bins

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.ch * mult for mult in self.ch_mult)

    @classmethod
    def from_sections(cls, config: Sections) -> Self:
        """Read the section ``audio_vae`` of the metadata.

        Raises:
            CheckpointError: the section is missing, has an unknown key, or asks for something that no
                released checkpoint has and this decoder does not implement: attention, another norm, another
                causality axis.
        """
        section = _section(config, "audio_vae")
        params = _section(_section(section, "model"), "params")
        ddconfig = params.get("ddconfig", {})
        preprocessing = _section(section, "preprocessing")
        _section(preprocessing, "audio")
        stft, mel = _section(preprocessing, "stft"), _section(preprocessing, "mel")
        if stft.get("causal", True) is not True:
            raise CheckpointError(
                "audio VAE: stft.causal=false is not supported, every released checkpoint is causal",
                hint="the file belongs to another model: `diffsynth inspect FILE`",
            )
        _refuse_attention(ddconfig)
        released = MelConfig()
        bins = mel.get("n_mel_channels", _section(section, "variables").get("mel_bins", released.mel_bins))
        spectrogram = MelConfig(
            sampling_rate=params.get("sampling_rate", released.sampling_rate),
            n_fft=stft.get("filter_length", released.n_fft),
            hop_length=stft.get("hop_length", released.hop_length),
            mel_bins=ddconfig.get("mel_bins", bins),
        )
        return parse_section(
            cls,
            {**{k: v for k, v in ddconfig.items() if k != "mel_bins"}, "mel": spectrogram},
            ignored=_IGNORED_DDCONFIG,
            required={"norm_type": "pixel", "causality_axis": "height"},
        )

    @classmethod
    def infer(cls, shapes: Shapes) -> Self:
        """Derive the configuration from shapes, for files without metadata.

        Args:
            shapes: the tensors of an encoder, of a decoder, or of both, by their keys in the file or in the
                module.

        Returns:
            The exact configuration, but that what leaves no trace in shapes (rate, n_fft, hop) and what
            only the absent half shows (``in_channels`` or ``out_ch``) has the released value.

        Raises:
            CheckpointError: the tensors are not those of an audio VAE, or it has attention blocks.
        """
        encoder, decoder = _half(shapes, "encoder", "down."), _half(shapes, "decoder", "up.")
        if any(".attn" in key for key in (*encoder, *decoder)):
            raise _attention_error("the file holds attention weights")
        half, branch = (encoder, "down") if encoder else (decoder, "up")
        widths = [shape[0] for shape in _numbered(half, branch + ".{}.block.0.conv1.conv.weight")]
        blocks = len(_numbered(half, branch + ".0.block.{}.conv1.conv.weight"))
        statistics = _statistics_shape(shapes)
        edges = [half.get(f"conv_{end}.conv.weight") for end in ("in", "out")]
        if not widths or statistics is None or None in edges:
            raise CheckpointError(
                "these tensors are not those of an audio VAE encoder or decoder with its statistics",
                hint="see what the file holds: `diffsynth inspect FILE`",
            )
        released, num_statistics = cls(), statistics[0]
        # A width is a multiple of the number of statistics in every released file, and `ch` is that number.
        ch = widths[0] if widths[0] % num_statistics else num_statistics
        z_channels = encoder["conv_out.conv.weight"][0] // 2 if encoder else decoder["conv_in.conv.weight"][1]
        bins = num_statistics // z_channels if num_statistics > 1 else 0
        return cls(
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=blocks if encoder else blocks - 1,
            in_channels=encoder["conv_in.conv.weight"][1] if encoder else released.in_channels,
            out_ch=decoder.get("conv_out.conv.weight", (released.out_ch,))[0],
            z_channels=z_channels,
            latent_bins=bins,
            mel=MelConfig(mel_bins=bins * 2 ** (len(widths) - 1)) if bins else released.mel,
        )


def _section(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of the metadata, empty where absent, with no key that is not known."""
    section: Mapping[str, Any] = parent.get(name, {})
    extra = section.keys() - _KNOWN_KEYS[name]
    if extra or (name == "audio_vae" and not section):
        problem = f"unknown keys {sorted(extra)}" if extra else "the section is missing"
        raise CheckpointError(
            f"audio VAE metadata, {name}: {problem}",
            hint="the file is newer than this diffsynth, or another model: `diffsynth inspect FILE`",
        )
    return section


def _refuse_attention(ddconfig: Mapping[str, Any]) -> None:
    """Only what the file says counts: an absent key means no attention, as in every released checkpoint.

    (The original code would add attention for an absent key; such a file then holds attention weights, which
    a strict load refuses.)
    """
    resolutions = {
        ddconfig.get("resolution", 256) >> i for i in range(len(ddconfig.get("ch_mult", (1, 2, 4))))
    }
    placed = sorted(resolutions & set(ddconfig.get("attn_resolutions") or ()))
    if placed:
        raise _attention_error(f"attn_resolutions asks for it at {placed}")
    if ddconfig.get("mid_block_add_attention", False):
        raise _attention_error("mid_block_add_attention is true")


def _attention_error(reason: str) -> CheckpointError:
    return CheckpointError(
        f"audio VAE with attention blocks is not supported ({reason}); no released LTX-2 checkpoint has them",
        hint="the audio VAE of LTX-2 or LTX-2.3",
    )


def _half(shapes: Shapes, name: str, mark: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the encoder or decoder by module key; ``mark`` begins keys that only this half has."""
    prefix = f"audio_vae.{name}."
    half = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    if half or not any(key.startswith(mark) for key in shapes):
        return half
    return dict(shapes)


def _numbered(shapes: Shapes, template: str) -> list[tuple[int, ...]]:
    """Shapes of ``template.format(0)``, ``template.format(1)``, ... as far as they go."""
    found: list[tuple[int, ...]] = []
    while (key := template.format(len(found))) in shapes:
        found.append(shapes[key])
    return found


def _statistics_shape(shapes: Shapes) -> tuple[int, ...] | None:
    name = "per_channel_statistics.mean-of-means"
    return shapes.get(f"audio_vae.{name}", shapes.get(name))
