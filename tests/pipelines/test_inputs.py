"""Objects that users hand over, and what the request records of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffsynth.errors import RequestError
from diffsynth.pipelines.arguments import name_of, request_fields
from diffsynth.pipelines.inputs import (
    Inputs,
    fit_request,
    inputs_by_path,
    load_inputs,
)
from diffsynth.request import GenerateRequest
from diffsynth.utils.audio import Waveform
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from tests.pipelines.tiny import PICTURES

PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))


def test_names() -> None:
    assert name_of("a.png") == "a.png"
    assert name_of(Path("a.png")) == "a.png"
    assert name_of(PICTURE) == "picture 40x30"
    assert name_of([PICTURE] * 9) == "clip of 9 frames"
    assert name_of(torch.zeros(2, 100)) == "sound of 100 samples"
    assert name_of(Waveform(torch.zeros(2, 100), 24000)) == "sound of 100 samples at 24000 Hz"


def test_a_request_holds_plain_values() -> None:
    fields = request_fields(
        {
            "input_images": [PICTURE, Path("b.png")],
            "input_images_indexes": [0, -1],
            "input_images_strength": [1.0, 0.5],
            "in_context_videos": [[PICTURE] * 9],
            "retake_video": [PICTURE] * 9,
            "retake_video_regions": [[0.0, 0.2]],
            "retake_audio": torch.zeros(2, 5),
            "retake_audio_regions": None,
            "seed": None,
        }
    )
    request = GenerateRequest(num_frames=9, **fields).validate()
    assert request.input_images == ("picture 40x30", "b.png")
    assert request.retake_video_regions == ((0.0, 0.2),)
    assert GenerateRequest.from_dict(json.loads(request.to_json())) == request


def clip(folder: Path, frames: int) -> Path:
    rate = 24000
    pictures = [Image.new("RGB", (64, 64), (i * 9, 0, 0)) for i in range(frames)]
    return write_video_audio_ltx2(pictures, torch.zeros(2, rate), folder / "clip.mp4", 24, rate)


def test_everything_is_read_from_its_path(tmp_path: Path) -> None:
    file = clip(tmp_path, 9)
    request = GenerateRequest(
        num_frames=9,
        input_images=(str(PICTURES[0]),),
        in_context_videos=(str(file),),
        retake_video=str(file),
        retake_audio=str(file),
    )
    inputs = inputs_by_path(request.validate())
    inputs.check(request)
    assert [picture.mode for picture in inputs.images] == ["RGB"]
    assert len(inputs.in_context_videos[0]) == 9
    assert inputs.retake_video is not None
    assert len(inputs.retake_video) == 9
    assert inputs.retake_audio is not None
    assert inputs.retake_audio.sampling_rate == 24000
    with pytest.raises(RequestError, match="retake_video: the request names 1, 0 came with it"):
        Inputs(images=inputs.images, in_context_videos=inputs.in_context_videos).check(request)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_longer_clip_to_retake_is_cut_and_the_log_says_so(
    in_memory: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = [PICTURE] * 13 if in_memory else clip(tmp_path, 13)
    for count, lines in ((9, 1), (13, 0)):
        caplog.clear()
        retaken = load_inputs(GenerateRequest(num_frames=count), retake_video=given).retake_video
        assert retaken is not None
        assert len(retaken) == count
        said = [record for record in caplog.records if "retake_video is longer" in record.getMessage()]
        assert len(said) == lines


@pytest.mark.parametrize(
    ("rate", "said"), [(30.0, "24 frames per second, frame_rate is 30"), (24000 / 1001, ""), (24.0, "")]
)
def test_a_clip_of_another_frame_rate_is_said_to_run_faster(
    rate: float, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = GenerateRequest(num_frames=9, frame_rate=rate)
    load_inputs(request, retake_video=clip(tmp_path, 9))
    assert ("at 1.25 times its speed" in caplog.text) is bool(said)
    assert said in caplog.text


def test_a_longer_reference_is_cut_and_a_shorter_clip_refused(tmp_path: Path) -> None:
    file = clip(tmp_path, 13)
    request = GenerateRequest(num_frames=9)
    assert len(load_inputs(request, in_context_videos=[file]).in_context_videos[0]) == 9
    with pytest.raises(RequestError, match=r"retake_video has 13 frames, num_frames is 25.*num_frames=9"):
        load_inputs(GenerateRequest(num_frames=25), retake_video=file)
    with pytest.raises(RequestError, match="in_context_videos holds a clip without frames"):
        load_inputs(request, in_context_videos=[[]])


def test_a_clip_may_be_a_tensor() -> None:
    frames = torch.arange(12 * 4 * 4 * 3, dtype=torch.uint8).view(12, 4, 4, 3)
    assert name_of(frames) == "clip of 12 frames"
    read = load_inputs(GenerateRequest(num_frames=9), retake_video=frames).retake_video
    assert isinstance(read, torch.Tensor)
    assert torch.equal(read, frames[:9])


def test_the_length_fits_the_shortest_clip(tmp_path: Path) -> None:
    request = GenerateRequest(num_frames=25, in_context_videos=("a", "b"), fit=True)
    clips = [[PICTURE] * 25, clip(tmp_path, 20)]
    assert fit_request(request, in_context_videos=clips).num_frames == 17
    assert fit_request(request, in_context_videos=clips, retake_video=[PICTURE] * 12).num_frames == 9
    assert fit_request(request, in_context_videos=clips[:1]) is request
    plain = GenerateRequest(num_frames=25)
    assert fit_request(plain, in_context_videos=clips) is plain
    named = GenerateRequest(num_frames=25, retake_video=str(clips[1]), fit=True)
    assert fit_request(named).num_frames == 17


def test_the_part_of_a_sound_that_goes_with_the_video(tmp_path: Path) -> None:
    """By path and by object the same, but for what the file's coding changes."""
    rate, request = 24000, GenerateRequest(num_frames=9, audio_sample_rate=24000, audio_start_time=0.125)
    sound = torch.zeros(2, rate)
    sound[:, 6000:] = torch.sin(torch.arange(rate - 6000) * 0.05) * 0.5
    pictures = [Image.new("RGB", (64, 64))] * 24
    file = write_video_audio_ltx2(pictures, sound, tmp_path / "clip.mp4", 24, rate)
    parts = [load_inputs(request, retake_audio=given).retake_audio for given in (sound, file)]
    assert all(part is not None and part.samples.shape[0] == 2 for part in parts)
    first, second = (part.samples for part in parts if part is not None)
    assert torch.equal(first, sound[:, 3000:])
    assert not first[:, :3000].any()
    assert (first[:, :9000] - second[:, :9000]).abs().max() < 0.1
    short = replace(request, audio_max_duration=0.25)
    cut = load_inputs(short, retake_audio=sound).retake_audio
    assert cut is not None
    assert torch.equal(cut.samples, sound[:, 3000:9000])


def test_sounds() -> None:
    request = GenerateRequest(audio_sample_rate=16000)
    sound = load_inputs(request, retake_audio=torch.zeros(100, dtype=torch.float64)).retake_audio
    assert sound is not None
    assert (sound.samples.shape, sound.samples.dtype) == ((2, 100), torch.float32)
    assert sound.sampling_rate == 16000
    with pytest.raises(RequestError, match="retake_audio"):
        load_inputs(request, retake_audio=torch.zeros(1, 2, 100))
    with pytest.raises(RequestError, match=r"retake_audio=nowhere\.wav"):
        load_inputs(request, retake_audio="nowhere.wav")
