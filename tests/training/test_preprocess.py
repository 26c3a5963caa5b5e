"""Clips to samples, with the tiny models."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.pipelines.progress import Progress
from diffsynth.training.clips import find_clips
from diffsynth.training.config_file import read_config
from diffsynth.training.preprocess import preprocess
from diffsynth.training.samples import Sample, read_index
from tests.training.clips import FPS, write_clip, write_config, write_data_set


def test_samples_are_made_once(tmp_path: Path) -> None:
    write_data_set(tmp_path, 2)
    config = read_config(write_config(tmp_path))
    told: list[Progress] = []
    report = preprocess(config, told.append)
    assert (report.made, report.kept, report.broken) == (2, 0, ())
    assert {event.phase for event in told} == {"look at clips", "encode captions", "encode clips"}
    first, second = read_index(config.data.folder)
    assert (first.video_shape, first.audio_shape, first.fps) == ((128, 2, 2, 2), (8, 9, 16), FPS)
    assert first.caption == "a red square moves right 0"
    samples = [Sample.load(config.data.folder / entry.file) for entry in (first, second)]
    for sample in samples:
        assert sample.video is not None
        assert sample.audio is not None
        assert bool(sample.video.isfinite().all() and sample.audio.isfinite().all())
        assert sample.context.video.shape[:2] == (1, 1024)
    assert not torch.equal(samples[0].context.video, samples[1].context.video)

    before = {path: path.stat().st_mtime_ns for path in config.data.folder.glob("*.safetensors")}
    (config.data.folder / second.file).unlink()
    again = preprocess(config, told.append)
    assert (again.made, again.kept) == (1, 1)
    kept = config.data.folder / first.file
    assert kept.stat().st_mtime_ns == before[kept]
    made = Sample.load(config.data.folder / second.file)
    assert made.video is not None
    assert samples[1].video is not None
    assert torch.equal(made.video, samples[1].video)


def test_broken_clips_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    clips = write_data_set(tmp_path)
    (clips / "damaged.mp4").write_bytes(b"no video")
    write_clip(clips / "short.mp4", frames=5)
    write_clip(clips / "silent.mp4", sound=False)
    write_clip(clips / "nameless.mp4")
    rows = [
        {"video": "0.mp4", "caption": "a square"},
        {"video": "damaged.mp4", "caption": "noise"},
        {"video": "short.mp4", "caption": "short"},
        {"video": "silent.mp4", "caption": "silence"},
        {"video": "nameless.mp4", "caption": " "},
        {"video": "missing.mp4", "caption": "nothing"},
    ]
    (clips / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = 'source = "clips/list.jsonl"\nfolder = "samples"\nbuckets = ["64x64x9"]'
    report = preprocess(read_config(write_config(tmp_path, data=data)))
    assert report.made == 1
    reasons = dict(report.broken)
    assert list(reasons) == [f"list.jsonl:{line}" for line in range(2, 7)]
    assert "cannot be read" in reasons["list.jsonl:2"]
    assert "5 frames" in reasons["list.jsonl:3"]
    assert "no sound track" in reasons["list.jsonl:4"]
    assert "no readable caption" in reasons["list.jsonl:5"]


def test_broken_masks_are_named(tmp_path: Path) -> None:
    clips = write_data_set(tmp_path)
    write_clip(clips / "short.mp4", frames=5)
    Image.new("L", (64, 64), 255).save(clips / "white.png")
    Image.new("L", (64, 64), 0).save(clips / "black.png")
    names = ("", "short.mp4", "white.png", "black.png", "nowhere.png")
    rows = "".join(f"0.mp4,a square {name},{name}\n" for name in names)
    (clips / "list.csv").write_text(f"video,caption,video_mask\n{rows}")
    data = 'source = "clips/list.csv"\nfolder = "samples"\nbuckets = ["64x64x9"]\naudio = false'
    report = preprocess(read_config(write_config(tmp_path, data=data)))
    assert report.made == 1
    reasons = dict(report.broken)
    assert "5 of 9 frames" in reasons["list.csv:3"]
    assert "white.png gives the whole clip" in reasons["list.csv:4"]
    assert "black.png gives nothing" in reasons["list.csv:5"]
    assert "nowhere.png" in reasons["list.csv:6"]


def test_bucket_nearest_in_aspect(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "wide.mp4", width=128, height=64, frames=17, sound=False)
    (clips / "list.csv").write_text("path,prompt\nwide.mp4,wide\n")
    data = (
        'source = "clips/list.csv"\nfolder = "samples"\naudio = false\ntrigger = "TOK"\n'
        'buckets = ["64x64x17", "128x64x9", "128x64x17", "128x64x25"]'
    )
    config = read_config(write_config(tmp_path, data=data))
    preprocess(config)
    (entry,) = read_index(config.data.folder)
    assert (entry.video_shape, entry.audio_shape) == ((128, 3, 2, 4), None)
    assert entry.caption == "TOK wide"


def test_unreadable_caption_beside_a_clip(tmp_path: Path) -> None:
    clips = write_data_set(tmp_path)
    write_clip(clips / "b.mp4").with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    report = preprocess(read_config(write_config(tmp_path)))
    assert report.made == 1
    assert [where for where, _ in report.broken] == [str(clips / "b.mp4")]


def test_nothing_to_use(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    config = read_config(write_config(tmp_path))
    with pytest.raises(RequestError, match="holds no clips"):
        preprocess(config)
    write_clip(clips / "a.mp4")
    with pytest.raises(RequestError, match="no clip of"):
        preprocess(config)
    with pytest.raises(CheckpointError, match="no samples"):
        read_index(config.data.folder)


def test_lists_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('media_path,caption,audio\n"a, b.mp4","x, y",s.wav\n')
    (tmp_path / "a.json").write_text('[{"file_name": "b.mp4", "prompt": "y"}]')
    (clip,) = find_clips(tmp_path / "a.csv")
    assert (clip.path, clip.caption, clip.sound) == (tmp_path / "a, b.mp4", "x, y", tmp_path / "s.wav")
    (clip,) = find_clips(tmp_path / "a.json")
    assert (clip.path.name, clip.caption, clip.sound) == ("b.mp4", "y", None)
    ends = "a\u2028b\u0085c"  # ends of lines for some, and text for JSON and CSV
    row = json.dumps({"video": "a.mp4", "caption": ends}, ensure_ascii=False)
    (tmp_path / "ends.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    (tmp_path / "ends.csv").write_text(f"video,caption\na.mp4,{ends}\n", encoding="utf-8")
    for name, count in (("ends.jsonl", 2), ("ends.csv", 1)):
        assert [clip.caption for clip in find_clips(tmp_path / name)] == [ends] * count
    (tmp_path / "bad.jsonl").write_text('{"video": "a.mp4"}\n{')
    with pytest.raises(RequestError, match=r"bad\.jsonl:2 is no JSON"):
        find_clips(tmp_path / "bad.jsonl")
    (tmp_path / "a.txt").write_text("a.mp4")
    for name in ("a.txt", "no.csv"):
        with pytest.raises(RequestError, match=name):
            find_clips(tmp_path / name)
