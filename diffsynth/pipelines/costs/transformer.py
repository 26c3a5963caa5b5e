"""Cost of denoising: one step of the LTX-2 transformer with all its guidance passes.

Legend: T video tokens, A audio tokens, S text tokens, D video width, d audio width, P passes.
All figures are for one sample without gradients, with attention that never makes a score matrix.
"""

from dataclasses import dataclass

from diffsynth.models.ltx2.modulation import SINUSOID_WIDTH
from diffsynth.models.ltx2.transformer_config import TransformerConfig
from diffsynth.pipelines.costs.cost import Cost

STATE_COPIES = 5
"""float32 copies of a stream's latent beside the network: noisy and clean, state and estimate of the last
finished step, and the start of the stage."""
STEP_COPIES = 6
"""The same while the estimates of a step are combined; velocities and estimates of the passes come on top."""
POSITION_BYTES = 8
"""Start and end of a token on one axis, float32."""
INDEX_BYTES = 8
LOG_SUM_BYTES = 4
"""Fused attention keeps one float32 per head and query."""
FEED_FORWARD_GROWTH = 4
CHUNK = 256
"""Matrix products with fewer rows are slow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseSizes:
    """What one step works on.

    Attributes:
        video, audio, text: tokens; 0 for a stream that is absent.
        passes: guidance passes, which share one traversal of the blocks.
        contexts: encoded prompts that they read.
        prompts: encoded prompts that are kept, whether they are read or not.
        timesteps: distinct noise levels among the tokens of a stream: 2 with a conditioning image.
        chunk_tokens: tokens that a feed-forward handles at once, None for all.
        itemsize: bytes per value of the compute dtype.
        lora_rank: rank of the LoRAs beside the weights, all together; 0 for none.
        carried: float32 copies of the latents that the sampler keeps while the network works, beside Euler's.
        weighted: whether video tokens attend to each other with weights.
    """

    video: int
    audio: int
    text: int
    passes: int = 1
    contexts: int = 1
    prompts: int = 1
    timesteps: int = 1
    chunk_tokens: int | None = None
    itemsize: int = 2
    lora_rank: int = 0
    carried: int = 0
    weighted: bool = False


def free_chunk(tokens: int) -> int | None:
    """The largest feed-forward chunk, a multiple of 256, whose memory stays below that of self-attention.

    A chunk of c tokens holds 2 T D + 8 c D values at the worst moment, self-attention 5 T D, so 3/8 of the
    tokens cost nothing.  Below 683 tokens, where no multiple of 256 is free, it is 256; up to 256 tokens it
    is None, for all at once.
    """
    return max(CHUNK, tokens * 3 // 8 // CHUNK * CHUNK) if tokens > CHUNK else None


def denoise_cost(config: TransformerConfig, sizes: DenoiseSizes) -> Cost:
    """One denoising step: bytes on the device beside weights, and operations of one traversal."""
    values = _kept_values(config, sizes) + max(
        _stream_peak(config, config.width, sizes.video, sizes),
        _stream_peak(config, config.audio_width, sizes.audio, sizes),
        _exchange_peak(config, sizes),
        _logarithm_peak(sizes),
    )
    log_sums = LOG_SUM_BYTES * config.num_attention_heads * max(sizes.video, sizes.audio)
    network = values * sizes.itemsize + log_sums + _state_bytes(config, sizes, STATE_COPIES + sizes.carried)
    # Samplers that keep more also compute with more; a single pass has estimates of its own all the same.
    combining = STEP_COPIES + 3 * sizes.carried // 2 + max(9 * sizes.passes // 4, 3)
    sampler = _state_bytes(config, sizes, combining)
    nbytes = max(network, sampler) + _prompt_bytes(config, sizes) + _attention_bytes(sizes)
    return Cost(nbytes, sizes.passes * config.num_layers * _block_flops(config, sizes))


def _kept_values(config: TransformerConfig, sizes: DenoiseSizes) -> int:
    """Values in the compute dtype that live through all blocks."""
    both = bool(sizes.video and sizes.audio)
    total = 0
    for tokens, width, channels in (
        (sizes.video, config.width, config.in_channels),
        (sizes.audio, config.audio_width, config.audio_in_channels),
    ):
        if not tokens:
            continue
        total += tokens * channels  # the latent in the compute dtype
        total += sizes.passes * tokens * width  # the hidden state of every pass
        total += tokens * width  # rotation, cosine and sine of half a width each
        total += tokens * config.audio_cross_attention_dim if both else 0
        total += _modulation_values(config, width, sizes.timesteps, both=both)
        if not config.caption_proj_before_connector:  # encoded prompts, projected
            total += sizes.contexts * sizes.text * width
    return total


def _modulation_values(config: TransformerConfig, width: int, timesteps: int, *, both: bool) -> int:
    """Rows of modulation by distinct timestep, each network's embedding and sinusoid included."""
    rows = timesteps * (config.modulation_rows + 1)
    if config.cross_attention_adaln:
        rows += 2
    if both:
        rows += timesteps * (4 + 1) + 1
    return rows * width + SINUSOID_WIDTH


def _stream_peak(config: TransformerConfig, width: int, tokens: int, sizes: DenoiseSizes) -> int:
    """The largest of a stream's own sub-steps, in values beside what is kept."""
    if not tokens:
        return 0
    attention = 5 * tokens  # modulated input, queries, keys, values, result
    # Input, queries, result; keys, values, and the context where it is modulated.
    text = 3 * tokens + (3 if config.cross_attention_adaln else 2) * sizes.text
    chunk = tokens if sizes.chunk_tokens is None else min(tokens, sizes.chunk_tokens)
    # Before and after the activation the inner width lives twice; in pieces there is a result beside them.
    forward = tokens + 2 * FEED_FORWARD_GROWTH * chunk + (tokens if chunk < tokens else 0)
    # Beside the result of a layer with a LoRA, the product with its first factor.
    rank = sizes.lora_rank
    return max(
        width * attention + rank * tokens, width * text + rank * max(tokens, sizes.text), width * forward
    )


def _exchange_peak(config: TransformerConfig, sizes: DenoiseSizes) -> int:
    """Attention between the streams: both normalised, both modulated, then queries, keys, values, result."""
    if not (sizes.video and sizes.audio):
        return 0
    inner = config.audio_cross_attention_dim
    inputs = 2 * (sizes.video * config.width + sizes.audio * config.audio_width)
    return inputs + inner * (2 * max(sizes.video, sizes.audio) + 2 * min(sizes.video, sizes.audio))


def _prompt_bytes(config: TransformerConfig, sizes: DenoiseSizes) -> int:
    """Encoded prompts of both streams as they come."""
    widths = [config.caption_channels] * 2
    if config.caption_proj_before_connector:
        widths = [config.cross_attention_dim, config.audio_cross_attention_dim]
    return sizes.prompts * sizes.text * sum(widths) * sizes.itemsize


def _attention_bytes(sizes: DenoiseSizes) -> int:
    """Weights between all video tokens in float32, and their logarithm in the compute dtype."""
    return sizes.video**2 * (4 + sizes.itemsize) if sizes.weighted else 0


def _logarithm_peak(sizes: DenoiseSizes) -> int:
    """Beside both: a float32 copy on the way to another dtype, or which of them are zero."""
    nbytes = 4 if sizes.itemsize < 4 else 1
    return sizes.video**2 * nbytes // sizes.itemsize if sizes.weighted else 0


def _state_bytes(config: TransformerConfig, sizes: DenoiseSizes, copies: int) -> int:
    """Latents, masks and positions of the sampler, which live on the device for the whole phase."""
    total = 0
    for tokens, channels, axes in (
        (sizes.video, config.in_channels, 3),
        (sizes.audio, config.audio_in_channels, 1),
    ):
        total += tokens * (copies * 4 * channels + axes * POSITION_BYTES)
        if sizes.timesteps > 1:
            total += tokens * (2 * 4 + INDEX_BYTES)  # mask, timesteps, index of the distinct ones
    return total


def _block_flops(config: TransformerConfig, sizes: DenoiseSizes) -> float:
    """Operations of one block in one pass."""
    inner, both = config.audio_cross_attention_dim, bool(sizes.video and sizes.audio)
    flops = 0.0
    for tokens, other, width, text in (
        (sizes.video, sizes.audio, config.width, config.cross_attention_dim),
        (sizes.audio, sizes.video, config.audio_width, config.audio_cross_attention_dim),
    ):
        if not tokens:
            continue
        # Self-attention 4 matrices, text attention 2 (keys and values belong to the text), feed-forward 8.
        weights = (4 + 2 + 2 * FEED_FORWARD_GROWTH) * width**2
        lora = (4 * 2 + 2 * 2 + 2 * (1 + FEED_FORWARD_GROWTH)) * width
        if both:  # query and result where it listens, key and value where it speaks
            weights += 4 * width * inner
            lora += 4 * (width + inner)
            flops += 4 * tokens * other * inner
        flops += 2 * tokens * (weights + sizes.lora_rank * lora)
        flops += 2 * sizes.text * 2 * text * width
        flops += 4 * tokens * (tokens + sizes.text) * width
    return flops
