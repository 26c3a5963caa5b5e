"""Cost of the audio VAE and the vocoders.

Legend: L latent frames, M mel frames (4 per latent frame), B mel bins, C channels.
"""

from itertools import accumulate

from diffsynth.models.ltx2.audio_vae_config import AudioVAEConfig
from diffsynth.models.ltx2.vocoder import MEL_BINS, STEREO, GeneratorConfig, VocoderConfig
from diffsynth.models.ltx2.vocoder_bwe import VocoderBWEConfig
from diffsynth.pipelines.costs.cost import Cost

FLOAT32 = 4
MEL_PER_LATENT = 4
KERNEL_2D = 9
ANTI_ALIASING = 2
"""The activation of the LTX-2.3 generators works at twice the rate."""


def audio_decoder_cost(config: AudioVAEConfig, latent_frames: int, itemsize: int) -> Cost:
    """Latent -> spectrogram: from the coarsest level to the finest, residual blocks and an upsampler each."""
    num_blocks, levels = config.num_res_blocks + 1, len(config.widths)
    frames, bins = latent_frames, config.mel.mel_bins >> (levels - 1)
    latent = config.z_channels * frames * bins
    entered = config.widths[-1]
    held = entered * frames * bins  # the input of the level
    peak, flops = 0, 0.0
    for level in reversed(range(levels)):
        width, cells, padded = config.widths[level], frames * bins, (frames + 2) * (bins + 2)
        first = entered * (cells + padded) + width * cells  # into the first convolution and out of it
        second = width * (3 * cells + padded)
        between = width * cells if num_blocks > 1 else 0  # the input of the second block
        peak = max(peak, held + first, held + second, held + between + second)
        flops += num_blocks * 2 * 2.0 * KERNEL_2D * cells * width * max(width, entered)
        if level:
            grown = 4 * cells
            peak = max(peak, held + width * (cells + 2 * grown + (2 * frames + 2) * (2 * bins + 2)))
            held, frames, bins = width * grown, 2 * frames - 1, 2 * bins
        entered = width
    return Cost((peak + latent) * itemsize, flops)


def audio_encoder_cost(config: AudioVAEConfig, latent_frames: int, itemsize: int) -> Cost:
    """Spectrogram -> latent: from the finest level to the coarsest, with a downsampler between levels."""
    num_blocks, levels = config.num_res_blocks, len(config.widths)
    frames, bins = latent_frames * MEL_PER_LATENT, config.mel.mel_bins
    spectrogram = config.in_channels * frames * bins
    entered = config.widths[0]
    held = entered * frames * bins  # the input of the level
    peak, flops = 0, 0.0
    for level, width in enumerate(config.widths):
        cells, padded = frames * bins, (frames + 2) * (bins + 2)
        first = entered * (cells + padded) + width * cells  # into the first convolution and out of it
        second = width * (3 * cells + padded)
        between = width * cells if num_blocks > 1 else 0  # the input of the second block
        peak = max(peak, held + first, held + second, held + between + second)
        flops += num_blocks * 2 * 2.0 * KERNEL_2D * cells * width * max(width, entered)
        if level < levels - 1:
            halved = (frames + 1) // 2 * (bins // 2)
            peak = max(peak, held + width * (cells + (frames + 2) * (bins + 1) + halved))
            held, frames, bins = width * halved, (frames + 1) // 2, bins // 2
        entered = width
    return Cost((peak + spectrogram) * itemsize, flops)


def vocoder_cost(config: VocoderConfig | VocoderBWEConfig, mel_frames: int) -> Cost:
    """Spectrogram -> waveform, always in float32."""
    if isinstance(config, VocoderBWEConfig):
        low = mel_frames * config.vocoder.samples_per_frame
        first = _generator_cost(config.vocoder, mel_frames, anti_aliased=True)
        second = _generator_cost(config.bwe, low // config.hop_length, anti_aliased=True)
        waveforms = FLOAT32 * STEREO * low * (1 + config.ratio)
        return Cost(max(first.nbytes, second.nbytes) + waveforms, first.flops + second.flops)
    return _generator_cost(config, mel_frames, anti_aliased=False)


def _generator_cost(config: GeneratorConfig, mel_frames: int, *, anti_aliased: bool) -> Cost:
    """Stages of parallel residual blocks; kernels are cast to float32 for the length of a call."""
    width, before = config.upsample_initial_channel, config.upsample_initial_channel * mel_frames
    peak, flops = 2 * before + STEREO * MEL_BINS * width * 7, 0.0
    # Input of the stage, sum so far, input of the block, and what a layer makes of it: four tensors, or,
    # anti-aliased, one and three of twice the length.
    alive = 4 + 3 * ANTI_ALIASING if anti_aliased else 7
    grown = accumulate(config.upsample_rates, lambda a, b: a * b)
    for stage, (growth, kernel) in enumerate(zip(grown, config.upsample_kernel_sizes, strict=True), 1):
        channels = width >> stage
        values = channels * mel_frames * growth
        peak = max(peak, 2 * before + values + 2 * channels * channels * kernel)
        peak = max(peak, alive * values + channels**2 * max(config.resblock_kernel_sizes))
        for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
            flops += len(dilations) * 2 * 2.0 * size * channels * values
        before = values
    return Cost(FLOAT32 * (peak + STEREO * MEL_BINS * mel_frames), flops)
