"""The seed's step without what it computes and throws away, and on a GPU as one CUDA graph."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import binary_cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel

from dcgan import models
from dcgan.introspection import HOOKS, why_all_called, why_called
from dcgan.kernels import ops
from dcgan.kernels.loss import bce_with_logits
from dcgan.kernels.reference import accumulator_dtype
from dcgan.training.config import Loss
from dcgan.training.graph import Backend, Cuda, Graphs
from dcgan.training.step import Result

Clip = float | tuple[float | None, float | None]
_DDP = DistributedDataParallel.__name__


class TrainStep:
    """:func:`dcgan.training.train_step`, faster: ``result = step(real, noise)`` updates D, then G.

    The mathematics is the seed's. With BCE(p, t) = -mean(t·log p + (1-t)·log(1-p)), r the real label::

        loss_d = BCE(D(x), r) + BCE(D(G(z)), 0)         D's step; G(z) detached
        loss_g = BCE(D(G(z)), r)                        G's step, through the D just updated
                 mean log(1 - D(G(z)))                  minimax

    G(z) is computed once, D runs three times (x, G(z), G(z) again once it is updated), and each of these
    updates its BatchNorms' running statistics, in this order. What differs:

    * The two halves of loss_d are differentiated one after the other, which keeps a third less memory; their
      gradients add up in ``grad`` as they would in one pass.

    * G's phase computes no gradient of D's weights, which nothing reads: D's parameters require no gradient
      meanwhile. So afterwards D's ``grad`` is what D's phase made (clipped, if told to); in the seed's loop
      G's phase has added to it.
    * Losses are computed from logits, the Sigmoid folded in (:func:`dcgan.kernels.loss.bce_with_logits`), in
      float32 (float64 for float64) whatever the networks' dtype is. They are the seed's but for rounding, and
      better where D is sure: in float32 p rounds to 1 for logits above 17, where BCELoss counts log(1-p) as
      -100 and no gradient comes through. That takes a D with a method ``logits`` beside its ``forward``, as
      all of this project's have; another D's probabilities go through BCELoss as they are.
    * On CUDA the whole step is one CUDA graph, see ``capture``.

    Networks and optimizers are the caller's and updated in place. A network may be compiled
    (``torch.compile``), parametrized, inside a wrapper, or a DistributedDataParallel, whose gradients are
    then averaged once a step; D is asked for its logits where nothing is around it. Both networks are
    expected in training mode (``train()``); in eval mode running statistics are used, and stand still. A
    parameter with ``requires_grad=False`` stays as it is. A loss that is NaN is returned as NaN.

    Nothing waits for the device: the Result's tensors do when they are read. (The exceptions are torch's: a
    GradScaler asks whether gradients are finite where the optimizer is not a fused one.)

    Args:
        generator: noise → images; reference, fast, or any other module.
        discriminator: images → probabilities, on the generator's device, of its dtype.
        optimizer_g: of all the generator's parameters that require a gradient, and no others.
        optimizer_d: of the discriminator's, likewise.
        real_label: r; the seed smooths it to 0.9.
        loss: G's loss, 'non-saturating' or 'minimax'.
        autocast: the dtype that both networks run in under ``torch.autocast``, bfloat16 or float16; None for
            no autocast but the caller's own.
        scaler: a GradScaler, for float16: both losses are scaled by its one factor, each optimizer's step is
            skipped by itself where its gradients overflow, and ``update()`` comes once, after both steps, as
            torch's page on several losses and optimizers has it. A disabled one is none.
        clip: the largest norm of a network's gradients, all taken together
            (``torch.nn.utils.clip_grad_norm_``, after unscaling): one number for both, or a pair (G's, D's),
            None for no limit.
        ema: a copy of the generator that follows it: after each step every parameter e becomes
            ``ema_decay·e + (1 - ema_decay)·p``, and buffers are copied. Its dtype may be a wider one, as 16
            bits do not hold such small steps. Or a :class:`torch.optim.swa_utils.AveragedModel` of the
            generator, updated by its own rule (after the graph, not in it).
        ema_decay: from 0 to below 1.
        capture: True: replay CUDA graphs. False: never. None: where it is possible, which takes CUDA and
            optimizers with ``capturable=True`` (``dcgan.training.optimizers(…, fused=True)`` makes them; SGD
            needs nothing), with a scaler fused ones; :attr:`why_not_captured` says what is missing.

            The first three steps with a shape of batch run eagerly and are steps like others; the fourth is
            captured. A short last batch therefore runs eagerly, until it has come three times. What the graph
            depends on is looked at before each replay (training mode, ``requires_grad``, the optimizers'
            settings, tensors replaced by others), and after a change the shape counts as new. A learning rate
            that a scheduler moves every step must hence be a tensor on the device, which replays read. What
            runs in Python during a step, hooks of modules and optimizers, runs at no replay.

            A capture that fails changes nothing. With True it is an error; with None a warning says why, and
            steps run eagerly, until something that a graph depends on changes and it is tried again.
        distributed: average the gradients of all processes of torch.distributed's default group, each of
            which calls with its share of the batch, shares of one size. Both networks are then run through
            :class:`torch.nn.parallel.DistributedDataParallel` inside, which first gives all processes rank
            0's weights and buffers; BatchNorm's running statistics are each process's own thereafter. D's
            gradients are averaged once, after both halves of loss_d, and not at all in G's phase, where D is
            run as it is. The Result is this process's. Such steps are not captured. For one BatchNorm over
            all processes, :meth:`dcgan.batchnorm.SyncBatchNorm2d.convert` the networks first.

    Raises:
        TypeError: a network, optimizer, scaler or input that is no such thing; real or noise of another dtype
            than the networks'.
        ValueError: a value out of its range; networks that differ in device or dtype; an optimizer that
            lacks its network's parameters or has others; ``capture=True`` where that is not possible;
            ``distributed=True`` without a process group; real or
            noise on another device or of unequal lengths; from BatchNorm itself, one value per channel.
        RuntimeError: with ``capture=True``, the step does what a CUDA graph cannot hold.

    Sources: Goodfellow et al., *Generative Adversarial Networks*, 2014 (algorithm 1, both losses); Salimans
    et al., *Improved Techniques for Training GANs*, 2016 (one-sided label smoothing); Yazıcı et al., *The
    Unusual Effectiveness of Averaging in GAN Training*, 2019 (EMA of G).
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        optimizer_g: Optimizer,
        optimizer_d: Optimizer,
        *,
        real_label: float = 0.9,
        loss: Loss = "non-saturating",
        autocast: torch.dtype | None = None,
        scaler: GradScaler | None = None,
        clip: Clip | None = None,
        ema: nn.Module | None = None,
        ema_decay: float = 0.999,
        capture: bool | None = None,
        distributed: bool = False,
    ) -> None:
        networks = {"generator": generator, "discriminator": discriminator}
        self._device, self._dtype = _common_place(networks)
        _check_optimizer("optimizer_g", optimizer_g, "generator", generator)
        _check_optimizer("optimizer_d", optimizer_d, "discriminator", discriminator)
        if not _is_number(real_label) or not 0 < real_label <= 1:
            raise ValueError(f"real_label must be in (0, 1], got {real_label!r}")
        if loss not in get_args(Loss):
            raise ValueError(f"loss must be one of {get_args(Loss)}, got {loss!r}")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16, got {autocast!r}")
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__qualname__}")
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        if scaler is not None and autocast != torch.float16:
            raise ValueError(f"a scaler is for autocast=torch.float16, got autocast={autocast}")
        if ema is not None:
            _check_ema(ema, generator, self._device)
        if not _is_number(ema_decay) or not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay!r}")

        if distributed and not (dist.is_available() and dist.is_initialized()):
            raise ValueError("distributed=True takes torch.distributed.init_process_group first")
        for name, network in networks.items():
            if distributed and _averaging(network):
                raise ValueError(f"distributed=True takes bare networks, but {name} is in a {_DDP}")

        self.generator, self.discriminator = generator, discriminator
        self._distributed = distributed
        self._parallel_g = _parallel(generator) if distributed else None
        self._parallel_d = _parallel(_Judge(discriminator)) if distributed else None
        self._averaging_d = _averaging(self._parallel_d or discriminator)
        self._optimizer_g, self._optimizer_d = optimizer_g, optimizer_d
        self._real_label, self._loss = float(real_label), loss
        self._autocast, self._scaler = autocast, scaler
        self._clip_g, self._clip_d = _pair_of_norms(clip)
        self._ema, self._ema_decay = ema, float(ema_decay)

        self._graphs: Graphs | None = None
        self._no_graphs = "capture=False" if capture is False else self._why_not_captured()
        if capture and self._no_graphs:
            raise ValueError(f"capture=True is not possible: {self._no_graphs}")
        if not self._no_graphs:
            self._graphs = self._on(Cuda(self._device), insist=bool(capture))

    @property
    def why_not_captured(self) -> str:
        """Why steps do not run as CUDA graphs; '' where they do, or will after the first few."""
        return self._no_graphs if self._graphs is None else self._graphs.failure

    def __call__(self, real: Tensor, noise: Tensor) -> Result:
        """One step.

        Args:
            real: the batch x, [N, channels, size, size].
            noise: z, [N, latent_dim, 1, 1], or whatever the generator takes.

        Returns:
            The losses, and the means of D(x) and D(G(z)) before D's update: tensors [], float32 (float64
            for float64), memory of their own.
        """
        self._check_input("real", real)
        self._check_input("noise", noise)
        if len(real) != len(noise):
            raise ValueError(f"real and noise must be equally many, got {len(real)} and {len(noise)}")
        if isinstance(self.generator, models.Generator):
            self.generator._latent(noise)  # before D(x) has moved D's running statistics
        real, noise = real.detach(), noise.detach()
        result = (self._graphs or self._step)(real, noise)
        if isinstance(self._ema, AveragedModel):
            self._ema.update_parameters(self.generator)
        return result

    # --- the step ---------------------------------------------------------------------------------------

    def _step(self, real: Tensor, noise: Tensor) -> Result:
        """Everything that happens on the device."""
        try:
            self._optimizer_d.zero_grad()
            self._optimizer_g.zero_grad()
            with self._not_averaged():  # with those of the other half, once
                with self._precision():
                    on_real = self._judge(real, self._parallel_d)
                loss_real, d_x = self._bce(on_real, self._real_label)
                self._backward(loss_real)  # here, so that what it keeps is gone before the next keeps as much
            with self._precision():
                fake = (self._parallel_g or self.generator)(noise)
                on_fake = self._judge(fake.detach(), self._parallel_d)
            loss_fake, d_g_z = self._bce(on_fake, 0.0)
            self._backward(loss_fake)
            loss_d = loss_real.detach() + loss_fake.detach()
            stepped = self._update(self.discriminator, self._optimizer_d, self._clip_d)

            with _requiring_no_gradient(self.discriminator), self._not_averaged():
                with self._precision():
                    on_fake = self._judge(fake)
                loss_g = self._loss_g(on_fake)
                self._backward(loss_g)
                stepped = self._update(self.generator, self._optimizer_g, self._clip_g) or stepped
        except BaseException:
            if self._scaler is not None:  # it would refuse the next step: an optimizer of this one is done
                self._scaler._per_optimizer_states.clear()
            raise
        if self._scaler is not None and stepped:
            self._scaler.update()
        if self._ema is not None and not isinstance(self._ema, AveragedModel):
            _average(self._ema, self.generator, self._ema_decay)
        return Result(loss_d.detach(), loss_g.detach(), d_x.detach(), d_g_z.detach())

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._autocast)

    def _judge(self, image: Tensor, parallel: nn.Module | None = None) -> tuple[Tensor, bool]:
        """D's logits and True, or where it has none, its probabilities and False."""
        logits = _logits(self.discriminator)
        judge = parallel or logits or self.discriminator
        return judge(image), logits is not None

    def _bce(self, judged: tuple[Tensor, bool], target: float) -> tuple[Tensor, Tensor]:
        """BCE against one target, and the mean probability; outside autocast, under which BCELoss raises."""
        values, are_logits = judged
        with torch.autocast(self._device.type, enabled=False):
            return bce_with_logits(values, target) if are_logits else _bce(values, target)

    def _loss_g(self, judged: tuple[Tensor, bool]) -> Tensor:
        if self._loss == "minimax":
            return -self._bce(judged, 0.0)[0]
        return self._bce(judged, self._real_label)[0]

    def _backward(self, loss: Tensor) -> None:
        if loss.requires_grad:  # else the network is frozen whole
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def _update(self, network: nn.Module, optimizer: Optimizer, clip: float | None) -> bool:
        """The optimizer's step; False where the network is frozen whole."""
        if not any(p.requires_grad for p in network.parameters()):
            return False
        scaler = self._scaler
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
        # Under an autocast of the caller's, the weights as cast before this step would be used after it.
        torch.clear_autocast_cache()
        return True

    @contextlib.contextmanager
    def _not_averaged(self) -> Iterator[None]:
        """D's gradients are each process's own, inside; those of G's phase never were to be averaged."""
        with contextlib.ExitStack() as stack:
            for parallel in self._averaging_d:
                stack.enter_context(parallel.no_sync())
            yield

    # --- the graph --------------------------------------------------------------------------------------

    def _why_not_captured(self) -> str:
        if self._device.type != "cuda":
            return f"the networks are on {self._device}"
        if self._distributed:
            return "gradients are averaged over several processes"
        for name, network in (("generator", self.generator), ("discriminator", self.discriminator)):
            if _averaging(network):
                return f"the {name} is in a {_DDP}"
        for name, optimizer in (("optimizer_g", self._optimizer_g), ("optimizer_d", self._optimizer_d)):
            stateless = isinstance(optimizer, SGD)
            if not all(group.get("capturable", stateless) for group in optimizer.param_groups):
                return f"{name}, {type(optimizer).__name__}, is not capturable=True"
            if self._scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
                return f"{name}, {type(optimizer).__name__}, is not fused=True, as a scaler needs it"
        return ""

    def _on(self, backend: Backend, insist: bool) -> Graphs:
        return Graphs(self._step, self._stamp, self._tensors, backend, insist)

    def _networks(self) -> list[nn.Module]:
        networks = [self.generator, self.discriminator]
        return networks if self._ema is None else [*networks, self._ema]

    def _tensors(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The parameters that get gradients, and all that a step changes."""
        parameters = [*self.generator.parameters(), *self.discriminator.parameters()]
        return parameters, [t for network in self._networks() for t in _tensors(network).values()]

    def _stamp(self) -> Hashable:
        """What a captured step depends on and its replay does not look at; told before each replay."""
        facts: list[Hashable] = [ops.engine(), *_precisions(), *_autocast_state(self._device.type)]
        for network in self._networks():
            facts += [module.training for module in network.modules()]
            for p in network.parameters():
                facts += (id(p), p.data_ptr(), p.requires_grad)
            for b in network.buffers():
                facts += (id(b), b.data_ptr())
        for optimizer in (self._optimizer_g, self._optimizer_d):
            for group in optimizer.param_groups:
                facts += [_fact(value) for value in group.values()]
            for state in optimizer.state.values():
                facts += [_fact(value) for value in state.values()]
        scaler = self._scaler
        if scaler is not None:
            facts += [scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()]
        return tuple(facts)

    def _check_input(self, name: str, given: Tensor) -> None:
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(given).__qualname__}")
        if given.dtype != self._dtype:
            raise TypeError(f"{name} must have the networks' dtype {self._dtype}, got {given.dtype}")
        if given.device != self._device:
            raise ValueError(f"{name} must be on the networks' device {self._device}, got {given.device}")
        if given.ndim < 2:
            raise ValueError(
                f"{name} must have a dimension of its own for the batch, got {list(given.shape)}"
            )


# --- pieces of the step -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _requiring_no_gradient(network: nn.Module) -> Iterator[None]:
    """None of the network's parameters does, inside; those that did, do afterwards."""
    trained = [p for p in network.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _logits(discriminator: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The discriminator's ``logits``, where calling it is to leave nothing out.

    None where the class that has its ``forward`` has no ``logits`` (a wrapper; a subclass that does something
    else), where its Sigmoid is gone, and where what is at its end or around it has hooks or is compiled.
    """
    owner = next((c for c in type(discriminator).__mro__ if "forward" in vars(c)), nn.Module)
    if "logits" not in vars(owner) or getattr(discriminator, "_compiled_call_impl", None) is not None:
        return None
    if why_all_called() or any(getattr(discriminator, hooks) for hooks in HOOKS):
        return None
    main = getattr(discriminator, "main", None)
    ours = isinstance(discriminator, models.Discriminator | models.MLPDiscriminator)
    if ours or isinstance(main, nn.Sequential):
        if why_called(main) or not isinstance(main, nn.Sequential) or not len(main):
            return None
        if why_called(main[-1]) or not isinstance(main[-1], nn.Sigmoid):
            return None
    return discriminator.logits  # type: ignore[return-value]


def _averaging(network: nn.Module) -> list[DistributedDataParallel]:
    """What in it averages gradients over processes at each backward."""
    return [module for module in network.modules() if isinstance(module, DistributedDataParallel)]


class _Judge(nn.Module):
    """The discriminator as a module whose call is what the loss is computed from."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, image: Tensor) -> Tensor:
        return (_logits(self.discriminator) or self.discriminator)(image)


def _parallel(network: nn.Module) -> DistributedDataParallel | None:
    """None for a network that is frozen whole: nothing of it is to be averaged."""
    if not any(p.requires_grad for p in network.parameters()):
        return None
    return DistributedDataParallel(network, broadcast_buffers=False)


def _bce(probabilities: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """BCELoss and the mean probability. BCELoss itself raises on NaN, on CUDA it ends the process."""
    p = probabilities.to(accumulator_dtype(probabilities.dtype))
    missing = p.isnan()
    loss = binary_cross_entropy(p.masked_fill(missing, 0.5), torch.full_like(p, target))
    return loss + (p * (p.detach() * 0)).mean(), p.mean()  # + 0, or NaN, which its gradient is then too


def _average(ema: nn.Module, generator: nn.Module, decay: float) -> None:
    with torch.no_grad():
        averages = [p.detach() for p in ema.parameters()]
        values = [p.detach().to(e.dtype) for e, p in zip(averages, generator.parameters(), strict=True)]
        torch._foreach_lerp_(averages, values, 1 - decay)
        for copied, buffer in zip(ema.buffers(), generator.buffers(), strict=True):
            copied.copy_(buffer)


# --- what a graph depends on --------------------------------------------------------------------------------


def _fact(value: Any) -> Hashable:
    """A setting, or a tensor's address; a list item by item."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if type(value) in (list, tuple):
        return tuple(map(_fact, value))
    return value if isinstance(value, int | float | str | None) else id(value)


def _precisions() -> tuple[str, ...]:
    backends: Any = torch.backends
    places = (backends, backends.cudnn, backends.cudnn.conv, backends.cuda.matmul)
    return tuple(place.fp32_precision for place in places)


def _autocast_state(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


# --- checks -------------------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pair_of_norms(clip: Clip | None) -> tuple[float | None, float | None]:
    pair = clip if isinstance(clip, tuple) else (clip, clip)
    if len(pair) != 2 or any(c is not None and not (_is_number(c) and c > 0) for c in pair):
        raise ValueError(f"clip must be None, a positive number, or a pair (G's, D's) of these, got {clip!r}")
    return pair


def _common_place(networks: dict[str, nn.Module]) -> tuple[torch.device, torch.dtype]:
    """The one device of all, and the one dtype (that of each one's first parameter)."""
    dtypes: dict[str, torch.dtype] = {}
    devices: dict[torch.device, str] = {}
    for name, network in networks.items():
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(network).__qualname__}")
        parameters = list(network.parameters())
        if not parameters:
            raise ValueError(f"{name} has no parameters to train")
        dtypes[name] = parameters[0].dtype
        for tensor in (*parameters, *network.buffers()):
            devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        found = ", ".join(f"{device} ({name})" for device, name in devices.items())
        raise ValueError(f"generator and discriminator must be on one device, got {found}")
    if dtypes["generator"] != dtypes["discriminator"]:
        found = ", ".join(f"{dtype} ({name})" for name, dtype in dtypes.items())
        raise ValueError(f"generator and discriminator must have one dtype, got {found}")
    return next(iter(devices)), dtypes["generator"]


def _check_optimizer(name: str, optimizer: Optimizer, of: str, network: nn.Module) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name} must be a torch.optim.Optimizer, got {type(optimizer).__qualname__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in network.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            f"{name} must hold every parameter of the {of} that requires a gradient, "
            f"but lacks {len(missing)}, e.g. {missing[0]}"
        )
    foreign = len(held - {id(p) for p in network.parameters()})
    if foreign:
        raise ValueError(f"{name} must hold the {of}'s parameters alone, but has {foreign} others")


def _check_ema(ema: nn.Module, generator: nn.Module, device: torch.device) -> None:
    if not isinstance(ema, nn.Module):
        raise TypeError(f"ema must be a torch.nn.Module, got {type(ema).__qualname__}")
    copied = ema.module if isinstance(ema, AveragedModel) else ema
    # By their order, as they are averaged: what is around one of the two may give names of its own.
    for own, other in itertools.zip_longest(_tensors(generator).items(), _tensors(copied).items()):
        sides = [None if of is None else (of[1].shape, of[1].is_floating_point()) for of in (other, own)]
        if sides[0] != sides[1]:
            name = (own or other)[0]
            found, wanted = ("none" if side is None else str(list(side[0])) for side in sides)
            raise ValueError(f"ema must be a copy of the generator, but {name} is {found} and not {wanted}")
    places = {value.data_ptr() for value in _tensors(generator).values() if value.numel()}
    for name, value in _tensors(copied).items():
        if value.data_ptr() in places:
            raise ValueError(f"ema must be a copy of the generator, but shares {name} with it")
        if value.device != device:
            raise ValueError(f"ema must be on the networks' device {device}, but {name} is on {value.device}")


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
