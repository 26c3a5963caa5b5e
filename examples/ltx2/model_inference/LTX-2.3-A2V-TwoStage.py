"""Sound and text to video by LTX-2.3 in two stages: the pictures follow the sound, which stays as it is."""

from common import load, save, settings
from inputs import SAMPLING_RATE, tune

pipe = load("LTX-2.3", "dev", "upscaler", "distilled-lora")
chosen = settings(height=1024, width=1536, num_frames=121)
# Instead of the tune: retake_audio="song.mp3", and audio_start_time=12.5 to begin there.
video, audio = pipe(
    prompt=(
        "A music box stands on a wooden table. Its lid is open, and the tiny dancer inside turns in "
        "time to the melody while dust floats through the light."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2.3"],
    retake_audio=tune(chosen),
    audio_sample_rate=SAMPLING_RATE,
    use_two_stage_pipeline=True,
    seed=43,
    **chosen,
)
save(video, audio, "ltx2.3_twostage_a2v.mp4")
