"""LTX-2 adds detail to a clip: the IC-LoRA Detailer reads it at the full size of the first stage, which its
file does not state.
"""

from common import load, lora, save, settings
from inputs import clip

pipe = load("LTX-2", "dev", "upscaler", "distilled-lora")
pipe.load_lora(pipe.dit, lora("LTX-2-19b-IC-LoRA-Detailer"))
chosen = settings(height=1024, width=1536, num_frames=121)
# Instead of the drawn clip: in_context_videos=["clip.mp4"], of this frame rate, and a prompt that tells it.
video, audio = pipe(
    prompt=(
        "A red rowing boat lies on a quiet lake at sunset, the grain of its planks in sharp detail. "
        "Water laps against the hull as the camera glides closer."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2"],
    in_context_videos=[clip(chosen)],
    in_context_downsample_factor=1,
    clear_lora_before_state_two=True,
    use_two_stage_pipeline=True,
    seed=43,
    **chosen,
)
save(video, audio, "ltx2_ic_lora_detailer.mp4")
