"""Whole runs of the trainer with the tiny models."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffsynth.conditioning.text import PromptContext
from diffsynth.errors import Cancelled, CheckpointError, DiffSynthError, RequestError
from diffsynth.loader import ModelConfig
from diffsynth.lora import linear_shapes, read_lora
from diffsynth.pipelines.assemble import open_models
from diffsynth.training.adapters import ATTENTION_TARGETS
from diffsynth.training.base import open_base
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_file import read_config
from diffsynth.training.preprocess import preprocess
from diffsynth.training.samples import Sample, read_index, write_index
from diffsynth.training.state import Checkpoints
from diffsynth.training.trainer import TrainingStep, train
from diffsynth.utils.audio import Waveform
from diffsynth.utils.audio_file import write_audio
from tests.pipelines.tiny import DEV, GEMMA, call, load, same
from tests.training.clips import write_clip, write_config, write_data_set, write_lossless
from tests.training.narrow import write_narrow, write_samples

SHORT = "steps = 6\nbatch_size = 2\ngradient_accumulation = 2\nlearning_rate = 1e-3\nema_decay = 0.5"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer for short samples of few channels."""
    return write_narrow(tmp_path_factory.mktemp("model") / "narrow.safetensors")


@pytest.fixture
def configured(model: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A configuration over three samples; ``run`` names the output folder."""
    samples = write_samples(tmp_path / "samples", 3)

    def make(run: str = "run", *, precision: str = "float32", **sections: str) -> TrainConfig:
        given = {
            "model": f'checkpoint = "{model}"\ndevice = "cpu"\ndtype = "{precision}"',
            "data": f'source = "clips"\nfolder = "{samples}"\nbuckets = ["64x64x9"]',
            "output": f'folder = "{run}"\nsave_every = 2\ndtype = "float32"',
            "training": SHORT,
            "lora": "rank = 4",
        }
        return read_config(write_config(tmp_path, **{**given, **sections}))

    return make


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def equal(first: Path, second: Path) -> bool:
    tensors, metadata = content(first)
    others, other_metadata = content(second)
    return (
        metadata == other_metadata
        and tensors.keys() == others.keys()
        and all(torch.equal(tensors[key], others[key]) for key in tensors)
    )


@pytest.mark.parametrize(
    ("name", "precision"), [("lora", "float32"), ("lora", "bfloat16"), ("model", "float32")]
)
def test_stopped_and_resumed_is_equal_in_every_bit(
    configured: Callable[..., TrainConfig], name: str, precision: str
) -> None:
    strategy = '[[strategy.conditions]]\ntype = "first_frame"\nprobability = 0.5'
    training = SHORT + ('\nmode = "full"' if name == "model" else "")
    sections = {"precision": precision, "strategy": strategy, "training": training}
    unbroken = configured("unbroken", **sections)
    train(unbroken)
    broken, seen = configured("broken", **sections), list[TrainingStep]()
    with pytest.raises(Cancelled, match=r"after step 3 of 6.*--resume"):
        train(broken, on_step=seen.append, should_stop=lambda: seen[-1].step == 3)
    assert list(Checkpoints(broken.output.folder).states()) == [3]
    train(broken, resume=True, on_step=seen.append)
    assert [step.step for step in seen] == [0, 1, 2, 3, 3, 4, 5, 6]
    one, two = Checkpoints(unbroken.output.folder), Checkpoints(broken.output.folder)
    assert list(one.states()) == list(two.states()) == [6]
    assert equal(one.state(6), two.state(6))
    assert equal(one.result(name, 6), two.result(name, 6))
    assert equal(one.result(name, 6, mean=True), two.result(name, 6, mean=True))
    assert not equal(one.result(name, 6), one.result(name, 4))


def test_metrics_go_on_after_the_stop(configured: Callable[..., TrainConfig]) -> None:
    config, seen = configured(), list[TrainingStep]()
    with pytest.raises(Cancelled):
        train(config, on_step=seen.append, should_stop=lambda: seen[-1].step == 3)
    table = config.output.folder / "metrics.csv"
    with table.open("a") as file:  # a run that was killed after its state was saved
        file.write("4,1.0,0.5,0.5,0.001,1.0,0.1,,,,,,,,\n5,1.")
    train(config, resume=True)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == list("123456")
    for row in rows:
        total = float(row["video_loss"]) + float(row["audio_loss"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-4)
        quarters = [row[f"video_loss_quarter_{q}"] for q in range(1, 5)]
        assert any(quarters)
    assert float(rows[0]["learning_rate"]) == 1e-3
    assert float(rows[5]["learning_rate"]) == pytest.approx(1e-3 * (1 - 0.9 * 5 / 6))


def test_overfitting_one_clip(configured: Callable[..., TrainConfig], tmp_path: Path) -> None:
    everything = (*ATTENTION_TARGETS, "proj", "net.2", "linear", "linear_1", "linear_2")
    ends = (*everything, "patchify_proj", "proj_out", "audio_patchify_proj", "audio_proj_out")
    samples = write_samples(tmp_path / "one", 1, repeated=16)
    config = configured(
        data=f'source = "clips"\nfolder = "{samples}"\nbuckets = ["64x64x9"]',
        lora=f"rank = 16\ntargets = {json.dumps(ends)}",
        training="steps = 140\nbatch_size = 16\nlearning_rate = 2e-2\nweight_decay = 0.0",
    )
    losses: list[float] = []
    train(config, on_step=lambda step: losses.append(step.values.get("loss", 0.0)))
    assert sum(losses[-20:]) / 20 < 0.1 * losses[1]


def test_from_clips_to_the_pipeline(tmp_path: Path) -> None:
    """The adapter changes what the pipeline makes, and only while it is loaded."""
    write_data_set(tmp_path)
    config = read_config(write_config(tmp_path, training="steps = 2\nlearning_rate = 1e-2"))
    preprocess(config)
    adapter = train(config)
    pipe = load(stage2_lora=None)
    before = call(pipe)
    pipe.load_lora(pipe.dit, adapter)
    assert not same(call(pipe), before)
    pipe.clear_lora()
    assert same(call(pipe), before)


def test_running_mean(configured: Callable[..., TrainConfig]) -> None:
    config = configured(
        training="steps = 3\nlearning_rate = 1e-2\nema_decay = 0.75",
        output='folder = "run"\nsave_every = 1\ndtype = "float32"',
    )
    train(config)
    files = Checkpoints(config.output.folder)
    key = "diffusion_model.transformer_blocks.0.attn1.to_q.lora_B.weight"
    mean = torch.zeros(())  # where every up factor starts
    for step in (1, 2, 3):
        mean = 0.75 * mean + 0.25 * content(files.result("lora", step))[0][key]
        torch.testing.assert_close(content(files.result("lora", step, mean=True))[0][key], mean)


def test_in_context_adapter_states_its_factor(tmp_path: Path) -> None:
    clips = write_data_set(tmp_path)
    write_clip(clips / "reference.mp4", sound=False)
    write_clip(clips / "short.mp4", frames=3)
    (clips / "list.csv").write_text(
        "video,caption,reference\n0.mp4,a square,reference.mp4\n0.mp4,none,\n0.mp4,short,short.mp4\n"
    )
    data = 'source = "clips/list.csv"\nfolder = "samples"\nbuckets = ["64x64x9"]\nreference_scale = 2'
    strategy, training = "reference_probability = 1.0", "steps = 2"
    config = read_config(write_config(tmp_path, data=data, strategy=strategy, training=training))
    report = preprocess(config)
    assert report.made == 1
    assert [where for where, _ in report.broken] == ["list.csv:3", "list.csv:4"]
    shapes = linear_shapes(load(stage2_lora=None).dit)
    lora = read_lora(train(config), shapes.keys(), shapes)
    assert (lora.reference.factor, lora.reference.source) == (2, "metadata")
    without = 'source = "clips"\nfolder = "samples"\nbuckets = ["64x64x9"]'
    with pytest.raises(RequestError, match=r"without .* reference_scale"):
        read_config(write_config(tmp_path, data=without, strategy=strategy))


def test_sparse_references_from_files(tmp_path: Path) -> None:
    """Of a reference as long as the clip every second frame is taken; one that has only those is the same."""
    clips = write_data_set(tmp_path)
    write_clip(clips / "long.mp4", frames=17)
    pictures = torch.randint(0, 255, (17, 64, 64, 3), generator=torch.Generator().manual_seed(1))
    kept = [0, 1, 3, 5, 7, 9, 11, 13, 15]
    write_lossless(clips / "full.mkv", pictures.to(torch.uint8))
    write_lossless(clips / "sparse.mkv", pictures[kept].to(torch.uint8))
    write_lossless(clips / "other.mkv", pictures[:12].to(torch.uint8))
    (clips / "list.csv").write_text(
        "video,caption,reference\nlong.mp4,a square,full.mkv\nlong.mp4,a square,sparse.mkv\n"
        "long.mp4,a square,other.mkv\n"
    )
    data = (
        'source = "clips/list.csv"\nfolder = "samples"\nbuckets = ["64x64x17"]\nreference_scale = 2\n'
        "reference_temporal_scale = 2"
    )
    how = {"strategy": "reference_probability = 1.0", "training": "steps = 1"}
    config = read_config(write_config(tmp_path, data=data, **how))
    report = preprocess(config)
    assert (report.made, [where for where, _ in report.broken]) == (2, ["list.csv:4"])
    assert "12 of 17 frames" in report.broken[0][1]
    assert "17 frames, or 9" in report.broken[0][1]
    entries = read_index(config.data.folder)
    assert {(e.video_shape, e.reference_shape) for e in entries} == {((128, 3, 2, 2), (128, 2, 1, 1))}
    full, sparse = (Sample.load(config.data.folder / entry.file).reference for entry in entries)
    assert full is not None
    assert sparse is not None
    assert torch.equal(full, sparse)
    shapes = linear_shapes(load(stage2_lora=None).dit)
    lora = read_lora(train(config), shapes.keys(), shapes)
    assert (lora.reference.factor, lora.reference.temporal_factor) == (2, 2)
    for change, match in (
        (("x17", "x25"), "bucket of 25 frames with reference_temporal_scale=2"),
        (("reference_scale = 2\n", ""), "reference_temporal_scale=2, reference_scale=0"),
    ):
        with pytest.raises(RequestError, match=match):
            read_config(write_config(tmp_path, data=data.replace(*change), **how))


def test_masks_and_reference_sounds_from_files(tmp_path: Path) -> None:
    """Through both commands; a sample without what the strategy wants is named before any step."""
    clips = write_data_set(tmp_path)
    masks = tmp_path / "masks"
    masks.mkdir()
    half = torch.zeros(64, 64, 3, dtype=torch.uint8)
    half[:, :32] = 255
    Image.fromarray(half.numpy()).save(masks / "0.png")
    sound = torch.cat([torch.zeros(1, 4000), torch.ones(1, 12000)], dim=1)
    write_audio(Waveform(sound, 16000), clips / "loud at the end.wav")
    write_audio(Waveform(torch.rand(1, 3200) - 0.5, 16000), clips / "voice.wav")
    (clips / "list.csv").write_text(
        "video,caption,audio_mask,reference_audio\n0.mp4,a square,loud at the end.wav,voice.wav\n"
    )
    data = (
        'source = "clips/list.csv"\nfolder = "samples"\nbuckets = ["64x64x9"]\nvideo_masks = "masks"\n'
        "audio_reference = true"
    )
    masked = "".join(
        f'[[strategy.conditions]]\ntype = "mask"\nmodality = "{m}"\n' for m in ("video", "audio")
    )
    strategy = f"audio_reference_probability = 0.5\n{masked}"
    config = read_config(write_config(tmp_path, data=data, strategy=strategy, training="steps = 2"))
    assert preprocess(config).made == 1
    (entry,) = read_index(config.data.folder)
    sample = Sample.load(config.data.folder / entry.file)
    assert sample.video_mask is not None
    assert sample.audio_mask is not None
    assert sample.video_mask.tolist() == [[[[True, False]] * 2] * 2]
    assert sample.audio_mask.tolist() == [[False] * 6 + [True] * 3]
    assert (entry.audio_reference_shape, entry.audio_shape) == ((8, 5, 16), (8, 9, 16))
    assert train(config).exists()
    plain = 'source = "clips"\nfolder = "samples"\nbuckets = ["64x64x9"]'
    without = read_config(write_config(tmp_path, data=plain, strategy=masked, training="steps = 2"))
    preprocess(without)
    with pytest.raises(CheckpointError, match=r"0\.mp4 has no mask of the video.*video_mask"):
        train(without)


def test_all_weights_become_a_checkpoint(tmp_path: Path) -> None:
    """It holds the other networks as they were, and generates."""
    write_data_set(tmp_path)
    training = 'mode = "full"\nsteps = 2\nlearning_rate = 1e-3'
    config = read_config(write_config(tmp_path, training=training))
    preprocess(config)
    checkpoint = train(config)
    assert checkpoint.name == "model_weights_step_00002.safetensors"
    (tensors, metadata), (others, stated) = content(checkpoint), content(DEV)
    assert metadata["config"] == stated["config"]
    assert metadata["model_version"] == stated["model_version"]
    assert tensors.keys() == others.keys()
    changed = {key for key in others if not torch.equal(tensors[key], others[key].to(tensors[key].dtype))}
    assert "model.diffusion_model.transformer_blocks.0.ff.net.2.weight" in changed
    assert all(key.startswith("model.diffusion_model.") and "_connector." not in key for key in changed)
    made = call(load(checkpoint, GEMMA, stage2_lora=None))
    assert not same(made, call(load(DEV, GEMMA, stage2_lora=None)))


@pytest.mark.parametrize(
    "strategy",
    [
        'audio = "none"',
        'video = "none"',
        'audio = "given"',
        'video = "given"',
        '[[strategy.conditions]]\ntype = "first_frame"\nprobability = 0.5',
    ],
)
def test_strategies_run(configured: Callable[..., TrainConfig], strategy: str) -> None:
    config = configured(training="steps = 2\nlearning_rate = 1e-2\nbatch_size = 3", strategy=strategy)
    tensors, _ = content(train(config))
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)


def test_refusals(configured: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = configured(training="steps = 1")
    with pytest.raises(RequestError, match="no state"):
        train(config, resume=True)
    unknown = configured(lora='targets = ["to_x"]')
    opened = open_models([ModelConfig.named(name) for name in config.model.checkpoint])
    with pytest.raises(RequestError, match=r"'to_x'.*to_"):  # before a weight is read
        open_base(unknown, opened.only(["dit"]), read_index(config.data.folder))
    train(config)
    with pytest.raises(RequestError, match=r"earlier run.*--resume"):
        train(config)
    other = configured(training="steps = 1\nlearning_rate = 1.0", lora="rank = 2")
    with pytest.raises(RequestError, match=r"other settings: lora\.rank, training\.learning_rate"):
        train(other, resume=True)
    shutil.rmtree(config.output.folder)
    data = 'source = "clips"\nfolder = "nowhere"\nbuckets = ["64x64x9"]'
    with pytest.raises(CheckpointError, match="nowhere holds no samples"):
        train(configured(data=data))


def test_constant_rate_may_train_longer(configured: Callable[..., TrainConfig]) -> None:
    constant = {"schedule": 'name = "constant"'}
    train(configured(training="steps = 1", **constant))
    longer = configured(training="steps = 2", **constant)
    assert train(longer, resume=True).name == "lora_weights_step_00002.safetensors"
    once = configured("once", training="steps = 2", **constant)
    train(once)
    assert equal(Checkpoints(longer.output.folder).state(2), Checkpoints(once.output.folder).state(2))


def test_ltx_2_3(ltx_2_3: Path, configured: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Gated attention and modulated text: an adapter on them is marked as one of that model."""
    random = torch.Generator().manual_seed(0)
    sample = Sample(
        video=torch.randn(1, 128, 2, 2, 2, generator=random),
        audio=torch.randn(1, 8, 4, 16, generator=random),
        context=PromptContext(
            torch.randn(1, 6, 32, generator=random), torch.randn(1, 6, 16, generator=random)
        ),
        fps=24.0,
    )
    folder = tmp_path / "of 2.3"
    folder.mkdir()
    sample.save(folder / "a.safetensors", source="none", caption="noise")
    write_index(folder, [sample.entry("a.safetensors", source="none", caption="noise")])
    config = configured(
        model=f'checkpoint = "{ltx_2_3}"\ndevice = "cpu"\ndtype = "float32"',
        data=f'source = "clips"\nfolder = "{folder}"\nbuckets = ["64x64x9"]',
        lora='rank = 2\ntargets = ["to_gate_logits", "attn2.to_k"]',
        training="steps = 2\nlearning_rate = 1e-2",
    )
    tensors, metadata = content(train(config))
    assert metadata["base_model"] == "LTX-2.3"
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "logits.lora_B" in name)


def test_a_gradient_that_is_not_finite_ends_the_run(configured: Callable[..., TrainConfig]) -> None:
    """The step is not made: what was saved before it is whole."""
    config = configured(
        training="steps = 5\nlearning_rate = 1e30\nmax_grad_norm = 0.0",
        output='folder = "run"\nsave_every = 1\ndtype = "float32"',
    )
    with pytest.raises(DiffSynthError, match=r"gradient of step \d is not finite.*lower learning_rate"):
        train(config)
    ((_, state),) = Checkpoints(config.output.folder).states().items()
    tensors, _ = content(state)
    assert all(bool(t.isfinite().all()) for name, t in tensors.items() if name.startswith("parameter"))
