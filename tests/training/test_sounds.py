"""Data sets of sounds without pictures: from files to an adapter of the sound alone."""

from pathlib import Path

import av
import pytest
import torch
from av import AudioFrame
from safetensors.torch import load_file

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.training.clips import find_clips
from diffsynth.training.config_file import read_config
from diffsynth.training.preprocess import preprocess
from diffsynth.training.samples import Sample, read_index
from diffsynth.training.trainer import train
from diffsynth.utils.audio import Waveform, read_audio, sound_length
from diffsynth.utils.audio_file import write_audio
from tests.training.clips import write_clip, write_config, write_data_set

RATE = 16000
DATA = 'source = "sounds"\nfolder = "samples"\nvideo = false\naudio_durations = [0.4, 1.0]'
SOUND_ALONE = 'video = "none"'
CODECS = {".mp3": "libmp3lame", ".ogg": "libopus", ".m4a": "aac", ".aiff": "pcm_s16be"}


def tone(seconds: float, pitch_hz: float = 440.0) -> torch.Tensor:
    """(2, samples) at 16 kHz."""
    time_s = torch.arange(round(seconds * RATE)) / RATE
    return (0.5 * torch.sin(2 * torch.pi * pitch_hz * time_s)).expand(2, -1).contiguous()


def write_sound(path: Path, seconds: float = 0.5, caption: str | None = "a tone") -> Path:
    """With the caption beside it; in any format."""
    rate = 48000 if path.suffix == ".ogg" else RATE
    sound = Waveform(tone(seconds), RATE).resample(rate)
    if path.suffix in CODECS:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(CODECS[path.suffix], rate=rate, layout="stereo")
            pcm = (sound.samples * 32767).to(torch.int16).T.reshape(1, -1).contiguous().numpy()
            frame = AudioFrame.from_ndarray(pcm, format="s16", layout="stereo")
            frame.sample_rate = rate
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        write_audio(sound, path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """A folder for sounds, beside the configuration."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("suffix", [".wav", ".flac", *CODECS])
def test_length_as_the_header_states_it(tmp_path: Path, suffix: str) -> None:
    """Within what a codec adds at the ends."""
    path = write_sound(tmp_path / f"a{suffix}", 1.0)
    assert sound_length(path) == pytest.approx(1.0, abs=0.13)
    assert sound_length(path) == pytest.approx(read_audio(path).duration_s, abs=0.13)


def test_length_of_what_is_no_sound(tmp_path: Path) -> None:
    silent = write_clip(tmp_path / "silent.mp4", sound=False)
    damaged = tmp_path / "damaged.wav"
    damaged.write_bytes(b"no sound")
    for path in (silent, damaged, tmp_path / "nowhere.wav"):
        with pytest.raises(RequestError, match=path.name):
            sound_length(path)


def test_a_folder_of_sounds_trains_the_sound_alone(tmp_path: Path, sounds: Path) -> None:
    """Of every format and of a clip with its sound; what cannot be used is named, and the others go on."""
    for name in ("a.wav", "b.flac", "c.mp3", "d.ogg"):
        write_sound(sounds / name)
    write_sound(sounds / "long.wav", 1.2, "a long tone")
    write_clip(sounds / "seen.mp4", frames=13).with_suffix(".txt").write_text("a square with a tone")
    write_sound(sounds / "short.wav", 0.3)
    write_sound(sounds / "nameless.wav", caption=None)
    write_sound(sounds / "damaged.wav").write_bytes(b"no sound")
    config = read_config(
        write_config(tmp_path, data=DATA, strategy=SOUND_ALONE, training="steps = 6\nlearning_rate = 1e-2")
    )
    report = preprocess(config)
    assert (report.made, report.kept) == (6, 0)
    reasons = {Path(where).name: reason for where, reason in report.broken}
    assert reasons.keys() == {"short.wav", "nameless.wav", "damaged.wav"}
    assert "lasts 0.30 s" in reasons["short.wav"]
    assert "0.4 s" in reasons["short.wav"]
    assert "no readable caption" in reasons["nameless.wav"]
    entries = read_index(config.data.folder)
    lengths = {Path(entry.source).name: entry.audio_shape for entry in entries}
    assert lengths["long.wav"] == (8, 25, 16)
    assert {shape for name, shape in lengths.items() if name != "long.wav"} == {(8, 10, 16)}
    assert all(entry.video_shape is None for entry in entries)
    assert preprocess(config).kept == 6

    factors = load_file(train(config))
    moved = {name for name, tensor in factors.items() if "lora_B" in name and bool(tensor.any())}
    assert any(".audio_attn1." in name for name in moved)
    assert not any(".attn1." in name or ".attn2." in name for name in moved), "the video's are not touched"
    with pytest.raises(RequestError, match="earlier run"):
        train(config)


def test_the_beginning_counts(tmp_path: Path, sounds: Path) -> None:
    """A longer sound becomes the sample of its beginning; silence takes the place of less than a latent."""
    beginning = tone(1.0)
    after = torch.cat([beginning, tone(0.3, 880.0)], dim=1)
    files = {"cut": beginning, "long": after, "almost": beginning[:, :-300]}
    for name, samples in files.items():
        write_audio(Waveform(samples, RATE), sounds / f"{name}.wav")
        (sounds / f"{name}.txt").write_text("a tone")
    config = read_config(write_config(tmp_path, data=DATA, strategy=SOUND_ALONE))
    preprocess(config)
    latents = {}
    for entry in read_index(config.data.folder):
        sample = Sample.load(config.data.folder / entry.file)
        assert sample.audio is not None
        latents[Path(entry.source).stem] = sample.audio
    assert torch.equal(latents["cut"], latents["long"])
    assert latents["almost"].shape == latents["cut"].shape
    assert not torch.equal(latents["almost"], latents["cut"])


def test_a_sound_shorter_than_its_header_says(tmp_path: Path, sounds: Path) -> None:
    """It is named like a clip that ends too early."""
    write_sound(sounds / "a.wav")
    whole = write_sound(sounds / "b.wav", 1.0)
    whole.write_bytes(whole.read_bytes()[: 44 + RATE])
    config = read_config(write_config(tmp_path, data=DATA, strategy=SOUND_ALONE))
    report = preprocess(config)
    assert report.made + len(report.broken) == 2
    lengths = {Path(e.source).name: e.audio_shape for e in read_index(config.data.folder)}
    assert lengths.get("b.wav") in {None, (8, 6, 16)}
    assert lengths["a.wav"] == (8, 10, 16)


def test_rows_of_a_table(tmp_path: Path, sounds: Path) -> None:
    """By any of the columns, with masks and reference sounds."""
    write_sound(sounds / "a.wav")
    write_sound(sounds / "voice.wav", 0.2)
    mask = torch.cat([torch.ones(1, RATE // 5), torch.zeros(1, RATE)], dim=1)
    write_audio(Waveform(mask, RATE), sounds / "mask.wav")
    (sounds / "list.csv").write_text(
        "audio,caption,reference_audio,audio_mask\n"
        "a.wav,a tone,voice.wav,mask.wav\na.wav,a tone,,mask.wav\nnowhere.wav,a tone,voice.wav,mask.wav\n"
    )
    (clip,) = find_clips(sounds / "list.csv", video=False)[:1]
    assert (clip.path, clip.sound, clip.pictures) == (sounds / "a.wav", None, False)
    data = DATA.replace('"sounds"', '"sounds/list.csv"') + "\naudio_reference = true"
    strategy = (
        f'{SOUND_ALONE}\naudio_reference_probability = 1.0\n[[strategy.conditions]]\ntype = "mask"\n'
        'modality = "audio"'
    )
    config = read_config(write_config(tmp_path, data=data, strategy=strategy, training="steps = 1"))
    report = preprocess(config)
    assert [where for where, _ in report.broken] == ["list.csv:3", "list.csv:4"]
    (entry,) = read_index(config.data.folder)
    assert (entry.audio_shape, entry.audio_reference_shape) == ((8, 10, 16), (8, 5, 16))
    sample = Sample.load(config.data.folder / entry.file)
    assert sample.audio_mask is not None
    assert sample.audio_mask.tolist() == [[True] * 5 + [False] * 5]
    assert train(config).exists()


def test_sounds_among_clips_are_refused(tmp_path: Path) -> None:
    """Unless they are those of a clip, or nothing says that they are examples of their own."""
    clips = write_data_set(tmp_path)
    write_sound(clips / "0.wav", caption=None)
    write_sound(clips / "voice.wav", caption=None)
    config = read_config(write_config(tmp_path))
    assert [clip.path.name for clip in find_clips(clips)] == ["0.mp4"]
    write_sound(clips / "alone.wav")
    with pytest.raises(RequestError, match=r"alone\.wav is a sound without pictures") as caught:
        preprocess(config)
    assert "video = false" in caught.value.hint
    for row in ("0.wav,,a tone", ",0.wav,a tone"):
        (clips / "list.csv").write_text(f"video,audio,caption\n0.mp4,0.wav,a square\n{row}\n")
        with pytest.raises(RequestError, match=r"list\.csv:3 is a sound without pictures"):
            find_clips(clips / "list.csv")
        both = find_clips(clips / "list.csv", video=False)
        assert [clip.pictures for clip in both] == [True, False]


def test_settings_that_do_not_go_together(tmp_path: Path, sounds: Path) -> None:
    write_sound(sounds / "a.wav")

    def refused(match: str, data: str = DATA, strategy: str = SOUND_ALONE) -> None:
        with pytest.raises(RequestError, match=match):
            read_config(write_config(tmp_path, data=data, strategy=strategy))

    shown = DATA.replace("video = false", "video = true")
    refused(r"run\.toml:\d+: .*audio_durations=\[0\.4, 1\.0\] with video=True", shown)
    refused(r"audio_durations=.* with .*audio=False", f"{DATA}\naudio = false")
    refused(r"audio_durations=.* with .*buckets=\['64x64x9'\]", f'{DATA}\nbuckets = ["64x64x9"]')
    refused(r"run\.toml:\d+: .*audio_durations=\[0\.0\]", DATA.replace("[0.4, 1.0]", "[0.0]"))
    refused("buckets is missing", DATA.replace("audio_durations = [0.4, 1.0]", ""))
    refused(r"video='generate' with \[data\] audio_durations", strategy="")
    assert read_config(write_config(tmp_path, data=DATA.replace("[0.4, 1.0]", "[5]"), strategy=SOUND_ALONE))
    counted = DATA.replace("audio_durations = [0.4, 1.0]", 'buckets = ["64x64x9"]')
    with pytest.raises(RequestError, match="no clip of"):
        preprocess(read_config(write_config(tmp_path, data=counted, strategy=SOUND_ALONE)))


def test_samples_of_sound_do_not_train_pictures(tmp_path: Path, sounds: Path) -> None:
    write_sound(sounds / "a.wav")
    preprocess(read_config(write_config(tmp_path, data=DATA, strategy=SOUND_ALONE)))
    other = 'source = "sounds"\nfolder = "samples"\nbuckets = ["64x64x9"]'
    with pytest.raises(CheckpointError, match=r"a\.wav has no pictures"):
        train(read_config(write_config(tmp_path, data=other)))
