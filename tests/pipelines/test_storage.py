"""Storage policies and sizes: what is quantised, what moves together, and how many bytes that is."""

import pytest
import torch

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.parts import NETWORKS, Parts
from diffsynth.pipelines.released import released_parts
from diffsynth.pipelines.sizes import ModelSizes, model_sizes, released_sizes
from diffsynth.pipelines.storage import NAMES, PartLayouts, Storage, part_layouts
from diffsynth.vram.formats import StorageFormat


@pytest.fixture(scope="module")
def ltx_2_int4() -> ModelSizes:
    return released_sizes("2.0", Storage.named("int4"))


@pytest.fixture(scope="module")
def ltx_2_3() -> Parts:
    return released_parts("2.3")


def formats(layouts: PartLayouts, block: str) -> dict[str, StorageFormat]:
    return {entry.name.removeprefix(f"{block}."): entry.format for entry in layouts.blocks[block].entries}


def test_a_policy_by_name() -> None:
    for name in NAMES:
        assert str(Storage.named(name).transformer) == name
    mixed = Storage.named("int4")
    assert (mixed.audio, mixed.connectors, mixed.text_encoder) == ("int8", "int8", "int4")
    with pytest.raises(RequestError, match="storage='int3' is not known") as refused:
        Storage.named("int3")
    assert "int8" in refused.value.hint


def test_only_linear_weights_of_blocks_are_quantised(ltx_2_3: Parts) -> None:
    assert ltx_2_3.dit is not None
    layouts = part_layouts("dit", ltx_2_3.dit, Storage.named("int4"), torch.bfloat16)
    found = formats(layouts, "transformer_blocks.7")
    assert found["attn1.to_q.weight"] == found["ff.net.0.proj.weight"] == "int4"
    assert found["audio_ff.net.2.weight"] == found["video_to_audio_attn.to_k.weight"] == "int8"
    kept = ("attn1.to_gate_logits.weight", "attn1.to_q.bias", "attn1.q_norm.weight", "scale_shift_table")
    assert {found[name] for name in kept} == {StorageFormat.BF16}
    assert layouts.rest is not None
    assert {entry.format for entry in layouts.rest.entries} == {StorageFormat.BF16}
    assert list(layouts.blocks) == [f"transformer_blocks.{i}" for i in range(48)]


@pytest.mark.parametrize("part", NETWORKS)
def test_every_tensor_has_exactly_one_place(loaded_pipe: LTX2AudioVideoPipeline, part: str) -> None:
    module = getattr(loaded_pipe.parts, part)
    layouts = part_layouts(part, module, Storage.named("int8"), torch.float32)
    groups = [*layouts.blocks.values(), *layouts.host.values(), *([layouts.rest] if layouts.rest else [])]
    placed = [entry.name for group in groups for entry in group.entries]
    assert sorted([*placed, *layouts.left_out]) == sorted(module.state_dict())


def test_the_embedding_stays_on_the_host_and_the_projection_comes_in_slices(ltx_2_3: Parts) -> None:
    parts = ltx_2_3
    assert parts.text_encoder is not None
    assert parts.text_encoder_post_modules is not None
    gemma = part_layouts("text_encoder", parts.text_encoder, Storage.named("bf16"), torch.bfloat16)
    assert [entry.name for entry in gemma.host["embed_tokens"].entries] == ["embed_tokens.weight"]
    post = part_layouts(
        "text_encoder_post_modules", parts.text_encoder_post_modules, Storage.named("bf16"), torch.bfloat16
    )
    assert len(post.slices) == 49
    assert [entry.shape for entry in post.slices[3].entries] == [(4096, 3840), (2048, 3840)]
    assert len(post.left_out) == 2
    names = list(post.blocks)
    assert names[0] == "video_embeddings_connector.transformer_1d_blocks.0"
    assert names[8] == "audio_embeddings_connector.transformer_1d_blocks.0"


def test_bytes_of_the_released_models(ltx_2_int4: ModelSizes, ltx_2_3: Parts) -> None:
    ltx_2 = released_sizes("2.0", Storage.named("bf16")).parts
    # Parameters at two bytes; padding of parts and blocks is below a tenth of a percent.
    assert {b.nbytes for b in ltx_2["dit"].blocks} == {772_149_248}
    assert ltx_2["dit"].rest_bytes == pytest.approx(0.689e9, rel=1e-3)
    assert ltx_2["dit"].scratch_bytes == 0
    assert sum(b.nbytes for b in ltx_2["text_encoder"].blocks) == pytest.approx(21.5e9, rel=2e-3)
    assert sum(ltx_2["text_encoder_post_modules"].slice_bytes) == pytest.approx(1.445e9, rel=1e-3)
    for part, size in (
        ("video_vae_encoder", 1.388e9),
        ("video_vae_decoder", 1.057e9),
        ("upsampler", 0.996e9),
    ):
        assert ltx_2[part].total_bytes == pytest.approx(size, rel=1e-3)
    eight = model_sizes(ltx_2_3, Storage.named("int8")).parts
    assert sum(b.nbytes for b in eight["dit"].blocks) == pytest.approx(18.6e9, rel=2e-3)
    assert eight["dit"].scratch_bytes == 4096 * 16384 * 2
    assert sum(b.nbytes for b in ltx_2_int4.parts["dit"].blocks) == pytest.approx(12.9e9, rel=2e-3)


def test_a_lora_of_rank_384_is_the_published_size(ltx_2_int4: ModelSizes) -> None:
    widths = {block.lora_width for block in ltx_2_int4.parts["dit"].blocks}
    assert [384 * width for width in widths] == [77_070_336]


def test_sizes_of_a_loaded_pipeline_follow_its_weights(loaded_pipe: LTX2AudioVideoPipeline) -> None:
    sizes = model_sizes(loaded_pipe.parts, Storage.uniform(StorageFormat.F32))
    assert sizes.itemsize == 4
    for part in NETWORKS:
        held = sum(t.numel() * 4 for t in getattr(loaded_pipe.parts, part).state_dict().values())
        if part == "text_encoder":
            held -= loaded_pipe.parts.text_encoder.embed_tokens.weight.numel() * 4  # type: ignore[union-attr]
        # Every tensor begins at a multiple of 64 bytes, every block of 256.
        tensors = len(getattr(loaded_pipe.parts, part).state_dict())
        assert held <= sizes.parts[part].total_bytes <= held + 64 * (tensors + 64 * 49)


def test_a_missing_part_is_named(ltx_2_int4: ModelSizes) -> None:
    nothing = ModelSizes(version="2.0", itemsize=2, configs={}, parts={})
    assert not nothing.has("dit")
    with pytest.raises(CheckpointError, match="missing: dit"):
        _ = nothing.transformer
    assert ltx_2_int4.transformer.num_layers == 48
