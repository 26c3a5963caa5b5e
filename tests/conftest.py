"""Fixtures that several rooms share: the tiny model set loaded once, and laid out as downloads would be; the
command line."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch.nn.modules.module import register_module_forward_pre_hook

from diffsynth.loader import SafetensorsFile
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.vram.cache import FOLDER_VARIABLE
from tests.cli.command import Here
from tests.nano.untrained import write_exported
from tests.pipelines.tiny import DEV, GEMMA, LORA, UPSCALER, load, write_ltx_2_3, write_upscaler
from tests.standin.registration import register_once

# Time limits of single examples fail on machines that are busy with something else.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# A shell that starts the tests in the background has them ignore Ctrl-C; some of them press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Gradients run in a thread per device, and torch looks for devices when it computes the first gradient.
register_once()

GEMMA_ID = "google/gemma-3-12b-it-qat-q4_0-unquantized"
LTX_2_ID = "Lightricks/LTX-2"
LORAS = {
    **{
        f"LTX-2-19b-LoRA-Camera-Control-{move}": ""
        for move in ("Dolly-In", "Dolly-Out", "Dolly-Left", "Dolly-Right", "Jib-Up", "Jib-Down", "Static")
    },
    "LTX-2-19b-IC-LoRA-Union-Control": "-ref0.5",
    "LTX-2-19b-IC-LoRA-Detailer": "",
    "LTX-2.3-22b-IC-LoRA-Union-Control": "-ref0.5",
    "LTX-2.3-22b-IC-LoRA-Motion-Track-Control": "-ref0.5",
}
"""Repositories of released LoRAs, and what the name of their file has after that of the repository."""


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted weights and the like of all tests, subprocesses included: never in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def loaded_pipe() -> Iterator[LTX2AudioVideoPipeline]:
    """Use ``pipe``, which checks that a test leaves nothing behind."""
    pipe = load()
    before = fingerprint(pipe)
    yield pipe
    assert fingerprint(pipe) == before, "a test changed the weights of the shared pipeline"


@pytest.fixture
def pipe(loaded_pipe: LTX2AudioVideoPipeline) -> Iterator[LTX2AudioVideoPipeline]:
    """The tiny set with upsampler and distilled LoRA, float32 on the CPU; without hooks afterwards."""
    yield loaded_pipe
    left = hooks(loaded_pipe)
    loaded_pipe.clear_lora()
    assert not left, f"hooks left on {left}"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, ltx_2_3: Path) -> Path:
    """A base folder with the tiny files under the ids and names of the released ones."""
    base = tmp_path_factory.mktemp("models")
    upscaler_2_3 = write_upscaler(
        tmp_path_factory.mktemp("upscaler") / "x2.safetensors", spatial_upsample=True, temporal_upsample=False
    )
    placed = {
        f"{LTX_2_ID}/ltx-2-19b-dev": DEV,
        f"{LTX_2_ID}/ltx-2-19b-distilled": DEV,
        f"{LTX_2_ID}/ltx-2-spatial-upscaler-x2-1.0": UPSCALER,
        f"{LTX_2_ID}/ltx-2-19b-distilled-lora-384": LORA,
        f"{LTX_2_ID}.3/ltx-2.3-22b-dev": ltx_2_3,
        f"{LTX_2_ID}.3/ltx-2.3-22b-distilled-1.1": ltx_2_3,
        f"{LTX_2_ID}.3/ltx-2.3-spatial-upscaler-x2-1.1": upscaler_2_3,
        f"{LTX_2_ID}.3/ltx-2.3-22b-distilled-lora-384-1.1": LORA,
    }
    for name, suffix in LORAS.items():
        placed[f"Lightricks/{name}/{name.lower()}{suffix}"] = LORA
    for name, file in placed.items():
        place = base / f"{name}.safetensors"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    (base / GEMMA_ID).mkdir(parents=True)
    for file in GEMMA.iterdir():
        (base / GEMMA_ID / file.name).symlink_to(file)
    return base


@pytest.fixture
def downloaded(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Model ids are found in ``model_folder``, and nothing may be fetched."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(model_folder))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    return model_folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Run the command in this process."""
    return Here(monkeypatch, capsys)


@pytest.fixture(scope="session")
def ltx_2_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in the layout of LTX-2.3."""
    return write_ltx_2_3(tmp_path_factory.mktemp("ltx-2.3") / "ltx-2.3-tiny-dev.safetensors")


@pytest.fixture(scope="session")
def untrained_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of files like the one in ``diffsynth/nano/weights``, of networks that are smaller still."""
    return write_exported(tmp_path_factory.mktemp("nano"), "distilled_lora", "framed_lora")


@pytest.fixture
def untouched(loaded_pipe: LTX2AudioVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For the rest of the test no weight may be read from a file and no network may run."""

    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    def run(module: torch.nn.Module, _: object) -> None:
        raise AssertionError(f"{type(module).__name__} ran")

    monkeypatch.setattr(SafetensorsFile, "_fill", read)
    handle = register_module_forward_pre_hook(run)
    yield
    handle.remove()


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, in which nothing may be left."""
    folder = tmp_path / "output"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not list(folder.rglob("*"))


def hooks(pipe: LTX2AudioVideoPipeline) -> list[str]:
    """Modules of the transformer with hooks."""
    found = pipe.dit.named_modules()
    return [name for name, module in found if module._forward_hooks or module._forward_pre_hooks]


def fingerprint(pipe: LTX2AudioVideoPipeline) -> dict[str, float]:
    """A number per network that any change of a weight would move."""
    networks = {name: getattr(pipe.parts, name) for name in pipe.parts.loaded() if name != "tokenizer"}
    return {
        name: sum(float(tensor.double().abs().sum()) for tensor in network.state_dict().values())
        for name, network in networks.items()
        if isinstance(network, torch.nn.Module)
    }
