import pytest

from diffsynth.errors import CheckpointError
from diffsynth.lora.keys import KeyStyle, LayerTable, Role, refuse_other_methods

LAYERS = (
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.11.audio_to_video_attn.to_out.0",
    "transformer_blocks.0.audio_ff.net.0.proj",
    "patchify_proj",
    "audio_adaln_single.emb.timestep_embedder.linear_1",
    "av_ca_a2v_gate_adaln_single.linear",
    "prompt_adaln_single.linear",
)
TO_Q, TO_OUT, _, PATCHIFY, _, GATE, _ = LAYERS


@pytest.fixture
def table() -> LayerTable:
    return LayerTable(LAYERS)


@pytest.mark.parametrize(
    ("key", "target", "role", "style"),
    [
        (f"diffusion_model.{TO_Q}.lora_A.weight", TO_Q, Role.DOWN, KeyStyle.OFFICIAL),
        (f"model.diffusion_model.{TO_Q}.lora_B.weight", TO_Q, Role.UP, KeyStyle.OFFICIAL),
        (f"model.{PATCHIFY}.lora_B.weight", PATCHIFY, Role.UP, KeyStyle.OFFICIAL),
        (f"{TO_Q}.lora_A.weight", TO_Q, Role.DOWN, KeyStyle.BARE_PEFT),
        (f"{TO_Q}.lora_A", TO_Q, Role.DOWN, KeyStyle.BARE_PEFT),
        (f"{TO_OUT}.lora_B.default.weight", TO_OUT, Role.UP, KeyStyle.DIFFSYNTH),
        (f"base_model.model.{TO_Q}.lora_A.default.weight", TO_Q, Role.DOWN, KeyStyle.RAW_PEFT),
        (f"base_model.model.diffusion_model.{TO_Q}.lora_B.weight", TO_Q, Role.UP, KeyStyle.RAW_PEFT),
        (f"diffusion_model.{TO_Q}.lora_down.weight", TO_Q, Role.DOWN, KeyStyle.COMFYUI),
        (f"diffusion_model.{GATE}.alpha", GATE, Role.ALPHA, KeyStyle.COMFYUI),
        (f"diffusion_model.{TO_Q}.diff", TO_Q, Role.WEIGHT_DIFF, KeyStyle.COMFYUI),
        (f"diffusion_model.{TO_Q}.diff_b", TO_Q, Role.BIAS_DIFF, KeyStyle.COMFYUI),
        (f"transformer.{TO_Q}.lora_A.weight", TO_Q, Role.DOWN, KeyStyle.DIFFUSERS),
        ("transformer.proj_in.lora_A.weight", PATCHIFY, Role.DOWN, KeyStyle.DIFFUSERS),
        ("transformer.av_cross_attn_video_a2v_gate.linear.lora_B.weight", GATE, Role.UP, KeyStyle.DIFFUSERS),
        ("prompt_adaln.linear.lora_A.weight", LAYERS[-1], Role.DOWN, KeyStyle.DIFFUSERS),
        ("lora_unet_transformer_blocks_0_attn1_to_q.lora_up.weight", TO_Q, Role.UP, KeyStyle.KOHYA),
        ("lora_unet_patchify_proj.alpha", PATCHIFY, Role.ALPHA, KeyStyle.KOHYA),
    ],
)
def test_every_spelling_finds_its_layer(
    table: LayerTable, key: str, target: str, role: Role, style: KeyStyle
) -> None:
    parsed = table.parse(key)
    assert parsed is not None
    assert (parsed.target, parsed.role, parsed.style) == (target, role, style)


@pytest.mark.parametrize("layer", LAYERS)
def test_kohya_names_are_looked_up_not_split(table: LayerTable, layer: str) -> None:
    parsed = table.parse(f"lora_unet_{layer.replace('.', '_')}.lora_down.weight")
    assert parsed is not None
    assert parsed.target == layer


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.transformer_blocks.11.audio_to_video_attn.to_out.lora_A.weight",
        "lora_unet_transformer_blocks_11_audio_to_video_attn_to_out.lora_down.weight",
    ],
)
def test_the_index_after_to_out_may_be_missing(table: LayerTable, key: str) -> None:
    parsed = table.parse(key)
    assert parsed is not None
    assert parsed.target == TO_OUT


def test_flat_names_of_two_layers_are_never_guessed() -> None:
    parsed = LayerTable(["a.b_c", "a_b.c"]).parse("lora_unet_a_b_c.lora_down.weight")
    assert parsed is not None
    assert parsed.target is None


@pytest.mark.parametrize(
    "key",
    [f"{TO_Q}.lora_B.bias", f"{TO_Q}.weight", "lora_A.weight", "transformer_blocks.0.scale_shift_table"],
)
def test_unknown_endings_are_not_guessed(table: LayerTable, key: str) -> None:
    assert table.parse(key) is None


@pytest.mark.parametrize(
    "key",
    [
        "text_embedding_projection.aggregate_embed.lora_A.weight",
        "diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.lora_A.weight",
        "model.diffusion_model.audio_embeddings_connector.learnable_registers.diff",
        "feature_extractor_linear.aggregate_embed.lora_B.weight",
        "transformer.connectors.text_proj_in.lora_A.weight",
        "connectors.text_proj_in.lora_A.weight",
        "lora_unet_video_embeddings_connector_transformer_1d_blocks_0_ff_net_2.alpha",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    ],
)
def test_text_side_keys_are_told_from_unknown_ones(table: LayerTable, key: str) -> None:
    assert table.is_text_side(key)


@pytest.mark.parametrize(
    "key", ["audio_caption_projection.linear_1.lora_A.weight", f"diffusion_model.{TO_Q}.lora_A.weight"]
)
def test_transformer_keys_are_not_text_side(table: LayerTable, key: str) -> None:
    assert not table.is_text_side(key)


@pytest.mark.parametrize(
    ("key", "method"),
    [
        (f"diffusion_model.{TO_Q}.dora_scale", "DoRA"),
        (f"base_model.model.{TO_Q}.lora_magnitude_vector.default.weight", "DoRA"),
        ("lora_unet_patchify_proj.hada_w1_a", "LoHa"),
        ("lora_unet_patchify_proj.lokr_w1", "LoKr"),
    ],
)
def test_other_adapters_are_refused_by_name(key: str, method: str) -> None:
    with pytest.raises(CheckpointError, match=method):
        refuse_other_methods([f"{TO_Q}.lora_A.weight", key], "x.safetensors")
