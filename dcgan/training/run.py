"""Training runs: networks, optimizers and position, which survive interruptions and crashes.

:class:`Run` holds the state that is saved and resumed. :func:`follow` drives it: it decides when to read the
losses, generate samples, score and save. :mod:`dcgan.training.report` presents a run to the user.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from dcgan import pretrained
from dcgan.batchnorm import SyncBatchNorm2d
from dcgan.checkpoint import Checkpoint, CheckpointError, Folder
from dcgan.data import Images
from dcgan.devices import resolve
from dcgan.errors import InputError, RunError
from dcgan.foreign import Foreign, Sampler, shaped
from dcgan.models import weights_init
from dcgan.networks import Architecture
from dcgan.settings import Settings
from dcgan.state_dicts import Network
from dcgan.training import distributed
from dcgan.training.augment import DiffAugment
from dcgan.training.fast_step import TrainStep
from dcgan.training.feed import FIXED_NOISE, SINGLE_PROCESS, Feed, Share, normal
from dcgan.training.loss_readback import NotFiniteLoss, Position, ResultQueue, Row
from dcgan.training.reference_step import Result, optimizers
from dcgan.training.stop import Stop

SAMPLES = 64
MAX_SILENCE = 1.0
"""Seconds after which losses are read before ``log_interval`` steps are over, so that slow runs show life."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class NotFinite(RunError):
    """A network parameter is NaN or infinite."""


class Run:
    """The networks, optimizers and position of one training run.

    Args:
        settings: the run's settings.
        images: the training images.
        device: the device to train on; 'cuda' is the current GPU.
        share: this process's share of each batch.
        saved: the checkpoint to resume from; None to start a new run.

    Raises:
        InputError: if settings conflict with each other, the images or the device; if the checkpoint belongs
            to another architecture or dataset, or lacks the state that training needs.
    """

    def __init__(
        self,
        settings: Settings,
        images: Images,
        device: torch.device,
        share: Share = SINGLE_PROCESS,
        saved: Checkpoint | None = None,
    ) -> None:
        self.settings, self.images, self.share = settings, images, share
        self.device = device = resolve(device)
        self.architecture: Architecture = settings.architecture(images.channels)
        foreign = self.architecture.foreign_g, self.architecture.foreign_d
        if settings.sync_batchnorm and settings.model != "dcgan" and foreign == (None, None):
            raise InputError(f"sync_batchnorm requires model dcgan, got model {settings.model!r}")
        if settings.dtype == "tf32" and device.type != "cuda":
            raise InputError(f"dtype tf32 requires a GPU, got device {device.type!r}; use float32")
        self.feed = Feed(images.pixels, settings.batch_size, settings.seed, settings.nz, device, share)
        self.position = Position()
        if saved is not None:
            self._check(saved)
            self.position = Position(saved.epoch, saved.batch, saved.step, saved.images)
        self._build(start=saved is None)
        if saved is not None:
            self._restore(saved)

    def _build(self, start: bool) -> None:
        settings, device = self.settings, self.device
        torch.manual_seed(settings.seed)
        engine = settings.engine
        networks = [self.architecture.generator(engine), self.architecture.discriminator(engine)]
        names: tuple[Network, Network] = ("generator", "discriminator")
        foreign = self.architecture.foreign_g, self.architecture.foreign_d
        files = settings.netG, settings.netD
        for name, network, own, file in zip(names, networks, foreign, files, strict=True):
            if own is None:
                network.apply(weights_init)
            if start and file is not None:
                _load_initial_weights(network, name, own, Path(file))
        self.ema: nn.Module | None = None
        if settings.ema is not None:
            self.ema = self.architecture.generator(engine)
            self.ema.load_state_dict(networks[0].state_dict())
            self.ema.to(device).eval().requires_grad_(False)
        if settings.sync_batchnorm:
            networks = [SyncBatchNorm2d.convert(network) for network in networks]
        self.generator, self.discriminator = (network.to(device).train() for network in networks)
        self.optimizer_g, self.optimizer_d = optimizers(
            self.generator, self.discriminator, settings.config(), fused=True
        )
        if settings.compile:
            self.generator.compile()
            self.discriminator.compile()
        self.scaler = GradScaler(device.type) if settings.dtype == "float16" else None
        if settings.dtype == "tf32":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
        self._step = TrainStep(
            self.generator,
            self.discriminator,
            self.optimizer_g,
            self.optimizer_d,
            real_label=1 - settings.label_smoothing,
            loss=settings.loss,
            autocast=DTYPES.get(settings.dtype),
            scaler=self.scaler,
            clip=settings.clip,
            ema=self.ema,
            ema_decay=0.999 if settings.ema is None else settings.ema,
            ema_updates=self.position.step,
            flip=settings.flip,
            augment=None if settings.diffaugment is None else DiffAugment(settings.diffaugment),
            distributed=self.share.world > 1,
        )
        self.fixed_noise = normal(settings.seed, FIXED_NOISE, 0, (SAMPLES, settings.nz, 1, 1)).to(device)

    # --- training -------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.position.epoch >= self.settings.epochs

    @property
    def steps(self) -> int:
        """Total number of steps of the run."""
        return self.settings.epochs * len(self.feed)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return the inputs of the next step: real images and noise."""
        epoch, batch, step, _ = self.position
        noise = self.feed.noise(step, self.feed.size(batch))
        return self.feed.real(epoch, batch), shaped(self.generator, noise)

    def step(self, real: Tensor, noise: Tensor) -> Result:
        """Take one step on these inputs and advance the position; does not wait for the device."""
        try:
            result = self._step(real, noise)
        except RuntimeError as error:  # of BCELoss on a CPU
            foreign = self.architecture.foreign_d
            if foreign is None or "between 0 and 1" not in str(error):
                raise
            raise foreign.not_probabilities("--netD-module") from error
        epoch, batch, step, images = self.position
        images += self.feed.size(batch)
        batch += 1
        if batch == len(self.feed):
            epoch, batch = epoch + 1, 0
        self.position = Position(epoch, batch, step + 1, images)
        return result

    # --- samples --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def sampler(self) -> Iterator[Sampler]:
        """Return G, or its moving average if there is one, in eval mode inside: z [N, nz] → images."""
        generator = self.generator if self.ema is None else self.ema
        training = generator.training
        try:
            yield Sampler(generator, self.settings.nz)  # puts it into eval mode
        finally:
            generator.train(training)

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Return 64 images in [-1, 1], generated from the fixed noise."""
        with self.sampler() as generator:
            images: Tensor = generator(self.fixed_noise)
            return images.float()

    # --- saving ---------------------------------------------------------------------------------------------

    def checkpoint(self, scored: Scored | None = None) -> Checkpoint:
        """Return a checkpoint of the run. Its tensors are not copied: write it before the next step.

        Raises:
            NotFinite: if a parameter is not finite; such a checkpoint would be of no use.
        """
        for name, network in (("generator", self.generator), ("discriminator", self.discriminator)):
            for parameter, value in network.named_parameters():
                if not bool(torch.isfinite(value).all()):
                    raise NotFinite(f"the {name}'s {parameter} is not finite after step {self.position.step}")
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(
            architecture=self.architecture,
            generator=self.generator.state_dict(),
            discriminator=self.discriminator.state_dict(),
            optimizer_g=self.optimizer_g.state_dict(),
            optimizer_d=self.optimizer_d.state_dict(),
            ema=None if self.ema is None else self.ema.state_dict(),
            scaler=None if self.scaler is None else self.scaler.state_dict(),
            **self.position._asdict(),
            random=random,
            config=self.settings.to_dict(),
            dataset_size=len(self.images),
            score=None if scored is None else scored.score,
            score_name=Checkpoint.score_name if scored is None else scored.name,
        )

    def _check(self, saved: Checkpoint) -> None:
        if saved.architecture != self.architecture:
            was, now = vars(saved.architecture), vars(self.architecture)
            differing = [name for name in now if was[name] != now[name]]
            raise InputError(
                f"the checkpoint has {', '.join(f'{name}={was[name]!r}' for name in differing)}, "
                f"the run has {', '.join(f'{name}={now[name]!r}' for name in differing)}"
            )
        if not saved.optimizer_g or not saved.optimizer_d:
            raise CheckpointError("the checkpoint has no optimizer states and cannot be resumed")
        batches = len(self.feed)
        if saved.batch >= batches or saved.step != saved.epoch * batches + saved.batch:
            raise InputError(
                f"the run to be resumed took {saved.step} steps in {saved.epoch} epochs and {saved.batch} "
                f"batches, but an epoch has {batches} batches now: the dataset has changed"
            )
        if saved.dataset_size not in (0, len(self.images)):
            raise InputError(
                f"the run to be resumed was trained on {saved.dataset_size} images, but the dataset has "
                f"{len(self.images)} now"
            )

    def _restore(self, saved: Checkpoint) -> None:
        self.generator.load_state_dict(saved.generator)
        self.discriminator.load_state_dict(saved.discriminator)
        _restore_optimizer(self.optimizer_g, saved.optimizer_g)
        _restore_optimizer(self.optimizer_d, saved.optimizer_d)
        if self.ema is not None and saved.ema is not None:
            self.ema.load_state_dict(saved.ema)
        if self.scaler is not None and saved.scaler is not None:
            self.scaler.load_state_dict(saved.scaler)
        torch.set_rng_state(saved.random["cpu"])
        if self.device.type == "cuda" and "cuda" in saved.random:
            torch.cuda.set_rng_state(saved.random["cuda"], self.device)


def _restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore the state, but keep the implementation flags: a run may resume on another kind of device."""
    own = optimizer.state_dict()["param_groups"]
    how = ("fused", "foreign", "capturable")
    groups = [
        group | {name: new_group[name] for name in how if name in new_group}
        for group, new_group in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})


def _load_initial_weights(network: nn.Module, name: Network, foreign: Foreign | None, path: Path) -> None:
    """Load initial weights from a model file of the same architecture."""
    option = "netG" if name == "generator" else "netD"
    if foreign is not None:
        state, file = pretrained.state_of_foreign(path, name)
        pretrained.load_foreign(network, state, file, name, foreign)
        return
    try:
        found = pretrained.read(path, name)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    if found.foreign is not None:
        raise InputError(f"{option}: {path} holds a network of your own, {found.foreign.spec}")
    try:
        network.load_state_dict(found.module("reference").state_dict())
    except RuntimeError as error:
        raise InputError(f"{option}: {path} does not fit the run: {error}") from error


# --- training loop ------------------------------------------------------------------------------------------


Values = Mapping[str, float | int | str]


class Scored(NamedTuple):
    """A score of the Generator, lower is better, and all values that were measured with it.

    ``name`` says what the score is; scores with different names are not compared.
    """

    name: str
    score: float
    values: Values


Score = Callable[["Run"], Scored | None]
"""Scores a run's Generator at the end of an epoch; None if no score is due."""


class Watcher(Protocol):
    """Receives a run's progress; :class:`dcgan.training.report.Report` is one."""

    def steps(self, rows: list[Row]) -> None: ...

    def samples(self, images: Tensor, position: Position) -> None: ...

    def scores(self, values: Values, position: Position) -> None: ...

    def saved(self) -> None: ...


@dataclass
class LoopTime:
    """Time spent in the loop, in seconds."""

    inputs: float = 0.0
    """Time to prepare batches and noise on the host."""
    steps: float = 0.0
    """Total time of the steps, inputs included."""


def follow(
    run: Run,
    folder: Folder,
    watcher: Watcher | None,
    stop: Stop,
    *,
    score: Score | None = None,
    limit: int | None = None,
) -> LoopTime:
    """Train to the end or until asked to stop, and save the run. Every process must call it.

    The first steps are reported one by one, and those after them every second at least.

    Args:
        run: the run, new or resumed.
        folder: the folder of the checkpoints.
        watcher: receives the progress; None for no reports.
        stop: checked after each step, or with several processes whenever the losses are read.
        score: scores the Generator, called once per epoch.
        limit: maximum number of steps to take.

    Raises:
        RunError: if a loss or parameter is not finite (the message names the step and the last good
            checkpoint, which stays the last), or a checkpoint cannot be written.
    """
    settings, first = run.settings, run.share.rank == 0
    spent, unread, taken = LoopTime(), ResultQueue(run.device), 0

    def report_rows(everything: bool) -> None:
        try:
            rows = unread.read(everything)
        except NotFiniteLoss as error:
            raise RunError(f"{error}. {_last_good(folder)}") from error
        if rows and watcher is not None:
            watcher.steps(rows)

    if first and watcher is not None and run.position.step == 0 and not run.done:
        watcher.samples(run.samples(), run.position)
    reported = -math.inf
    while not run.done and not (limit is not None and taken >= limit):
        began = time.perf_counter()
        before = run.position
        real, noise = run.inputs()
        ready = time.perf_counter()
        result = run.step(real, noise)
        unread.add(before, run.position, result)
        taken += 1
        ended = run.position.batch == 0
        last = run.done or taken == limit
        saving = ended or last or _due(settings.checkpoint_interval, run.position.step)
        sampling = ended or last or _due(settings.sample_interval, run.position.step)
        quiet = run.share.world == 1 and ready - reported > MAX_SILENCE
        reading = saving or sampling or quiet or _due(settings.log_interval, run.position.step)
        signal = stop.signal if run.share.world == 1 else 0
        if reading or signal:
            reported = ready
            report_rows(everything=bool(saving or sampling or signal))
            signal = distributed.max_over_processes(stop.signal, run.device)
            if signal:
                report_rows(everything=True)
        now = time.perf_counter()
        spent.inputs += ready - began
        spent.steps += now - began
        if first and sampling and watcher is not None:
            watcher.samples(run.samples(), run.position)
        if first and (saving or signal):
            _save(run, folder, watcher, score if ended else None)
        if signal:
            stop.signal = signal
            break
    distributed.barrier()
    return spent


def _due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _save(run: Run, folder: Folder, watcher: Watcher | None, score: Score | None) -> None:
    scored = None if score is None else score(run)
    if scored is not None and watcher is not None:  # before saving: once saved, it is not computed again
        watcher.scores(scored.values, run.position)
    try:
        folder.save(run.checkpoint(scored))
        if watcher is not None:
            watcher.saved()
    except NotFinite as error:
        raise RunError(f"{error}. {_last_good(folder)}") from error


def _last_good(folder: Folder) -> str:
    last = folder.last()
    return "There is no checkpoint yet." if last is None else f"The last good checkpoint is {last}."
