"""Text to video with sound by LTX-2.3 in one stage: 30 guided steps at full size."""

from common import load, save, settings

pipe = load("LTX-2.3", "dev")
video, audio = pipe(
    prompt=(
        "An old fisherman mends a net on a pier at dawn. He looks up, laughs and says: 'She will bite "
        "today.' Gulls cry above him, ropes creak, and small waves slap against the wood. The camera "
        "stands still."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2.3"],
    seed=43,
    **settings(height=512, width=768, num_frames=121),
)
save(video, audio, "ltx2.3_onestage.mp4")
