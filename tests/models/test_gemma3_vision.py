"""The eyes of Gemma 3 against transformers, alone and together with the writer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForConditionalGeneration

from diffsynth.errors import CheckpointError
from diffsynth.loader import NetworkKind, WeightFiles, load_network
from diffsynth.loader.key_names import gemma_vision_key
from diffsynth.models.gemma3 import Gemma3TextModel
from diffsynth.models.gemma3_vision import Gemma3Vision, Gemma3VisionConfig
from diffsynth.models.gemma3_writer import Continuation, table_chunks, write
from tests.models.test_gemma3 import released_config, shapes_of

GEMMA = Path(__file__).parents[1] / "golden" / "pipelines" / "tiny_ltx2" / "gemma"
IMAGE_TOKEN = 6
IDS = torch.tensor([2, 300, 301, 4, 6, 6, 6, 6, 5, 310, 420, 333])
CPU = torch.device("cpu")


def network(kind: NetworkKind) -> Any:
    files = WeightFiles([GEMMA / "model-00001-of-00001.safetensors"])
    return load_network(kind, files, dtype=torch.float32)


@pytest.fixture(scope="module")
def vision() -> Gemma3Vision:
    made: Gemma3Vision = network(NetworkKind.GEMMA_VISION)
    return made


@pytest.fixture(scope="module")
def oracle() -> Gemma3ForConditionalGeneration:
    return Gemma3ForConditionalGeneration.from_pretrained(
        str(GEMMA), dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_keys_and_shapes_are_those_of_the_released_checkpoint() -> None:
    with torch.device("meta"):
        model = Gemma3Vision(Gemma3VisionConfig.from_dict(released_config()))
    built = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    released = {gemma_vision_key(key): shape for key, shape in shapes_of("gemma-3-12b-it").items()}
    released.pop(None)
    assert built == released
    assert len(built) == 439
    assert not list(model.buffers())


def test_shapes_tell_the_released_configuration() -> None:
    released = {gemma_vision_key(key): shape for key, shape in shapes_of("gemma-3-12b-it").items()}
    released.pop(None)
    assert Gemma3VisionConfig.infer(released) == Gemma3VisionConfig.from_dict(released_config())
    with pytest.raises(CheckpointError, match="no vision tower"):
        Gemma3VisionConfig.infer({})


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("vision_tower.vision_model.post_layernorm.bias", "vision_model.post_layernorm.bias"),
        ("model.vision_tower.vision_model.post_layernorm.bias", "vision_model.post_layernorm.bias"),
        ("model.vision_tower.post_layernorm.bias", "vision_model.post_layernorm.bias"),
        ("model.multi_modal_projector.mm_soft_emb_norm", "multi_modal_projector.mm_soft_emb_norm"),
        ("language_model.model.norm.weight", None),
        ("vae.encoder.conv_in.conv.weight", None),
    ],
)
def test_names(key: str, expected: str | None) -> None:
    assert gemma_vision_key(key) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip_vision_model"}, "clip_vision_model"),
        ({"hidden_act": "relu"}, "relu"),
        ({"num_attention_heads": 7}, "do not divide"),
    ],
)
def test_other_towers_are_refused(change: dict[str, Any], message: str) -> None:
    config = released_config()
    config["vision_config"] |= change
    with pytest.raises(CheckpointError, match=message):
        Gemma3VisionConfig.from_dict(config)
    with pytest.raises(CheckpointError, match="describes no vision tower"):
        Gemma3VisionConfig.from_dict({"text_config": {}})
    del config["vision_config"]["patch_size"]
    config["vision_config"] |= {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
    with pytest.raises(CheckpointError, match="patch_size"):
        Gemma3VisionConfig.from_dict(config)


def test_tokens_of_a_picture(
    vision: Gemma3Vision, oracle: Gemma3ForConditionalGeneration, pixels: Tensor
) -> None:
    found = oracle.get_image_features(pixels)
    expected = getattr(found, "pooler_output", found)[0]
    own = vision(pixels)
    assert own.shape == (4, 16)
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


def test_greedy_tokens_after_a_picture_are_those_of_transformers(
    vision: Gemma3Vision, oracle: Gemma3ForConditionalGeneration, pixels: Tensor
) -> None:
    found = oracle.generate(
        input_ids=IDS[None],
        attention_mask=torch.ones_like(IDS)[None],
        token_type_ids=(IDS == IMAGE_TOKEN).long()[None],
        pixel_values=pixels,
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Gemma3TextModel = network(NetworkKind.GEMMA)
    given = model.embed(IDS)
    given[:, 4:8] = vision(pixels)
    text = Continuation(model, given, 64, device=CPU, dtype=torch.float32, picture=slice(4, 8))
    own = write(text, lambda: table_chunks(model), seed=0, temperature=0.0, max_tokens=16, stops=())
    assert own == found[0, len(IDS) :].tolist()
