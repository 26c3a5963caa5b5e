"""LTX-2 with a depth map, edges or poses as a guide: the IC-LoRA Union-Control reads a clip at half the size
of the first stage.
"""

from common import load, lora, save, settings
from inputs import depth_clip

pipe = load("LTX-2", "dev", "upscaler", "distilled-lora")
pipe.load_lora(pipe.dit, lora("LTX-2-19b-IC-LoRA-Union-Control", "-ref0.5"))
chosen = settings(height=1024, width=1536, num_frames=121)
# Instead of the drawn clip: in_context_videos=["depth.mp4"], of depth, of Canny edges or of poses.
video, audio = pipe(
    prompt=(
        "A ball of red wool rolls along a wooden floor towards the camera. A kitten meows behind it, "
        "its paws patter on the boards."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2"],
    in_context_videos=[depth_clip(chosen)],
    clear_lora_before_state_two=True,
    use_two_stage_pipeline=True,
    seed=43,
    **chosen,
)
save(video, audio, "ltx2_ic_lora_union.mp4")
