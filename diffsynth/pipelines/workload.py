"""What a request gives the networks to do, in tokens, clips and noise levels."""

from diffsynth.conditioning.tokens import audio_latent_frames, video_latent_shape
from diffsynth.pipelines.stages import Stage
from diffsynth.request import GenerateRequest


def carried_copies(sampler: str, *, has_float64: bool) -> int:
    """What a sampler keeps of both streams during an evaluation, in float32 latents."""
    if sampler == "gradient_estimation":
        return 2  # the last velocity and the one before
    if sampler == "res_2s":  # the first estimate, the state at the middle; there anchor and state exactly
        return 2 + 2 * (2 if has_float64 else 1)
    return 0


def video_tokens(request: GenerateRequest, stage: Stage) -> int:
    """Tokens of the video stream in a stage: the target, keyframes, and reference clips in the first."""
    frames, height, width = video_latent_shape(request.num_frames, stage.height, stage.width)
    tokens = frames * height * width
    tokens += height * width * len(request.keyframes())
    if stage.number == 1:
        factor = request.reference_factor
        kept = (frames - 1) // request.temporal_factor + 1
        tokens += len(request.in_context_videos) * kept * (height // factor) * (width // factor)
    return tokens


def distinct_timesteps(request: GenerateRequest, stage: Stage) -> int:
    """Noise levels among the tokens of a stream: one, and one for every strength of something given."""
    given = set(request.image_strengths())
    if stage.number == 1:
        given |= set(request.reference_strengths())
    if request.retake_video_regions or request.retake_audio_regions:
        given.add(1.0)
    return 1 + len(given)


def encoded_clips(request: GenerateRequest, stage: Stage) -> list[tuple[int, int, int]]:
    """Frames, height and width of everything that is encoded for a stage; pictures are clips of one frame."""
    clips = [(1, stage.height, stage.width)] * len(request.input_images)
    if request.retake_video is not None:
        clips.append((request.num_frames, stage.height, stage.width))
    if stage.number == 1:
        factor = request.reference_factor
        kept = (request.num_frames - 1) // request.temporal_factor + 1
        one = (kept, stage.height // factor, stage.width // factor)
        clips += [one] * len(request.in_context_videos)
    return clips


def audio_frames(request: GenerateRequest) -> int:
    """Of the audio latent."""
    return audio_latent_frames(request.num_frames, request.frame_rate)
