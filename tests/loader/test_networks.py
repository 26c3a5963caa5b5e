"""Released files, by their real key lists: recognised, fitted to the networks, and hashed back."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch

from diffsynth.errors import CheckpointError
from diffsynth.loader import NetworkKind, NetworkWeights, WeightFiles, find_network, model_version, recognise
from diffsynth.loader.key_names import EXCLUDED_PREFIXES, OFFICIAL_PREFIXES, gemma_key, official_names
from diffsynth.loader.networks import network_spec
from diffsynth.loader.recognise import UNREAD_STATISTICS
from diffsynth.models import gemma3_config
from diffsynth.models.ltx2 import transformer, video_vae
from tests.loader.headers import (
    MANIFESTS,
    RELEASES,
    HeaderSource,
    key_hash,
    manifest,
    single_file,
    single_file_metadata,
)

CATALOGUE = json.loads((MANIFESTS / "files.json").read_text(encoding="utf-8"))
WHOLE = [
    NetworkKind.TRANSFORMER,
    NetworkKind.TEXT_CONNECTORS,
    NetworkKind.VIDEO_ENCODER,
    NetworkKind.VIDEO_DECODER,
    NetworkKind.AUDIO_ENCODER,
    NetworkKind.AUDIO_DECODER,
    NetworkKind.VOCODER,
]
REPACKAGED = {
    "transformer.safetensors": NetworkKind.TRANSFORMER,
    "transformer_distilled.safetensors": NetworkKind.TRANSFORMER,
    "video_vae_encoder.safetensors": NetworkKind.VIDEO_ENCODER,
    "video_vae_decoder.safetensors": NetworkKind.VIDEO_DECODER,
    "audio_vae_encoder.safetensors": NetworkKind.AUDIO_ENCODER,
    "audio_vae_decoder.safetensors": NetworkKind.AUDIO_DECODER,
    "audio_vocoder.safetensors": NetworkKind.VOCODER,
    "text_encoder_post_modules.safetensors": NetworkKind.TEXT_CONNECTORS,
}
UPSCALERS = {
    "ltx-2-spatial-upscaler-x2": "c79c458c6e99e0e14d47e676761732d2",
    "ltx-2.3-spatial-upscaler-x2": "aed408774d694a2452f69936c32febb5",
    "ltx-2.3-spatial-upscaler-x1.5": "6c5b9fdf5746e524b62889b705f42e39",
    "ltx-2.3-temporal-upscaler-x2": "5fbb28ecc6becd9513cee69b2dfb1053",
}
Manifest = Mapping[str, tuple[str, tuple[int, ...]]]


def _files(entries: Manifest, metadata: Mapping[str, str] | None = None) -> WeightFiles:
    return WeightFiles.of([HeaderSource(entries, metadata)])


@pytest.fixture(scope="module")
def located() -> dict[str, dict[NetworkKind, NetworkWeights]]:
    """The networks of the single files, found without any metadata."""
    found: dict[str, dict[NetworkKind, NetworkWeights]] = {}
    for version in ("2.0", "2.3"):
        files = _files(single_file(version))
        assert recognise(files) == WHOLE
        assert model_version(files) == version
        found[version] = {kind: find_network(kind, files) for kind in WHOLE}
    return found


def _module_shapes(networks: Iterable[NetworkWeights]) -> dict[str, tuple[int, ...]]:
    """File keys, and shapes as the networks built on the meta device have them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weights in networks:
        state = weights.build().state_dict()
        assert state.keys() == weights.entries.keys()
        shapes |= {weights.entries[name].key: tuple(tensor.shape) for name, tensor in state.items()}
    return shapes


def _published() -> list[Any]:
    """Every hash of the catalogue whose key list we have; several files can share one."""
    found = {
        file["diffsynth_hash"]: file
        for repository in CATALOGUE["repos"]
        for file in repository["files"]
        if file.get("manifests") and file.get("diffsynth_hash")
    }
    assert len(found) == 5
    return [pytest.param(file, id=file["name"]) for file in found.values()]


@pytest.mark.parametrize("file", _published())
def test_public_hash_of_whole_files(
    file: dict[str, Any], located: dict[str, dict[NetworkKind, NetworkWeights]]
) -> None:
    version = next((v for v, name in RELEASES.items() if f"{name}.text" in file["manifests"]), None)
    gemma = "gemma-3-12b-it" in file["manifests"]
    entries = manifest("gemma-3-12b-it") if gemma else manifest(*file["manifests"])
    files = _files(entries)
    networks = located[version].values() if version else [find_network(k, files) for k in recognise(files)]
    shapes = _module_shapes(networks)
    # What no network takes: statistics that nothing reads.
    not_taken = {key: shape for key, (_, shape) in entries.items() if key not in shapes}
    assert not_taken.keys() == UNREAD_STATISTICS & entries.keys()
    assert key_hash(shapes | not_taken) == file["diffsynth_hash"]


def _repackaged() -> list[Any]:
    return [
        pytest.param(
            "2.3" if "2.3" in repository["id"] else "2.0", file, id=f"{repository['id']}/{file['name']}"
        )
        for repository in CATALOGUE["repos"]
        for file in repository["files"]
        if repository["id"].endswith("-Repackage")
    ]


@pytest.mark.parametrize(("version", "file"), _repackaged())
def test_public_hash_of_repackaged_parts(version: str, file: dict[str, Any]) -> None:
    """One part each, under its official names; the hash says so for the transformer too."""
    kind = REPACKAGED[file["name"]]
    prefixes = OFFICIAL_PREFIXES[kind]
    excluded = EXCLUDED_PREFIXES.get(kind, ())
    part = {
        key: entry
        for key, entry in single_file(version).items()
        if key.startswith(prefixes) and not key.startswith(excluded)
    }
    files = _files(part)
    assert recognise(files) == [kind]
    shapes = {entry.key: files.shapes[entry.key] for entry in find_network(kind, files).entries.values()}
    shapes |= {key: shape for key, (_, shape) in part.items() if key in UNREAD_STATISTICS}
    assert key_hash(shapes) == file["diffsynth_hash"]
    both_look_alike = kind in {NetworkKind.AUDIO_ENCODER, NetworkKind.AUDIO_DECODER}
    assert model_version(files) == (None if both_look_alike else version)


@pytest.mark.parametrize(("name", "expected"), UPSCALERS.items())
def test_hash_of_upscalers(name: str, expected: str) -> None:
    files = _files(manifest(name))
    assert recognise(files) == [NetworkKind.UPSAMPLER]
    assert key_hash(_module_shapes([find_network(NetworkKind.UPSAMPLER, files)])) == expected
    assert model_version(files) is None


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_single_file_with_and_without_metadata_gives_the_same_networks(
    version: str, located: dict[str, dict[NetworkKind, NetworkWeights]]
) -> None:
    files = _files(single_file(version), single_file_metadata(version))
    assert recognise(files) == WHOLE
    assert model_version(files) == version
    for kind, stripped in located[version].items():
        assert find_network(kind, files).config == stripped.config


def test_gemma_is_inferred_as_stated() -> None:
    config = json.loads((MANIFESTS / "config.gemma-3-12b-it.json").read_text(encoding="utf-8"))
    weights = find_network(NetworkKind.GEMMA, _files(manifest("gemma-3-12b-it")))
    assert weights.config == gemma3_config.Gemma3Config.from_dict(config)
    assert len(weights.entries) == 626


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", ""])
def test_gemma_under_other_names(prefix: str) -> None:
    renamed = {
        prefix + key.removeprefix("language_model.model."): entry
        for key, entry in manifest("gemma-3-12b-it.text").items()
    }
    other = {"model.vision_tower.x.weight": ("BF16", (2,)), "lm_head.weight": ("BF16", (2,))}
    files = _files({**renamed, **other})
    assert recognise(files) == [NetworkKind.GEMMA]
    assert len(find_network(NetworkKind.GEMMA, files).entries) == 626


def test_tables_of_key_names_agree_with_the_networks() -> None:
    assert set(EXCLUDED_PREFIXES[NetworkKind.TRANSFORMER]) == set(transformer.EXCLUDED_PREFIXES)
    assert {f"vae.{key}" for key in video_vae.IGNORED_KEYS} == UNREAD_STATISTICS
    for kind, prefixes in OFFICIAL_PREFIXES.items():
        known = network_spec(kind, ()).prefixes
        assert all(any(prefix.startswith(own) for own in known) for prefix in prefixes), kind
    for key in (*manifest("gemma-3-12b-it"), "lm_head.weight", "model.layers.0.mlp.up_proj.weight", "norm.x"):
        assert gemma_key(key) == gemma3_config.text_key(key)


def test_a_lora_is_no_network() -> None:
    with pytest.raises(CheckpointError, match="LoRA") as raised:
        network_spec(NetworkKind.LORA, ())
    assert "load_lora" in raised.value.hint


def _cut(key: str, prefix: str) -> str:
    """Without ``prefix``; statistics beside a half lose the name of the autoencoder only."""
    statistics = re.sub(r"^(audio_)?vae\.(?=per_channel_statistics\.)", "", key)
    return statistics if statistics != key else key.removeprefix(prefix)


_SPLIT = [
    (NetworkKind.TRANSFORMER, "model.diffusion_model."),
    (NetworkKind.TRANSFORMER, "model."),
    (NetworkKind.TEXT_CONNECTORS, "model.diffusion_model."),
    (NetworkKind.TEXT_CONNECTORS, "text_embedding_projection."),
    *((kind, "vae.") for kind in (NetworkKind.VIDEO_ENCODER, NetworkKind.VIDEO_DECODER)),
    *((kind, "audio_vae.") for kind in (NetworkKind.AUDIO_ENCODER, NetworkKind.AUDIO_DECODER)),
    (NetworkKind.VIDEO_ENCODER, "vae.encoder."),
    (NetworkKind.VIDEO_DECODER, "vae.decoder."),
    (NetworkKind.AUDIO_ENCODER, "audio_vae.encoder."),
    (NetworkKind.AUDIO_DECODER, "audio_vae.decoder."),
    (NetworkKind.VOCODER, "vocoder."),
]


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize(("kind", "cut"), _SPLIT)
def test_parts_split_for_other_programs(version: str, kind: NetworkKind, cut: str) -> None:
    """Each part in its own file with its prefix cut off, as far as it can be told from what is left."""
    own = {
        key: entry
        for key, entry in single_file(version).items()
        if key.startswith(OFFICIAL_PREFIXES[kind]) and not key.startswith(EXCLUDED_PREFIXES.get(kind, ()))
    }
    renamed = {_cut(key, cut): key for key in own}
    assert set(renamed) != set(own)
    assert official_names({name: own[key][1] for name, key in renamed.items()}) == renamed
    assert recognise(_files({name: own[key] for name, key in renamed.items()})) == [kind]


def test_official_names_of_official_names_are_the_same() -> None:
    for version in ("2.0", "2.3"):
        shapes = {key: shape for key, (_, shape) in single_file(version).items()}
        assert official_names(shapes) == {key: key for key in shapes}


def test_the_same_tensor_twice_is_refused() -> None:
    with pytest.raises(CheckpointError, match="same tensor"):
        official_names({"diffusion_model.x": (1,), "model.diffusion_model.x": (1,)})


def test_built_modules_are_frozen_and_on_meta() -> None:
    module = find_network(NetworkKind.UPSAMPLER, _files(manifest("ltx-2-spatial-upscaler-x2"))).build()
    assert not module.training
    assert {tensor.device for tensor in module.state_dict().values()} == {torch.device("meta")}
    assert not any(parameter.requires_grad for parameter in module.parameters())
