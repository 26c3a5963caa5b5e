"""Training of the nano transformer on fake latents."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsynth.conditioning.text import PromptTokenizer
from diffsynth.conditioning.tokens import patchify
from diffsynth.nano.world import FRAMED, VOCABULARY, Description
from training.nano.dit import GEMMA, NanoTransformer, TransformerSizes
from training.nano.latents import FOLDER, Clips, caption_ids
from training.nano.prompts import TextSettings, write_tokenizer
from training.nano.transformer import Batch, Batches, Places, Training, TransformerSettings, losses

DESCRIPTION = Description.read("a red circle moves left over a blue background, a high beep")
SIZES = TransformerSizes(
    layers=1, heads=2, head_dim=24, audio_head_dim=24, video_channels=8, audio_channels=8
)
SETTINGS = TransformerSettings(
    sizes=SIZES, batches={64: 16}, shares={64: 1.0}, learning_rate=1e-2, warm_up=5, average=0.9, empty=0.0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    write_tokenizer(folder / GEMMA, VOCABULARY)
    ids, counts = caption_ids(PromptTokenizer(folder / GEMMA), [DESCRIPTION] * 4)
    video = torch.randn(1, 8, 4, 2, 2, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1, 1, 1)
    audio = torch.randn(1, 26, 8, generator=torch.Generator().manual_seed(1)).repeat(4, 1, 1)
    clips = Clips(side=64, video=patchify(video).bfloat16(), audio=audio.bfloat16(), ids=ids, counts=counts)
    clips.save(folder / FOLDER)
    return folder


def batch_of(folder: Path, **changes: object) -> tuple[Batch, Places, tuple[torch.Tensor, torch.Tensor]]:
    clips = Clips.load(folder / FOLDER, 64, "cpu")
    source = Batches(SETTINGS, [clips], torch.device("cpu"))
    batch = replace(source.draw(0), **({"first_frame": False, "given": None} | changes))
    return batch, Places([clips], torch.device("cpu")), (source.noise(batch.video), source.noise(batch.audio))


def test_captions_come_in_all_forms_and_framed(folder: Path) -> None:
    clips, tokenizer = Clips.load(folder / FOLDER, 64, "cpu"), PromptTokenizer(folder / GEMMA)
    read = [tokenizer.decode(ids) for ids in clips.ids[1].tolist()]
    assert read[0] == DESCRIPTION.caption(0).replace(",", "")
    assert read[-1] == f"{FRAMED} {DESCRIPTION.caption(1)}".replace(",", "")
    assert clips.counts[1].tolist() == [1 + len(text.split()) for text in read]


def test_what_is_given_is_neither_noised_nor_in_the_loss(folder: Path) -> None:
    torch.manual_seed(0)
    network = NanoTransformer.of_sizes(SIZES, TextSettings(), 45)  # predicts zeros
    seen = []
    network.transformer.patchify_proj.register_forward_hook(lambda m, x, y: seen.append(x[0]))
    batch, places, noise = batch_of(folder)
    square = (noise[0] - batch.video).square()
    whole = losses(network, batch, places, noise)
    assert whole[0].item() == pytest.approx(square.mean().item(), rel=1e-5)
    assert whole[1].item() == pytest.approx((noise[1] - batch.audio).square().mean().item(), rel=1e-5)
    first = losses(network, replace(batch, first_frame=True), places, noise)
    assert first[0].item() == pytest.approx(square[:, 4:].mean().item(), rel=1e-5)
    assert torch.equal(seen[1][:, :4], batch.video[:, :4])
    assert torch.equal(seen[1][:, 4:], seen[0][:, 4:])
    given = losses(network, replace(batch, given="video"), places, noise)
    assert given[0].item() == 0
    assert given[1].item() == whole[1].item()
    assert torch.equal(seen[2], batch.video)


def test_training_learns_and_repeats(folder: Path) -> None:
    runs = [Training(SETTINGS, folder, torch.device("cpu")) for _ in range(2)]
    losses_of = [[one_step(run, step) for step in range(3)] for run in runs]
    assert losses_of[0] == losses_of[1]
    later = [one_step(runs[0], step) for step in range(3, 60)]
    assert sum(later[-10:]) / 10 < 0.7 * losses_of[0][0]


def one_step(run: Training, step: int) -> float:
    loss = run.loss_at(step, 60)
    loss.backward()
    run.optimizer.step(run.schedule(step, 60))
    return loss.item()


def test_a_run_that_broke_off_goes_on_with_its_average(folder: Path, tmp_path: Path) -> None:
    whole = Training(SETTINGS, folder, torch.device("cpu"))
    for step in range(8):
        one_step(whole, step)
        if step == 4:
            torch.save(whole.optimizer.state_dict(), tmp_path / "state.pt")
    again = Training(SETTINGS, folder, torch.device("cpu"))
    again.optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(5, 8):
        one_step(again, step)
    again.optimizer.average.swap()
    whole.optimizer.average.swap()
    pairs = zip(whole.network.parameters(), again.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
