"""Golden cases of the latent upsamplers."""

import re

import torch

from diffsynth.models.ltx2.upsampler import LatentUpsampler, UpsamplerConfig, adain_filter, upsample_latent
from diffsynth.models.ltx2.video_vae import STATISTICS_KEY_PREFIXES, PerChannelStatistics
from tests.runners.case import Case
from tests.runners.video_vae import outputs, rename, run_with_mids, tagged


def upsampler(case: Case) -> None:
    config = UpsamplerConfig.from_sections(case.meta["config"])
    with torch.device("meta"):
        module = LatentUpsampler(config)
        statistics = PerChannelStatistics(config.in_channels)
    module.load_state_dict(case.weights(), strict=True, assign=True)
    statistics.load_state_dict(rename(case.group("in/"), STATISTICS_KEY_PREFIXES), strict=True, assign=True)
    for tag, latent in tagged(case, "in/latent"):
        reference = statistics.unnormalize(latent)
        before = f"mid/{tag}/unnormalised_input"
        if before in case:
            case.check(before, reference)
            del case.tensors[before]  # the rest below mid/ are modules
        raw = run_with_mids(case, module, reference, tag)
        for name, _ in outputs(case, "out/latent", tag):
            case.check(name, upsample_latent(module, statistics, latent))
        for name in case.tensors:
            adain = re.fullmatch(rf"out/adain_f([0-9.]+)_{re.escape(tag)}", name)
            if adain:
                case.check(name, adain_filter(raw, reference, float(adain[1])))
