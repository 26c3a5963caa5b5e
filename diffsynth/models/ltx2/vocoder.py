"""HiFi-GAN vocoder of LTX-2: log mel spectrogram -> stereo waveform at 24 kHz.

B batch, C channels, M mel frames, T time steps of a stage, S samples.
The generator's skeleton also serves the two generators of LTX-2.3 (``vocoder_bwe``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.models.ltx2.config import Sections, Shapes, parse_section

KEY_PREFIXES: Mapping[str, str] = MappingProxyType({"vocoder.": ""})
"""Only the leading prefix goes: LTX-2.3 has ``vocoder.vocoder.`` and keeps the second one."""

STEREO = 2
MEL_BINS = 64
"""The spectrogram that every released vocoder reads: two channels of 64 bins, whatever the metadata says."""

# What a transposed convolution of this kernel size multiplies the length by in every released vocoder; the
# rate leaves no trace in the shapes.
_RATE_OF_KERNEL: Mapping[int, int] = MappingProxyType({16: 6, 15: 5, 12: 6, 11: 5, 8: 2, 4: 2})
_RELEASED_DILATIONS = (1, 3, 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig:
    """One generator: lengths grow by ``upsample_rates``, channels halve from ``upsample_initial_channel``.

    The defaults are those of the file format.
    """

    upsample_initial_channel: int = 1024
    upsample_rates: tuple[int, ...] = (6, 5, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (16, 15, 8, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = (_RELEASED_DILATIONS,) * 3
    use_tanh_at_final: bool = True
    use_bias_at_final: bool = True

    def __post_init__(self) -> None:
        stages = list(zip(self.upsample_rates, self.upsample_kernel_sizes, strict=False))
        if (
            not stages
            or len(self.upsample_rates) != len(self.upsample_kernel_sizes)
            or len(self.resblock_kernel_sizes) != len(self.resblock_dilation_sizes)
            or not all(self.resblock_dilation_sizes)
            or not self.resblock_kernel_sizes
            or any(kernel < rate for rate, kernel in stages)
            or self.upsample_initial_channel < 2 ** len(stages)
        ):
            raise CheckpointError(
                f"vocoder: upsampling by {self.upsample_rates} with kernels {self.upsample_kernel_sizes} "
                f"from {self.upsample_initial_channel} channels, residual kernels "
                f"{self.resblock_kernel_sizes} and dilations {self.resblock_dilation_sizes} "
                "do not fit together",
                hint="the metadata is damaged: `diffsynth inspect FILE`",
            )

    @property
    def samples_per_frame(self) -> int:
        """Output samples for each mel frame."""
        return math.prod(self.upsample_rates)


@dataclass(frozen=True, kw_only=True, slots=True)
class VocoderConfig(GeneratorConfig):
    """The LTX-2 vocoder; ``output_sampling_rate`` in Hz."""

    output_sampling_rate: int = 24000

    @classmethod
    def from_sections(cls, config: Sections) -> Self:
        """Read the section ``vocoder`` of the metadata.

        Raises:
            CheckpointError: no such section, an unknown key (the LTX-2.3 section has others: ``bwe``), or a
                kind of residual block that LTX-2 does not have.
        """
        return parse_section(cls, vocoder_section(config), required={"resblock": "1", "stereo": True})

    @classmethod
    def infer(cls, shapes: Shapes) -> Self:
        """Derive the configuration from shapes, by the keys of the file or of the module.

        Rates and dilations leave no trace: they are those of the released vocoder with these kernels.

        Raises:
            CheckpointError: the tensors are not those of this vocoder.
        """
        prefix = "vocoder." if "vocoder.conv_pre.weight" in shapes else ""
        generator = infer_generator(shapes, prefix)
        return cls(
            upsample_initial_channel=generator.upsample_initial_channel,
            upsample_rates=generator.upsample_rates,
            upsample_kernel_sizes=generator.upsample_kernel_sizes,
            resblock_kernel_sizes=generator.resblock_kernel_sizes,
            resblock_dilation_sizes=generator.resblock_dilation_sizes,
            use_bias_at_final=generator.use_bias_at_final,
        )


def vocoder_section(config: Sections) -> Mapping[str, Any]:
    """The section ``vocoder`` of the metadata.

    Raises:
        CheckpointError: it is missing.
    """
    section: Mapping[str, Any] | None = config.get("vocoder")
    if not section:
        raise CheckpointError(
            "the metadata has no section `vocoder`", hint="see what the file holds: `diffsynth inspect FILE`"
        )
    return section


def infer_generator(shapes: Shapes, prefix: str, *, use_tanh_at_final: bool = True) -> GeneratorConfig:
    """The generator whose keys begin with ``prefix``; rates and dilations are the released ones.

    Raises:
        CheckpointError: the tensors are not those of a generator, or of one that was never released.
    """
    pre = shapes.get(f"{prefix}conv_pre.weight")
    kernels = _kernel_sizes(shapes, prefix + "ups.{}.weight")
    blocks = _kernel_sizes(shapes, prefix + "resblocks.{}.convs1.0.weight")
    dilated = len(_kernel_sizes(shapes, prefix + "resblocks.0.convs1.{}.weight"))
    if pre is None or not kernels or not blocks or len(blocks) % len(kernels):
        raise CheckpointError(
            f"these tensors are not those of a vocoder (looked for {prefix}conv_pre, ups and resblocks)",
            hint="see what the file holds: `diffsynth inspect FILE`",
        )
    unknown = [kernel for kernel in kernels if kernel not in _RATE_OF_KERNEL]
    if unknown or dilated != len(_RELEASED_DILATIONS):
        raise CheckpointError(
            f"a vocoder with upsampling kernels {kernels} and {dilated} dilations per block was never "
            "released, and its file does not state its rates",
            hint="a file with the metadata key `config`",
        )
    resblock_kernels = blocks[: len(blocks) // len(kernels)]
    return GeneratorConfig(
        upsample_initial_channel=pre[0],
        upsample_rates=tuple(_RATE_OF_KERNEL[kernel] for kernel in kernels),
        upsample_kernel_sizes=tuple(kernels),
        resblock_kernel_sizes=tuple(resblock_kernels),
        resblock_dilation_sizes=(_RELEASED_DILATIONS,) * len(resblock_kernels),
        use_tanh_at_final=use_tanh_at_final,
        use_bias_at_final=f"{prefix}conv_post.bias" in shapes,
    )


def _kernel_sizes(shapes: Shapes, template: str) -> list[int]:
    """Last axis of ``template.format(0)``, ``template.format(1)``, ... as far as they go."""
    sizes: list[int] = []
    while (key := template.format(len(sizes))) in shapes:
        sizes.append(shapes[key][-1])
    return sizes


class Conv1d(nn.Conv1d):
    """Convolution in float32 whatever the stored dtype: its parameters are cast up for the call.

    A vocoder chains about a hundred convolutions; in bfloat16 their errors become audible noise.  Autocast to
    float32 exists on CUDA alone, hence the explicit cast.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T) float32 -> (B, C', T') float32."""
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(input, self.weight.float(), bias)


class ConvTranspose1d(nn.ConvTranspose1d):
    """Transposed convolution in float32 whatever the stored dtype."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, T) float32 -> (B, C', T * stride) float32 with the paddings used here."""
        bias = None if self.bias is None else self.bias.float()
        padding = cast("tuple[int, ...]", self.padding)
        return nn.functional.conv_transpose1d(input, self.weight.float(), bias, self.stride, padding)


class ResidualBlock(nn.Module):
    """HiFi-GAN residual block of type 1: a dilated and a plain convolution for each dilation, with skips."""

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs1 = dilated_convolutions(channels, kernel_size, dilations)
        self.convs2 = dilated_convolutions(channels, kernel_size, [1] * len(dilations))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) float32 -> the same shape, a new tensor."""
        for conv1, conv2 in zip(self.convs1, self.convs2, strict=True):
            h = conv1(nn.functional.leaky_relu(x, 0.1))
            x = conv2(nn.functional.leaky_relu_(h, 0.1)).add_(x)
        return x


def dilated_convolutions(channels: int, kernel_size: int, dilations: Sequence[int]) -> nn.ModuleList:
    """One length-preserving convolution for each dilation."""
    return nn.ModuleList(
        Conv1d(channels, channels, kernel_size, dilation=d, padding=d * (kernel_size - 1) // 2)
        for d in dilations
    )


class Generator(nn.Module):
    """Skeleton of all generators: convolution, upsampling stages of parallel residual blocks, convolution.

    Args of the constructor:
        config: sizes.
        block: makes one residual block from (channels, kernel size, dilations).
        act_post: activation before the last convolution.

    ``num_channels`` is how many sound channels it reads and makes: two, but in a subclass for training.
    """

    num_channels: ClassVar[int] = STEREO

    def __init__(
        self,
        config: GeneratorConfig,
        block: Callable[[int, int, Sequence[int]], nn.Module],
        act_post: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.config = config
        width = config.upsample_initial_channel
        self.conv_pre = Conv1d(self.num_channels * MEL_BINS, width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            self.ups.append(
                ConvTranspose1d(width, width // 2, kernel, stride=rate, padding=(kernel - rate) // 2)
            )
            width //= 2
            for size, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(block(width, size, dilations))
        self.act_post = act_post(width)
        self.conv_post = Conv1d(width, self.num_channels, 7, padding=3, bias=config.use_bias_at_final)

    def generate(self, mel: Tensor) -> Tensor:
        """Everything up to the final activation.

        Args:
            mel: (B, 2, M, 64) float32 log mel.

        Returns:
            (B, 2, M * samples_per_frame) float32, not limited.

        Raises:
            RequestError: another number of axes, channels or bins.
        """
        if mel.ndim != 4 or (mel.shape[1], mel.shape[3]) != (self.num_channels, MEL_BINS):
            raise RequestError(
                f"the vocoder cannot read a spectrogram of shape {tuple(mel.shape)}",
                hint=f"(batch, {self.num_channels}, frames, {MEL_BINS})",
            )
        x = self.conv_pre(mel.transpose(2, 3).flatten(1, 2))
        for i in range(len(self.ups)):
            x = self.stage(i, x)
        return self.conv_post(self.act_post(x))

    def stage(self, i: int, x: Tensor) -> Tensor:
        """Upsampling stage ``i``: (B, C, T) -> (B, C / 2, T * rate), the mean of its residual blocks."""
        x = self.ups[i](self.before_upsampling(x))
        num_blocks = len(self.config.resblock_kernel_sizes)
        total = self.resblocks[i * num_blocks](x)
        for k in range(1, num_blocks):
            total.add_(self.resblocks[i * num_blocks + k](x))
        return total.div_(num_blocks)

    def before_upsampling(self, x: Tensor) -> Tensor:
        """Activation in front of each transposed convolution; none unless a subclass has one."""
        return x

    def limit(self, waveform: Tensor) -> Tensor:
        """Final activation into [-1, 1]: tanh or a hard limit, as the configuration says."""
        return waveform.tanh_() if self.config.use_tanh_at_final else waveform.clamp_(-1, 1)


class Vocoder(Generator):
    """The LTX-2 vocoder.  Computes in float32 whatever its stored dtype.

    Source: HiFi-GAN (arXiv 2010.05646), generator V1 for stereo, as in official ltx-core 1.0.0.
    """

    KEY_PREFIXES: ClassVar[Mapping[str, str]] = KEY_PREFIXES
    config_class: ClassVar[type[VocoderConfig]] = VocoderConfig

    def __init__(self, config: VocoderConfig) -> None:
        # The last activation has torch's default slope 0.01, all others 0.1: so it was trained.
        super().__init__(config, ResidualBlock, lambda _: nn.LeakyReLU())
        self.output_sampling_rate = config.output_sampling_rate
        """Hz of the waveform."""

    def forward(self, mel: Tensor) -> Tensor:
        """Turn a spectrogram into sound.

        Args:
            mel: (B, 2, M, 64) natural-log mel magnitudes, time on axis 2, any float dtype.

        Returns:
            (B, 2, 240 * M) in [-1, 1] at ``output_sampling_rate``, dtype of ``mel``.

        Raises:
            RequestError: another number of axes, channels or bins.
        """
        return self.limit(self.generate(mel.float())).to(mel.dtype)

    def before_upsampling(self, x: Tensor) -> Tensor:
        """Leaky ReLU, slope 0.1."""
        return nn.functional.leaky_relu(x, 0.1)


def decode_audio(
    decoder: Callable[[Tensor], Tensor], vocoder: Callable[[Tensor], Tensor], latent: Tensor
) -> Tensor:
    """Normalised audio latent -> waveform.

    The spectrogram goes to the vocoder in float32, so that a bfloat16 decoder does not round the sound to
    eight bits of mantissa.

    Args:
        decoder: an ``AudioDecoder``.
        vocoder: a ``Vocoder`` or ``VocoderBWE``; its ``output_sampling_rate`` is that of the result.
        latent: (1, z, L, F) in the dtype of the decoder.

    Returns:
        (2, S) float32 in [-1, 1].

    Raises:
        RequestError: a batch of more than one.
    """
    if latent.shape[0] != 1:
        raise RequestError(f"audio of {latent.shape[0]} generations at once", hint="decode them one by one")
    return vocoder(decoder(latent).float()).squeeze(0)
