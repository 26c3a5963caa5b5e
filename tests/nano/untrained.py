"""A folder of untrained networks, as the stages leave them."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from diffsynth.lora.official import official_metadata, official_tensors
from diffsynth.models.ltx2.audio_vae_config import AudioVAEConfig
from diffsynth.models.ltx2.upsampler import LatentUpsampler, UpsamplerConfig
from diffsynth.models.ltx2.video_vae_config import VideoVAEConfig
from diffsynth.models.ltx2.vocoder import Vocoder, VocoderConfig
from diffsynth.nano.world import VOCABULARY
from diffsynth.training.adapters import TrainableLora
from training.nano import audio_vae, upsampler, video_vae, vocoder
from training.nano.dit import GEMMA, NanoTransformer, TransformerSizes
from training.nano.export import ExportSettings, export
from training.nano.prompts import TextSettings, write_tokenizer
from training.nano.results import write_network

SIZES = TransformerSizes(layers=1, heads=2, head_dim=12, audio_head_dim=12, video_channels=8)


def write_autoencoders(folder: Path) -> None:
    """Video with 8 latent channels, audio and vocoder; they have the measures of the world, and no sense."""
    torch.manual_seed(0)
    settings = video_vae.VideoVAESettings(
        latent_channels=8,
        encoder_layers=(0, 0, 0, 0, 0),
        encoder_multipliers=(1, 1, 1, 1),
        decoder_base_channels=4,
        decoder_layers=(0, 0, 0, 0),
    )
    section = video_vae.config_section(settings)
    both = video_vae.VideoVAE(VideoVAEConfig.from_sections({"vae": section}))
    write_network(folder, "video_vae", [both.encoder, both.decoder], section, {}, section_name="vae")
    section = audio_vae.config_section(audio_vae.AudioVAESettings(ch=4))
    sound = audio_vae.AudioVAE(AudioVAEConfig.from_sections({"audio_vae": section}))
    write_network(folder, "audio_vae", [sound.encoder, sound.decoder], section, {})
    section = vocoder.config_section(vocoder.VocoderSettings(width=32))
    network = Vocoder(VocoderConfig.from_sections({"vocoder": section}))
    write_network(folder, "vocoder", [network], section, {})
    section = upsampler.config_section(upsampler.UpsamplerSettings(), 8)
    network = LatentUpsampler(UpsamplerConfig.from_sections(section))
    write_network(folder, "upsampler", [network], section, {}, section_name="")


def write_transformer(folder: Path) -> NanoTransformer:
    """With its text side and the tokenizer."""
    torch.manual_seed(1)
    write_tokenizer(folder / GEMMA, VOCABULARY)
    network = NanoTransformer.of_sizes(SIZES, TextSettings(), 45)
    for parameter in network.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    network.save(folder)
    return network


def write_exported(folder: Path, *loras: str) -> Path:
    """All stages in ``folder``, exported; LoRAs, which change nothing, by the names of their stages."""
    write_autoencoders(folder)
    network = write_transformer(folder).transformer
    lora = TrainableLora(network, ["to_q"], rank=2, alpha=2, generator=torch.Generator().manual_seed(0))
    for name in loras:
        tensors = official_tensors(lora.updates())
        save_file(tensors, folder / f"{name}.safetensors", official_metadata("LTX-2", {"steps": 1}))
    (folder / "done").mkdir()
    (folder / "done" / "vocoder.json").write_text('{"seconds": 3, "settings": {}}')
    export(ExportSettings(), folder, "cpu")
    return folder / "nano"
