"""A run: networks, optimizers and where they are, from the first step to the last, through crashes.

:class:`Run` is what is saved and resumed; :func:`follow` drives it: when to read the losses, draw samples,
score and save. What a person sees of it is :mod:`dcgan.training.report`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from dcgan import models, pretrained
from dcgan.batchnorm import SyncBatchNorm2d
from dcgan.checkpoint import Checkpoint, CheckpointError, Folder
from dcgan.data import Images
from dcgan.devices import settled
from dcgan.errors import InputError, RunError
from dcgan.models import weights_init
from dcgan.networks import Architecture
from dcgan.training import distributed
from dcgan.training.feed import ALONE, FIXED_NOISE, SCORE_NOISE, Feed, Share, normal
from dcgan.training.fused import TrainStep
from dcgan.training.readings import NotFiniteLoss, Position, Readings, Row
from dcgan.training.settings import Settings
from dcgan.training.step import Result, optimizers
from dcgan.training.stop import Stop

SAMPLES = 64
SAMPLING_BATCH = 64
SCORED = 2048
"""Generated images that a score is of, at most."""

_GENERATORS = (models.Generator, models.MLPGenerator)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class NotFinite(RunError):
    """A network's parameter is NaN or infinite."""


class Run:
    """Networks, optimizers and position of one training run.

    Args:
        settings: the whole configuration.
        images: what it learns from.
        device: where; 'cuda' is the current GPU.
        share: this process's part of each batch.
        saved: what to go on from; None to start.

    Raises:
        InputError: settings that do not go together, or with the images or the device; a checkpoint of
            another architecture or of other images, or one that lacks what training takes.
    """

    def __init__(
        self,
        settings: Settings,
        images: Images,
        device: torch.device,
        share: Share = ALONE,
        saved: Checkpoint | None = None,
    ) -> None:
        self.settings, self.images, self.share = settings, images, share
        self.device = device = settled(device)
        self.architecture: Architecture = settings.architecture(images.channels)
        if settings.sync_batchnorm and settings.model != "dcgan":
            raise InputError(f"sync_batchnorm is for the model dcgan, got model {settings.model!r}")
        if settings.dtype == "tf32" and device.type != "cuda":
            raise InputError(f"dtype tf32 is for a GPU, got device {device.type!r}; use float32")
        self.feed = Feed(images.pixels, settings.batch_size, settings.seed, settings.nz, device, share)
        self.position = Position()
        if saved is not None:
            self._check(saved)
        self._build(start=saved is None)
        if saved is not None:
            self._restore(saved)

    def _build(self, start: bool) -> None:
        settings, device = self.settings, self.device
        torch.manual_seed(settings.seed)
        engine = settings.engine
        networks = [self.architecture.generator(engine), self.architecture.discriminator(engine)]
        for network, file in zip(networks, (settings.netG, settings.netD), strict=True):
            network.apply(weights_init)
            if start and file is not None:
                _start_from(network, Path(file))
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
            distributed=self.share.world > 1,
        )
        self.fixed_noise = normal(settings.seed, FIXED_NOISE, 0, (SAMPLES, settings.nz, 1, 1)).to(device)

    # --- training -------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.position.epoch >= self.settings.epochs

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.settings.epochs * len(self.feed)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """What the next step takes: real images and noise."""
        epoch, batch, step, _ = self.position
        return self.feed.real(epoch, batch), self.feed.noise(step, self.feed.size(batch))

    def step(self, real: Tensor, noise: Tensor) -> Result:
        """Train on what :meth:`inputs` gave, and move on. Nothing waits for the device."""
        result = self._step(real, noise)
        epoch, batch, step, images = self.position
        images += self.feed.size(batch)
        batch += 1
        if batch == len(self.feed):
            epoch, batch = epoch + 1, 0
        self.position = Position(epoch, batch, step + 1, images)
        return result

    # --- pictures -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, noise: Tensor) -> Iterator[Tensor]:
        """Images of the noise in [-1, 1], in batches, by G in eval mode, or its moving average."""
        generator = self.generator if self.ema is None else self.ema
        training = generator.training
        generator.eval()
        try:
            for z in noise.split(SAMPLING_BATCH):
                yield generator(z.to(self.device)).float()
        finally:
            generator.train(training)

    def samples(self) -> Tensor:
        """64 images of always the same noise."""
        return torch.cat(list(self.generate(self.fixed_noise)))

    # --- saving ---------------------------------------------------------------------------------------------

    def checkpoint(self, score: float | None = None) -> Checkpoint:
        """All of it, on the device; to be written before the next step.

        Raises:
            NotFinite: a parameter is not, and nothing could go on from it.
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
            score=score,
        )

    def _check(self, saved: Checkpoint) -> None:
        if saved.architecture != self.architecture:
            was, now = asdict(saved.architecture), asdict(self.architecture)
            differing = [name for name in now if was[name] != now[name]]
            raise InputError(
                f"the checkpoint is of {', '.join(f'{name}={was[name]!r}' for name in differing)}, "
                f"the run is of {', '.join(f'{name}={now[name]!r}' for name in differing)}"
            )
        if not saved.optimizer_g or not saved.optimizer_d:
            raise CheckpointError("the checkpoint has no optimizers' states, and can't be resumed")
        batches = len(self.feed)
        if saved.batch >= batches or saved.step != saved.epoch * batches + saved.batch:
            raise InputError(
                f"the run to be resumed took {saved.step} steps in {saved.epoch} epochs and {saved.batch} "
                f"batches, but there are {batches} batches an epoch now: these are other images"
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
        self.position = Position(saved.epoch, saved.batch, saved.step, saved.images)


def _restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """The state, but for what says how this device computes it: a run may go on on another one."""
    own = optimizer.state_dict()["param_groups"]
    how = ("fused", "foreign", "capturable")
    groups = [
        group | {name: mine[name] for name in how if name in mine}
        for group, mine in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})


def _start_from(network: nn.Module, file: Path) -> None:
    """The weights in the file, one of the same network."""
    from_file = pretrained.generator if isinstance(network, _GENERATORS) else pretrained.discriminator
    found = from_file(file, engine="reference")
    try:
        network.load_state_dict(found.state_dict())
    except RuntimeError as error:
        raise InputError(f"{file} does not fit the run: {error}") from error


# --- driving it ---------------------------------------------------------------------------------------------


class Watcher(Protocol):
    """Who is told how a run goes; :class:`dcgan.training.report.Report` is one."""

    def steps(self, rows: list[Row]) -> None: ...

    def samples(self, images: Tensor, position: Position) -> None: ...

    def score(self, value: float, position: Position) -> None: ...


@dataclass
class Spent:
    """Where the time went, in seconds."""

    inputs: float = 0.0
    """Waiting for batches and noise."""
    steps: float = 0.0
    """Those and the steps."""


def follow(
    run: Run,
    folder: Folder,
    watcher: Watcher | None,
    stop: Stop,
    *,
    score: Callable[[Iterator[Tensor]], float] | None = None,
    limit: int | None = None,
) -> Spent:
    """Train to the end, or until told to stop; then everything is saved. Every process calls it.

    Args:
        run: the run, at its start or resumed.
        folder: where checkpoints go.
        watcher: who is told; None for no one.
        stop: looked at after each step; with several processes whenever the losses are read.
        score: of generated images, lower is better; taken once an epoch.
        limit: steps to take at most.

    Raises:
        RunError: a loss or parameter that is not finite, naming the step and the last good checkpoint, which
            stays the last; a checkpoint that can't be written.
    """
    settings, first = run.settings, run.share.rank == 0
    spent, readings, taken = Spent(), Readings(run.device), 0

    def tell(everything: bool) -> None:
        try:
            rows = readings.read(everything)
        except NotFiniteLoss as error:
            raise RunError(f"{error}. {_last_good(folder)}") from error
        if rows and watcher is not None:
            watcher.steps(rows)

    while not run.done and not (limit is not None and taken >= limit):
        began = time.perf_counter()
        before = run.position
        real, noise = run.inputs()
        ready = time.perf_counter()
        result = run.step(real, noise)
        readings.add(before, run.position, result)
        taken += 1
        ended = run.position.batch == 0
        last = run.done or taken == limit
        saving = ended or last or _due(settings.checkpoint_interval, run.position.step)
        drawing = ended or last or _due(settings.sample_interval, run.position.step)
        reading = saving or drawing or _due(settings.log_interval, run.position.step)
        signal = stop.signal if run.share.world == 1 else 0
        if reading or signal:
            tell(everything=bool(saving or drawing or signal))
            signal = distributed.largest_of_all(stop.signal, run.device)
            if signal:
                tell(everything=True)
        now = time.perf_counter()
        spent.inputs += ready - began
        spent.steps += now - began
        if first and drawing and watcher is not None:
            watcher.samples(run.samples(), run.position)
        if first and (saving or signal):
            _save(run, folder, watcher, score if ended else None)
        if signal:
            stop.signal = signal
            break
    distributed.wait_for_all()
    return spent


def _due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _save(
    run: Run, folder: Folder, watcher: Watcher | None, score: Callable[[Iterator[Tensor]], float] | None
) -> None:
    value = None
    if score is not None:
        noise = normal(
            run.settings.seed, SCORE_NOISE, 0, (min(SCORED, len(run.images)), run.settings.nz, 1, 1)
        )
        value = score(run.generate(noise))
        if watcher is not None:  # before the checkpoint, after which nobody would tell it again
            watcher.score(value, run.position)
    try:
        folder.save(run.checkpoint(value))
    except NotFinite as error:
        raise RunError(f"{error}. {_last_good(folder)}") from error


def _last_good(folder: Folder) -> str:
    last = folder.last()
    return "There is no checkpoint yet." if last is None else f"The last good checkpoint is {last}."
