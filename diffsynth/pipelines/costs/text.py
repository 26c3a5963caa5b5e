"""Cost of the text phase: the Gemma layers with the feature sums beside them, then the connectors.

Legend: n tokens of a prompt, k prompts, D Gemma's width (3840), I its inner width, T context length (1024),
W width of a connector.  Prompts run one after another inside a layer, so a layer works at the memory of one.
"""

from collections.abc import Sequence

from diffsynth.models.gemma3_config import Gemma3Config
from diffsynth.models.gemma3_vision import Gemma3VisionConfig
from diffsynth.models.ltx2.connectors import ConnectorConfig, TextConnectorsConfig
from diffsynth.models.ltx2.feature_extractor import FeatureExtractorConfig
from diffsynth.pipelines.costs.cost import Cost

FLOAT32 = 4
FEED_FORWARD_GROWTH = 4


def feature_widths(config: FeatureExtractorConfig) -> tuple[int, ...]:
    """Output widths of the projections: one that both streams share, or one per stream."""
    return (config.video_width, config.audio_width) if config.separate else (config.video_width,)


def gemma_cost(
    gemma: Gemma3Config,
    features: FeatureExtractorConfig,
    tokens: Sequence[int],
    length: int,
    itemsize: int,
) -> Cost:
    """All layers, and the projection of every hidden state as it appears.

    Args:
        tokens: n of every prompt; length: T, of the rotation tables.
        itemsize: of the compute dtype.
    """
    width, inner = gemma.hidden_size, gemma.intermediate_size
    queries = gemma.num_attention_heads * gemma.head_dim
    keys = gemma.num_key_value_heads * gemma.head_dim
    out = sum(feature_widths(features))
    longest, total = max(tokens, default=0), sum(tokens)
    states = total * width * itemsize  # one hidden state of every prompt
    kept = states
    kept += 2 * 2 * length * gemma.head_dim // 2 * itemsize  # cosine and sine for both kinds of layers
    kept += total * out * FLOAT32  # the sums
    attention = 2 * width + 2 * queries + 2 * keys + 2 * queries + queries
    layer = states + longest * itemsize * max(attention, width + 3 * inner)
    # A hidden state in float32, its normalised form, and the slice of the projection in float32.
    project = FLOAT32 * (2 * longest * width + out * width)
    layers = len(gemma.layer_kinds)
    weights = width * (2 * queries + 2 * keys) + 3 * width * inner
    flops = total * 2.0 * (layers * weights + gemma.num_hidden_states * width * out)
    flops += layers * 4.0 * sum(n**2 for n in tokens) * queries
    return Cost(kept + max(layer, project), flops)


def enhance_cost(gemma: Gemma3Config, tokens: int, new_tokens: int, picture: bool, itemsize: int) -> Cost:
    """The text model as a writer; operations are those of one traversal on average.

    Args:
        tokens: of the given text.
        new_tokens: that are written at most; each takes a traversal.
        picture: whether the given text holds one.
        itemsize: of the compute dtype.
    """
    width, inner = gemma.hidden_size, gemma.intermediate_size
    queries = gemma.num_attention_heads * gemma.head_dim
    keys = gemma.num_key_value_heads * gemma.head_dim
    layers, capacity = len(gemma.layer_kinds), tokens + new_tokens
    kinds = set(gemma.layer_kinds)
    kept = 2 * layers * capacity * keys * itemsize
    kept += 2 * len(kinds) * capacity * gemma.head_dim // 2 * itemsize  # cosine and sine
    windowed = "sliding_attention" in kinds and tokens > gemma.sliding_window
    kept += (len(kinds) if picture else windowed) * tokens**2  # masks
    attention = 2 * width + 2 * queries + 2 * keys + 2 * queries + queries
    layer = tokens * itemsize * max(width + attention, 3 * width + 3 * inner)
    logits = 2 * gemma.vocab_size * itemsize
    weights = width * (2 * queries + 2 * keys) + 3 * width * inner
    flops = 2.0 * layers * weights * (tokens + new_tokens) + 2.0 * new_tokens * gemma.vocab_size * width
    flops += layers * 4.0 * tokens * capacity * queries
    return Cost(kept + max(layer, logits), flops / new_tokens)


def picture_cost(vision: Gemma3VisionConfig, itemsize: int) -> Cost:
    """The vision tower and the projector on one picture."""
    patches, width, inner = vision.patches_per_side**2, vision.width, vision.inner_width
    pixels = 3 * vision.image_size**2
    layer = patches * max(3 * width + 2 * inner, 6 * width)
    weights = vision.num_layers * (4 * width**2 + 2 * width * inner)
    flops = 2.0 * patches * (weights + 3 * vision.patch_size**2 * width)
    flops += vision.num_layers * 4.0 * patches**2 * width
    flops += 2.0 * vision.num_tokens * width * vision.text_width
    return Cost(itemsize * (pixels + layer), flops)


def connectors_cost(config: TextConnectorsConfig, tokens: Sequence[int], length: int, itemsize: int) -> Cost:
    """Both connectors, video first."""
    widths = feature_widths(config.features)
    prompts = len(tokens)
    features = sum(tokens) * sum(widths) * itemsize
    video = _connector_bytes(config.video, prompts, length, itemsize)
    audio = _connector_bytes(config.audio, prompts, length, itemsize)
    contexts = prompts * length * config.video.width * itemsize  # of the video, while audio is computed
    flops = sum(_connector_flops(c, prompts, length) for c in (config.video, config.audio))
    return Cost(features + max(video, contexts + audio), flops)


def _connector_bytes(config: ConnectorConfig, prompts: int, length: int, itemsize: int) -> int:
    """Rows before and after a block, and one row in the feed-forward; the rotation table is float32."""
    rows = 2 * prompts + 1 + 2 * FEED_FORWARD_GROWTH
    return length * config.width * (rows * itemsize + FLOAT32)


def _connector_flops(config: ConnectorConfig, prompts: int, length: int) -> float:
    weights = (4 + 2 * FEED_FORWARD_GROWTH) * config.width**2
    return prompts * config.num_layers * length * (2.0 * weights + 4.0 * length * config.width)
