"""LTX-2.3 moves a picture along tracked points: the IC-LoRA Motion-Track-Control reads them at half the size
of the first stage.
"""

from common import load, lora, save, settings
from inputs import FIRST_FRAME, track_clip

pipe = load("LTX-2.3", "dev", "upscaler", "distilled-lora")
pipe.load_lora(pipe.dit, lora("LTX-2.3-22b-IC-LoRA-Motion-Track-Control", "-ref0.5"))
chosen = settings(height=1024, width=1536, num_frames=121)
# Instead of what is drawn: a first frame of yours and in_context_videos=["tracks.mp4"] of a point tracker.
video, audio = pipe(
    prompt=(
        "A red rowing boat drifts to the right and bobs on a lake at sunset. Water gurgles under the "
        "hull, the oars knock softly against the wood."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2.3"],
    in_context_videos=[track_clip(chosen)],
    input_images=[FIRST_FRAME],
    clear_lora_before_state_two=True,
    use_two_stage_pipeline=True,
    seed=43,
    **chosen,
)
save(video, audio, "ltx2.3_ic_lora_motion_track.mp4")
