"""Text to video with sound by LTX-2.3 with the numbers of the official HQ pipeline: 15 steps of second order
with full guidance, the distilled LoRA in both stages.
"""

from common import load, save, settings

from diffsynth.pipelines.presets import HQ_LORA_STRENGTHS, HQ_PRESET

pipe = load("LTX-2.3", "dev", "upscaler", "distilled-lora")
video, audio = pipe(
    prompt=(
        "Two chefs argue over a pot in a narrow restaurant kitchen. One tastes, raises her eyebrows and "
        "says: 'More salt!' Flames hiss, plates clatter."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2.3"],
    sampler="res_2s",
    dynamic_shift=True,
    video_guidance=HQ_PRESET.video_guidance,
    audio_guidance=HQ_PRESET.audio_guidance,
    stage1_lora_strength=HQ_LORA_STRENGTHS[0],
    stage2_lora_strength=HQ_LORA_STRENGTHS[1],
    use_two_stage_pipeline=True,
    seed=43,
    **settings(height=1088, width=1920, num_frames=121, num_inference_steps=HQ_PRESET.num_inference_steps),
)
save(video, audio, "ltx2.3_twostage_hq.mp4")
