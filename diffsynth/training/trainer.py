"""The loop: samples in, an adapter or a checkpoint out; stopped on the way or not, with the same bits."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth import __version__
from diffsynth.device import out_of_memory_told, resolve_device
from diffsynth.errors import Cancelled, CheckpointError, DiffSynthError
from diffsynth.loader import ModelConfig, NetworkKind
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.pipelines.assemble import MODEL_NAMES, open_models
from diffsynth.pipelines.prompt_cache import digest_of
from diffsynth.training.adapters import TrainableLora
from diffsynth.training.base import Base, open_base
from diffsynth.training.batches import BatchPlan, random_source
from diffsynth.training.checkpointing import checkpointed_blocks
from diffsynth.training.config import DTYPES, FULL, TrainConfig
from diffsynth.training.metrics import LossMeans, open_metrics
from diffsynth.training.optimiser import check_optimiser, make_optimiser
from diffsynth.training.samples import Sample, SampleEntry, read_index
from diffsynth.training.schedule import ScheduleName
from diffsynth.training.state import Checkpoints, Fingerprint, TrainingState
from diffsynth.training.strategy import BatchLoss, Strategy, check_samples, reference_factors
from diffsynth.training.trained import Trained, TrainedLora, TrainedModel
from diffsynth.training.validation import Validator
from diffsynth.training.workers import Workers, joined

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStep:
    """What a step that is done says: ``step`` of ``steps`` counted from 1, and its numbers by column of
    ``metrics.csv``.  The first one of a run may come with ``values`` empty: it says where the run begins."""

    step: int
    steps: int
    values: Mapping[str, float]


OnStep = Callable[[TrainingStep], None]


def silent(step: TrainingStep) -> None:
    """The listener of a caller who does not want to know."""


def never() -> bool:
    """Of a run that nobody stops."""
    return False


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    on_step: OnStep = silent,
    should_stop: Callable[[], bool] = never,
) -> Path:
    """Train an adapter, or all weights, on the samples of :func:`~diffsynth.training.preprocess.preprocess`.

    Args:
        config: see the configuration file.
        resume: go on from the last state in the output folder; on one machine every bit comes out as if the
            run had never been stopped, as far as the kernels of the device add in a fixed order.
        on_step: called before the first and after every step.
        should_stop: asked before every step; on True the run is saved and ends.

    Returns:
        The file of the last step: an adapter in the official key format, or a checkpoint.

    Raises:
        RequestError: settings that cannot work, an earlier run in the folder, or none with ``resume``.
        CheckpointError: the model or the samples cannot be read.
        OutputError: the output folder cannot be written to.
        MemoryBudgetError: the device ran out of memory.
        Cancelled: it was stopped; the hint says how to go on.
        DiffSynthError: the loss is not a finite number any more.
    """
    config.check()
    with joined(config.model.device) as (workers, device):
        workers.check(config.training.gradient_accumulation)
        config = replace(config, model=replace(config.model, device=str(device)))
        return _train(config, workers, resume, on_step, should_stop)


def _train(
    config: TrainConfig,
    workers: Workers,
    resume: bool,
    on_step: OnStep,
    should_stop: Callable[[], bool],
) -> Path:
    """See :func:`train`; the configuration names the device of this process."""
    check_optimiser(config.training)
    device = resolve_device(config.model.device)
    entries = read_index(config.data.folder)
    check_samples(config.strategy, entries)
    checkpoints = Checkpoints(config.output.folder)
    state = checkpoints.start(resume=resume) if workers.first or resume else None
    validator = Validator(config, device) if config.validation.clips and workers.first else None
    opened = open_models([ModelConfig.named(name) for name in config.model.checkpoint]).only(["dit"])
    files = [path for weights in opened.networks.values() for path in weights.files.paths]
    base = open_base(config, opened, entries)
    if validator is not None:
        validator.share(base.room)
    model = {"checkpoint": digest_of(files, ""), "dtype": config.model.dtype, "storage": base.storage}
    fingerprint = _fingerprint(config, entries, model)
    smaller = (
        "[memory] vram_limit, gradient_checkpointing = true, batch_size = 1, smaller buckets, a lower rank"
    )
    with out_of_memory_told(smaller, "training"), base.entered() as network:
        if config.training.mode == FULL:
            trained: Trained = TrainedModel(network, opened.networks[NetworkKind.TRANSFORMER])
        else:
            factors = _reference_factors(config, entries)
            trained = TrainedLora(_adapter(config, network), MODEL_NAMES[opened.version], factors)
        run = TrainingRun(config, base, network, trained, entries, fingerprint, workers, validator)
        if state is not None:
            run.restore(TrainingState.load(state, fingerprint))
        return run.go(checkpoints, on_step, should_stop)


def _reference_factors(config: TrainConfig, entries: Sequence[SampleEntry]) -> tuple[int, int] | None:
    """Those of the samples, where references are trained on.

    Raises:
        CheckpointError: samples with different factors.
    """
    if not config.strategy.reference_probability:
        return None
    factors = set()
    for entry in entries:
        assert entry.video_shape is not None, "check_samples has seen to it"
        assert entry.reference_shape is not None
        factors.add(reference_factors(entry.video_shape, entry.reference_shape))
    if len(factors) > 1:
        raise CheckpointError(f"references of the factors {sorted(factors)}", hint="one [data] section")
    return factors.pop()


def _adapter(config: TrainConfig, network: LTX2Transformer) -> TrainableLora:
    lora = config.lora
    return TrainableLora(
        network,
        lora.targets,
        rank=lora.rank,
        alpha=lora.rank if lora.alpha is None else lora.alpha,
        generator=random_source(config.training.seed, "adapter"),
        device=resolve_device(config.model.device),
    )


class TrainingRun:
    """A network with what is trained of it, the optimiser, and the place in the data."""

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        network: LTX2Transformer,
        trained: Trained,
        entries: Sequence[SampleEntry],
        fingerprint: Fingerprint,
        workers: Workers,
        validator: Validator | None = None,
    ) -> None:
        self.config = config
        self.step = 0
        self._base = base
        self._network = network
        self._trained = trained
        self._entries = entries
        self._fingerprint = fingerprint
        self._workers = workers
        self._validator = validator
        self._device = network.patchify_proj.weight.device
        training = config.training
        self.parameters = trained.parameters()
        self._optimiser = make_optimiser(training, self.parameters.values())
        self._mean: dict[str, Tensor] = {}
        if training.ema_decay:
            self._mean = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._plan = BatchPlan(entries, batch_size=training.batch_size, seed=training.seed)
        self._strategy = Strategy(
            config.strategy,
            config.sigmas.make(),
            shared_sigma=config.sigmas.shared,
            dtype=config.model.torch_dtype,
        )

    def restore(self, state: TrainingState) -> None:
        """Go on from a state."""
        state.restore(self.parameters, self._optimiser, self._mean)
        self.step = state.step

    def go(self, checkpoints: Checkpoints, on_step: OnStep, should_stop: Callable[[], bool]) -> Path:
        """Run to the last step; see :func:`train`."""
        steps, output = self.config.training.steps, self.config.output
        metrics = open_metrics(output.folder, self.step) if self._workers.first else []
        on_step(TrainingStep(step=self.step, steps=steps, values={}))
        try:
            self._validate(should_stop)
            while self.step < steps:
                if self._workers.any(should_stop()):
                    self.save(checkpoints)
                    self._workers.any(False)  # nobody ends before the file is whole
                    raise Cancelled(
                        f"stopped after step {self.step} of {steps}, saved in {checkpoints.folder}",
                        hint="the same command with --resume to go on",
                    )
                values = self.advance()
                for sink in metrics:
                    sink.write(self.step, values)
                on_step(TrainingStep(step=self.step, steps=steps, values=values))
                if self.step % output.save_every == 0 or self.step == steps:
                    self.save(checkpoints)
                self._validate(should_stop)
        finally:
            for sink in metrics:
                sink.close()
            self._trained.detach()
        return self.save_results(checkpoints)

    def _checkpointed(self) -> AbstractContextManager[None]:
        enabled, base = self.config.training.gradient_checkpointing, self._base
        return checkpointed_blocks(self._network, enabled, hold=base.hold, stash=base.stash)

    def advance(self) -> dict[str, float]:
        """One step of the optimiser.

        Returns: its numbers by column of ``metrics.csv``.
        Raises:
            DiffSynthError: the loss is not finite; nothing was changed.
        """
        begun_s, training = time.perf_counter(), self.config.training
        rate = training.learning_rate * self.config.schedule.factor(self.step, training.steps)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        moved = self._base.traffic
        self._optimiser.zero_grad(set_to_none=True)
        with self._checkpointed():
            passes = self._workers.share(training.gradient_accumulation)
            begin = self.step * training.gradient_accumulation
            own = [self._accumulate(begin + number) for number in passes]
        self._workers.add_gradients(list(self.parameters.values()))
        losses = LossMeans.merged(self._workers.gathered(LossMeans(own)))
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), training.max_grad_norm or float("inf")
        )
        if not bool(norm.isfinite()):
            raise DiffSynthError(
                f"the gradient of step {self.step + 1} is not finite",
                hint='a new run in another [output] folder: a lower learning_rate, or dtype = "float32"',
            )
        self._optimiser.step()
        self._update_mean()
        self.step += 1
        seconds = time.perf_counter() - begun_s
        now = self._base.traffic
        return {
            **losses.means(),
            "learning_rate": rate,
            "gradient_norm": float(norm),
            "seconds": seconds,
            **({} if moved is None or now is None else {"bytes_to_device": (now - moved).bytes_to_device}),
        }

    def _accumulate(self, number: int) -> BatchLoss:
        """Add the gradients of a batch, ``number`` counted from the beginning of the run."""
        folder, training = self.config.data.folder, self.config.training
        samples = [Sample.load(folder / self._entries[i].file) for i in self._plan.batch(number)]
        source = partial(random_source, training.seed, number)
        streams = self._strategy.streams(samples, source, self._device)
        loss = self._strategy.loss(self._network, streams)
        torch.autograd.backward(loss.total / training.gradient_accumulation)
        return replace(loss, total=loss.total.detach())

    def _update_mean(self) -> None:
        if not self._mean:
            return
        with torch.no_grad():  # thousands of small tensors: one by one they cost more than all at once
            new: list[Tensor] = [self.parameters[name] for name in self._mean]
            torch._foreach_lerp_(list(self._mean.values()), new, 1 - self.config.training.ema_decay)

    def _validate(self, should_stop: Callable[[], bool]) -> None:
        """Make the clips of this step, with the running mean where there is one."""
        if self._validator is None or not self._validator.missing(self.step):
            return
        record = {"output": self.config.output.folder.name, "mean": bool(self._mean)}
        with self._mean_in_place():
            self._validator.run(
                self._network, self.step, record=record, should_stop=should_stop, aside=self._base.aside
            )

    @contextmanager
    def _mean_in_place(self) -> Iterator[None]:
        """Within the ``with`` block parameters and running mean change places; nothing is copied."""
        self._change_places()
        try:
            yield
        finally:
            self._change_places()

    def _change_places(self) -> None:
        for name, value in self._mean.items():
            parameter = self.parameters[name]
            parameter.data, self._mean[name] = value, parameter.data

    def save(self, checkpoints: Checkpoints) -> None:
        """Write the state, then the results; older states are dropped last, so one is always there.

        What is there already is left alone.
        """
        if not self._workers.first or checkpoints.state(self.step).exists():
            return
        state = TrainingState.of(self.step, self.parameters, self._optimiser, self._mean)
        state.save(checkpoints.state(self.step), self._fingerprint)
        self.save_results(checkpoints)
        checkpoints.drop_older_states(self.step)

    def save_results(self, checkpoints: Checkpoints) -> Path:
        """Write what is not there yet of the result of this step and of the mean.

        Returns: the result, which the first process writes.
        """
        name, values = self._trained.name, {n: p.detach() for n, p in self.parameters.items()}
        path = checkpoints.result(name, self.step)
        if not self._workers.first:
            return path
        self._write(path, values)
        if self._mean:
            self._write(checkpoints.result(name, self.step, mean=True), self._mean)
        return path

    def _write(self, path: Path, values: Mapping[str, Tensor]) -> None:
        if path.exists():
            return
        record = {"diffsynth": __version__, "step": self.step, **_settings(self.config)}
        self._trained.save(path, values, DTYPES[self.config.output.dtype], record)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The sections that decide what is learnt."""
    sections = ("strategy", "sigmas", "lora", "training", "schedule")
    return {"trigger": config.data.trigger} | {name: asdict(getattr(config, name)) for name in sections}


def _fingerprint(
    config: TrainConfig, entries: Sequence[SampleEntry], model: Mapping[str, str]
) -> Fingerprint:
    """What must be equal for a run to go on: everything that decides its bits."""
    settings = _settings(config)
    del settings["training"]["gradient_checkpointing"]
    if config.schedule.name == ScheduleName.CONSTANT:
        del settings["training"]["steps"]  # such a run may become longer
    facts = {"model": model, "data": {"samples": [entry.file for entry in entries]}}
    return json.loads(json.dumps({**settings, **facts}))
