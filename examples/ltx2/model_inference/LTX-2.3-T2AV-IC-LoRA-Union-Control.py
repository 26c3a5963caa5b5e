"""LTX-2.3 with a depth map, edges or poses as a guide: the IC-LoRA Union-Control reads a clip at half the
size of the first stage.
"""

from common import load, lora, save, settings
from inputs import edge_clip

pipe = load("LTX-2.3", "dev", "upscaler", "distilled-lora")
pipe.load_lora(pipe.dit, lora("LTX-2.3-22b-IC-LoRA-Union-Control", "-ref0.5"))
chosen = settings(height=1024, width=1536, num_frames=121)
# Instead of the drawn clip: in_context_videos=["edges.mp4"], of Canny edges, of depth or of poses.
video, audio = pipe(
    prompt=(
        "A watercolour painting comes alive: a blue rowing boat on a misty mountain lake in the early "
        "morning. The camera glides closer, water drips from the oars, and a loon calls."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2.3"],
    in_context_videos=[edge_clip(chosen)],
    clear_lora_before_state_two=True,
    use_two_stage_pipeline=True,
    seed=43,
    **chosen,
)
save(video, audio, "ltx2.3_ic_lora_union.mp4")
