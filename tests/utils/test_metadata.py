import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from diffsynth.errors import RequestError
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from diffsynth.utils.metadata import read_request, request_tags

REQUEST = {
    "prompt": 'a caf\u00e9 \u2014 \U0001f642 "quoted"\nsecond line',
    "seed": 3,
    "loras": [["a.safetensors", 0.8]],
}
Remux = Callable[[dict[str, str], str], Path]


@pytest.fixture
def remux(tmp_path: Path) -> Remux:
    """A file with the given tags as another tool would write them."""

    def make(tags: dict[str, str], flags: str = "use_metadata_tags") -> Path:
        path = tmp_path / "other.mp4"
        with av.open(str(path), "w", format="mp4", container_options={"movflags": flags}) as container:
            container.metadata.update(tags)
            stream = container.add_stream("libx264", rate=1)
            stream.width = stream.height = 16
            stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
            container.mux(stream.encode(None))
        return path

    return make


def test_round_trip_through_a_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video_audio_ltx2(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), None, path, request=REQUEST)
    assert read_request(path) == REQUEST
    with av.open(str(path)) as container:
        tags = container.metadata
    assert json.loads(tags["comment"]) == json.loads(tags["diffsynth"]) == REQUEST


def test_no_request_writes_no_tags(tmp_path: Path) -> None:
    write_video_audio_ltx2(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), None, tmp_path / "a.mp4")
    assert read_request(tmp_path / "a.mp4") is None


def test_the_comment_serves_where_a_tool_dropped_our_tag(remux: Remux) -> None:
    assert read_request(remux({"comment": json.dumps(REQUEST)}, "faststart")) == REQUEST


@pytest.mark.parametrize("comment", ["made with love", "[1, 2]", "3", "{broken"])
def test_comments_of_others_are_no_request(remux: Remux, comment: str) -> None:
    assert read_request(remux({"comment": comment}, "faststart")) is None


def test_paths_and_fractions_become_text_and_other_objects_are_refused() -> None:
    tags = request_tags({"path": Path("a.png"), "fps": Fraction(24000, 1001)})
    assert json.loads(tags["diffsynth"]) == {"path": "a.png", "fps": "24000/1001"}
    with pytest.raises(RequestError, match="cannot be stored"):
        request_tags({"image": object()})


def test_a_file_that_is_no_video_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("text")
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(RequestError, match=name.replace(".", r"\.")):
            read_request(tmp_path / name)
