"""The training step of the reference recipe without redundant work, and on a GPU as one CUDA graph."""

from __future__ import annotations

import contextlib
import inspect
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

from dcgan import fast, models
from dcgan.errors import check_integers
from dcgan.introspection import HOOKS, plain_type, why_all_eager, why_called, why_eager
from dcgan.kernels import coverage, ops, weight_cache
from dcgan.kernels.capturing import Cuda
from dcgan.kernels.loss import bce_with_logits, grouped_bce_with_logits
from dcgan.kernels.reference import accumulator_dtype
from dcgan.training import average
from dcgan.training.augment import flipped
from dcgan.training.captured_step import Backend, Graphs
from dcgan.training.config import Loss
from dcgan.training.reference_step import Result

ONE_PASS_ENGINES = ("triton", "native")
"""Engines with which D runs on real and on generated images in one pass."""
Clip = float | tuple[float | None, float | None]
_DDP = DistributedDataParallel.__name__
_SYNCHRONIZE_BUFFERS = "forward_sync_buffers"
if _SYNCHRONIZE_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:  # PyTorch < 2.14
    _SYNCHRONIZE_BUFFERS = "broadcast_buffers"


class TrainStep:
    """:func:`dcgan.training.train_step`, faster: ``result = step(real, noise)`` updates D, then G.

    The mathematics is that of the reference recipe. With BCE(p, t) = -mean(t·log p + (1-t)·log(1-p)) and r
    the real label::

        loss_d = BCE(D(x), r) + BCE(D(G(z)), 0)         D's step; G(z) detached
        loss_g = BCE(D(G(z)), r)                        G's step, through the D just updated
                 mean log(1 - D(G(z)))                  minimax

    G(z) is computed once. D runs three times (on x, on G(z), and on G(z) again after D's update), and each
    run updates the running statistics of D's BatchNorms, in this order. The differences from the reference
    step:

    * A :class:`dcgan.fast.Discriminator` runs on x and on G(z) in one pass of twice the batch, up to 256
      images, with statistics of each half alone: small batches would leave most of a GPU idle, and on a CPU
      (native engine, float32, the same bits) one pass has less overhead than two.
      Otherwise the two halves of loss_d are backpropagated one after the other, which reduces activation
      memory by a third; their gradients accumulate in ``grad`` as they would in one backward pass.
    * G's phase does not compute weight gradients of D, which nothing reads: D's parameters have
      ``requires_grad=False`` during it. D's ``grad`` therefore holds the gradients of D's phase afterwards
      (clipped, if ``clip`` is set), whereas the reference step's G phase accumulates into it.
    * Losses are computed from logits, with the Sigmoid folded in
      (:func:`dcgan.kernels.loss.bce_with_logits`), in float32 (float64 for float64) whatever the networks'
      dtype is. They equal the reference losses up to rounding, and are more accurate where D is confident: in
      float32, p rounds to 1 for logits above 17, where BCELoss clamps log(1-p) to -100 and the gradient
      vanishes. This requires a D with a method ``logits`` in addition to ``forward``, which all networks of
      this project have; the probabilities of any other D go through BCELoss.
    * On CUDA the whole step is one CUDA graph, see ``capture``.

    Networks and optimizers belong to the caller and are updated in place. A network may be compiled
    (``torch.compile``), parametrized, wrapped in another module, or a DistributedDataParallel, whose
    gradients are then averaged once per step. D's logits are used only if nothing wraps D. Both networks are
    expected to be in training mode (``train()``); in eval mode running statistics are used and not updated. A
    parameter with ``requires_grad=False`` is not updated. A loss that is NaN is returned as NaN.

    The step does not synchronize with the device; reading the Result's tensors does. (The exception is
    torch's: with an optimizer that is not fused, a GradScaler reads back whether the gradients are finite.)

    Args:
        generator: maps noise to images; a reference network, a fast one, or any other module.
        discriminator: maps images to probabilities; on the generator's device and with its dtype.
        optimizer_g: optimizer of all generator parameters that require a gradient, and of no others.
        optimizer_d: optimizer of the discriminator's parameters, with the same requirement.
        real_label: the real label r; 0.9 in the reference recipe.
        loss: G's loss, 'non-saturating' or 'minimax'.
        autocast: dtype in which both networks run under ``torch.autocast``, bfloat16 or float16; None leaves
            autocast to the caller.
        scaler: a GradScaler, for float16. Both losses are scaled by its one factor, each optimizer's step is
            skipped independently if its gradients overflow, and ``update()`` is called once, after both
            steps, as PyTorch recommends for several losses and optimizers. A disabled scaler is ignored.
        clip: maximum norm of a network's gradients, over all its parameters
            (``torch.nn.utils.clip_grad_norm_``, after unscaling): one number for both networks, a pair (G's,
            D's), or None for no limit.
        ema: a copy of the generator that holds its exponential moving average: after each step every
            parameter e becomes ``d·e + (1 - d)·p``, with the warmed-up decay d = min(ema_decay, (1 + n)/(10 +
            n)) in step n (:class:`dcgan.training.average.MovingAverage`). Alternatively, a
            :class:`torch.optim.swa_utils.AveragedModel` of the generator, updated by its own rule (after the
            graph, not in it).
        ema_decay: decay of the moving average in the limit, in [0, 1).
        ema_updates: number of steps after which ``ema`` was saved, to continue with.
        flip: mirror each real image horizontally with probability 1/2
            (:func:`dcgan.training.augment.flipped`).
        augment: differentiable augmentation T of a batch of images in front of D, for example a
            :class:`dcgan.training.augment.DiffAugment`: D runs on T(x) and T(G(z)) instead of x and G(z) in
            both phases, with new random numbers each time.
        capture: True replays CUDA graphs, False never does, and None does if possible. Capture requires CUDA
            and optimizers with ``capturable=True`` (``dcgan.training.optimizers(…, fused=True)`` creates
            them; SGD always qualifies), and fused ones with a scaler. :attr:`why_not_captured` gives the
            reason if steps are not captured.

            The first three steps with a given batch shape run eagerly as warm-up, and are ordinary training
            steps; the fourth is captured. A short last batch therefore runs eagerly until it has occurred
            three times. Before each replay, the state that the graph depends on is checked (training mode,
            ``requires_grad``, the optimizers' settings, replaced tensors); after a change the shape starts
            over with warm-up. A learning rate that a scheduler changes every step must therefore be a tensor
            on the device, which replays read. Python code that runs during a step, such as hooks of modules
            and optimizers, does not run during a replay.

            A failed capture changes no state. With True it raises an error; with None a warning gives the
            reason, and steps run eagerly until the state that a graph depends on changes and capture is
            tried again.
        distributed: average the gradients over all processes of torch.distributed's default group. Each
            process calls the step with its share of the batch; all shares must have the same size. Both
            networks are run through an internal :class:`torch.nn.parallel.DistributedDataParallel`, which
            first broadcasts rank 0's weights and buffers; BatchNorm's running statistics are local to each
            process thereafter. D's gradients are averaged once, after both halves of loss_d, and not in G's
            phase, which calls D directly. The Result is that of this process. Such steps are not captured. To
            compute BatchNorm statistics over all processes, first convert the networks with
            :meth:`dcgan.batchnorm.SyncBatchNorm2d.convert`.

    Raises:
        TypeError: if a network, optimizer, scaler or input has the wrong type, or real or noise has another
            dtype than the networks.
        ValueError: if a value is out of range; the networks differ in device or dtype; an optimizer lacks
            parameters of its network or has others; ``capture=True`` is not possible; ``distributed=True`` is
            given without a process group; real or noise is on another device or their lengths differ; from
            BatchNorm itself, if there is only one value per channel.
        RuntimeError: with ``capture=True``, if the step cannot be captured in a CUDA graph.

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
        ema_updates: int = 0,
        flip: bool = False,
        augment: Callable[[Tensor], Tensor] | None = None,
        capture: bool | None = None,
        distributed: bool = False,
    ) -> None:
        networks = {"generator": generator, "discriminator": discriminator}
        self._device, self._dtype = _common_device_and_dtype(networks)
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
            raise ValueError(f"scaler requires autocast=torch.float16, got autocast={autocast}")
        if ema is not None:
            average.check(ema, generator, self._device)
        if not _is_number(ema_decay) or not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay!r}")
        check_integers(0, ValueError, ema_updates=ema_updates)
        if augment is not None and not callable(augment):
            raise TypeError(f"augment must be callable or None, got {type(augment).__qualname__}")

        if distributed and not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "distributed=True requires a process group: call torch.distributed.init_process_group first"
            )
        for name, network in networks.items():
            if distributed and _ddp_modules(network):
                raise ValueError(f"distributed=True takes bare networks, but {name} is in a {_DDP}")

        self.generator, self.discriminator = generator, discriminator
        self._distributed = distributed
        self._ddp_g = _wrap_in_ddp(generator) if distributed else None
        self._ddp_d = _wrap_in_ddp(_LossInput(discriminator)) if distributed else None
        self._ddp_modules_d = _ddp_modules(self._ddp_d or discriminator)
        self._optimizer_g, self._optimizer_d = optimizer_g, optimizer_d
        self._real_label, self._loss = float(real_label), loss
        self._autocast, self._scaler = autocast, scaler
        self._clip_g, self._clip_d = _clip_pair(clip)
        self._ema, self._moving_average = ema, None
        if ema is not None and not isinstance(ema, AveragedModel):
            self._moving_average = average.MovingAverage(ema, generator, float(ema_decay), ema_updates)
        self._flip, self._augment = flip, augment or _unchanged

        self._one = torch.ones((), device=self._device)
        self._graphs: Graphs | None = None
        self._not_captured_reason = "capture=False" if capture is False else self._why_not_captured()
        if capture and self._not_captured_reason:
            raise ValueError(f"capture=True is not possible: {self._not_captured_reason}")
        if not self._not_captured_reason:
            self._graphs = self._on(Cuda(self._device), raise_on_failure=bool(capture))

    @property
    def why_not_captured(self) -> str:
        """The reason why steps do not run as CUDA graphs; '' if they do, or will after warm-up."""
        return self._not_captured_reason if self._graphs is None else self._graphs.failure

    def __call__(self, real: Tensor, noise: Tensor) -> Result:
        """Take one training step.

        Args:
            real: the batch x, [N, channels, size, size].
            noise: z, [N, latent_dim, 1, 1], or whatever shape the generator takes.

        Returns:
            The losses, and the means of D(x) and D(G(z)) before D's update: tensors of shape [], float32
            (float64 for float64), that later steps do not overwrite.
        """
        self._check_input("real", real)
        self._check_input("noise", noise)
        if len(real) != len(noise):
            raise ValueError(f"real and noise must have the same length, got {len(real)} and {len(noise)}")
        if isinstance(self.generator, models.Generator):
            self.generator._latent(noise)  # validate before D(x) updates D's running statistics
        real, noise = real.detach(), noise.detach()
        result = (self._graphs or self._step)(real, noise)
        if isinstance(self._ema, AveragedModel):
            self._ema.update_parameters(self.generator)
        return result

    # --- the step ---------------------------------------------------------------------------------------

    def _step(self, real: Tensor, noise: Tensor) -> Result:
        """Run the whole step on the device."""
        try:
            self._optimizer_d.zero_grad()
            self._optimizer_g.zero_grad()
            real = flipped(real) if self._flip else real
            fake, loss_d, d_x, d_g_z = self._differentiate_d(real, noise)
            updated = self._update(self.discriminator, self._optimizer_d, self._clip_d)

            with _frozen_parameters(self.discriminator), self._no_averaging():
                with self._autocast_context():
                    output_fake = self._discriminate(self._augment(fake))
                loss_g = self._loss_g(output_fake)
                self._backward(loss_g)
                updated = self._update(self.generator, self._optimizer_g, self._clip_g) or updated
        except BaseException:
            if self._scaler is not None:  # else it rejects the next step, as one optimizer has updated
                self._scaler._per_optimizer_states.clear()
            raise
        if self._scaler is not None and updated:
            self._scaler.update()
        if self._moving_average is not None:
            self._moving_average.update()
        return Result(loss_d.detach(), loss_g.detach(), d_x.detach(), d_g_z.detach())

    def _differentiate_d(self, real: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the gradients of loss_d; return G(z), loss_d, and the means of D(x) and D(G(z))."""
        discriminator = self._discriminator_of_both(real)
        if discriminator is not None:
            with self._autocast_context():
                fake = self.generator(noise)
                both = self._augment(_concatenated(real, fake.detach()))
                logits = discriminator.logits_of_groups(both, 2)
            with torch.autocast(self._device.type, enabled=False):
                losses, means = grouped_bce_with_logits(logits, [self._real_label, 0.0])
            loss_d = losses.sum()
            self._backward(loss_d)
            return fake, loss_d.detach(), means[0], means[1]
        with weight_cache.constant_weights(self.discriminator.parameters()):
            with self._no_averaging():  # averaged once, together with the other half
                with self._autocast_context():
                    output_real = self._discriminate(self._augment(real), self._ddp_d)
                loss_real, d_x = self._bce(output_real, self._real_label)
                # Now, to free its activations before the other half allocates its own.
                self._backward(loss_real)
            with self._autocast_context():
                fake = (self._ddp_g or self.generator)(noise)
                output_fake = self._discriminate(self._augment(fake.detach()), self._ddp_d)
            loss_fake, d_g_z = self._bce(output_fake, 0.0)
            self._backward(loss_fake)
        return fake, loss_real.detach() + loss_fake.detach(), d_x, d_g_z

    def _discriminator_of_both(self, real: Tensor) -> fast.Discriminator | None:
        """Return the discriminator if it runs on real and on generated images in one pass.

        The native engine's result has the same bits as that of two passes: it runs the halves one after the
        other, and adds up their gradients as autograd would. The reference's has not.
        """
        found = self.discriminator
        if self._distributed or len(real) > coverage.MAX_IMAGES_TOGETHER:
            return None
        own = fast.Discriminator.logits  # unless it has been overridden, in a subclass or on the instance
        if not isinstance(found, fast.Discriminator) or getattr(_logits(found), "__func__", None) is not own:
            return None
        with self._autocast_context():
            return found if found.engine_of_groups(real, 1) in ONE_PASS_ENGINES else None

    def _autocast_context(self) -> contextlib.AbstractContextManager[object]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._autocast)

    def _discriminate(self, image: Tensor, parallel: nn.Module | None = None) -> tuple[Tensor, bool]:
        """Return D's logits and True, or if it has none, its probabilities and False."""
        logits = _logits(self.discriminator)
        module = parallel or logits or self.discriminator
        return module(image), logits is not None

    def _bce(self, output: tuple[Tensor, bool], target: float) -> tuple[Tensor, Tensor]:
        """Return BCE against one target, and the mean probability; outside autocast, where BCELoss raises."""
        values, are_logits = output
        with torch.autocast(self._device.type, enabled=False):
            return bce_with_logits(values.flatten(), target) if are_logits else _bce(values, target)

    def _loss_g(self, output: tuple[Tensor, bool]) -> Tensor:
        if self._loss == "minimax":
            return -self._bce(output, 0.0)[0]
        return self._bce(output, self._real_label)[0]

    def _backward(self, loss: Tensor) -> None:
        if loss.requires_grad:  # else the whole network is frozen
            loss = loss if self._scaler is None else self._scaler.scale(loss)
            loss.backward(self._one.to(loss.dtype))  # backward() alone would launch a kernel that makes a 1

    def _update(self, network: nn.Module, optimizer: Optimizer, clip: float | None) -> bool:
        """Take the optimizer's step; return False if the whole network is frozen."""
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
        # Under the caller's autocast, weights cast before this update would otherwise be reused after it.
        torch.clear_autocast_cache()
        return True

    @contextlib.contextmanager
    def _no_averaging(self) -> Iterator[None]:
        """Disable the averaging of D's gradients inside; those of G's phase are never averaged."""
        with contextlib.ExitStack() as stack:
            for parallel in self._ddp_modules_d:
                stack.enter_context(parallel.no_sync())
            yield

    # --- the graph --------------------------------------------------------------------------------------

    def _why_not_captured(self) -> str:
        if self._device.type != "cuda":
            return f"the networks are on {self._device}"
        if self._distributed:
            return "gradients are averaged over several processes"
        for name, network in (("generator", self.generator), ("discriminator", self.discriminator)):
            if _ddp_modules(network):
                return f"the {name} is in a {_DDP}"
        for name, optimizer in (("optimizer_g", self._optimizer_g), ("optimizer_d", self._optimizer_d)):
            stateless = isinstance(optimizer, SGD)
            if not all(group.get("capturable", stateless) for group in optimizer.param_groups):
                return f"{name}, {type(optimizer).__name__}, is not capturable=True"
            if self._scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
                return f"{name}, {type(optimizer).__name__}, is not fused=True, which a scaler requires"
        return ""

    def _on(self, backend: Backend, raise_on_failure: bool) -> Graphs:
        return Graphs(self._step, self._fingerprint, self._tensors, backend, raise_on_failure)

    def _networks(self) -> list[nn.Module]:
        networks = [self.generator, self.discriminator]
        return networks if self._ema is None else [*networks, self._ema]

    def _tensors(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the parameters that receive gradients, and all tensors that a step changes in place."""
        parameters = [*self.generator.parameters(), *self.discriminator.parameters()]
        changed = [t for network in self._networks() for t in _tensors(network).values()]
        if self._moving_average is not None:
            changed.append(self._moving_average.updates)
        return parameters, changed

    def _fingerprint(self) -> Hashable:
        """Return the state that a captured step bakes in, to compare before each replay."""
        items: list[Hashable] = [ops.engine(), *_fp32_precisions(), *_autocast_state(self._device.type)]
        for network in self._networks():
            items += [module.training for module in network.modules()]
            for p in network.parameters():
                items += (id(p), p.data_ptr(), p.requires_grad)
            for b in network.buffers():
                items += (id(b), b.data_ptr())
        for optimizer in (self._optimizer_g, self._optimizer_d):
            for group in optimizer.param_groups:
                items += [_hashable(value) for value in group.values()]
            for state in optimizer.state.values():
                items += [_hashable(value) for value in state.values()]
        scaler = self._scaler
        if scaler is not None:
            items += [scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()]
        return tuple(items)

    def _check_input(self, name: str, given: Tensor) -> None:
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(given).__qualname__}")
        if given.dtype != self._dtype:
            raise TypeError(f"{name} must have the networks' dtype {self._dtype}, got {given.dtype}")
        if given.device != self._device:
            raise ValueError(f"{name} must be on the networks' device {self._device}, got {given.device}")
        if given.ndim < 2:
            raise ValueError(
                f"{name} must have a batch dimension and at least one more, got shape {list(given.shape)}"
            )


# --- parts of the step --------------------------------------------------------------------------------------


def _concatenated(real: Tensor, fake: Tensor) -> Tensor:
    """Return real and generated images as one batch, in the latter's dtype, which autocast may choose."""
    if real.shape != fake.shape:
        raise ValueError(
            f"real must be {list(fake.shape)}, as the generator's images, got {list(real.shape)}"
        )
    both = fake.new_empty((2 * len(fake), *fake.shape[1:]))
    both[: len(real)].copy_(real)
    both[len(real) :].copy_(fake)
    return both


@contextlib.contextmanager
def _frozen_parameters(network: nn.Module) -> Iterator[None]:
    """Set requires_grad=False on all parameters inside, and restore those that required gradients."""
    trained = [p for p in network.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _logits(discriminator: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the discriminator's ``logits`` if calling it is equivalent to calling the discriminator.

    Return None if the class that defines its ``forward`` does not also define ``logits`` (a wrapper; a
    subclass with another ``forward``), if ``forward`` has been replaced on the instance, if its final Sigmoid
    has been replaced, if the discriminator or its last layers have hooks, or if it is compiled.
    """
    if "forward" in vars(discriminator):
        return None
    owner = next((c for c in type(discriminator).__mro__ if "forward" in vars(c)), nn.Module)
    if "logits" not in vars(owner) or getattr(discriminator, "_compiled_call_impl", None) is not None:
        return None
    if why_all_eager() or any(getattr(discriminator, hooks) for hooks in HOOKS):
        return None
    main = getattr(discriminator, "main", None)
    ours = isinstance(discriminator, models.Discriminator | models.MLPDiscriminator)
    if ours or isinstance(main, nn.Sequential):
        if not isinstance(main, nn.Sequential) or plain_type(main) is not nn.Sequential or not len(main):
            return None
        if why_called(main):
            return None
        if why_eager(main[-1]) or not isinstance(main[-1], nn.Sigmoid):
            return None
    return discriminator.logits  # type: ignore[return-value]


def _ddp_modules(network: nn.Module) -> list[DistributedDataParallel]:
    """Return the DistributedDataParallel modules in it, which average gradients in each backward pass."""
    return [module for module in network.modules() if isinstance(module, DistributedDataParallel)]


class _LossInput(nn.Module):
    """The discriminator as a module that returns what the loss is computed from: logits if it has them."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, image: Tensor) -> Tensor:
        return (_logits(self.discriminator) or self.discriminator)(image)


def _wrap_in_ddp(network: nn.Module) -> DistributedDataParallel | None:
    """Wrap the network in DistributedDataParallel; None if it is fully frozen: it has no gradients."""
    if not any(p.requires_grad for p in network.parameters()):
        return None
    options: dict[str, Any] = {_SYNCHRONIZE_BUFFERS: False}
    return DistributedDataParallel(network, **options)


def _bce(probabilities: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Return BCELoss and the mean probability; NaN gives NaN, where BCELoss raises, or on CUDA aborts."""
    p = probabilities.to(accumulator_dtype(probabilities.dtype))
    missing = p.isnan()
    loss = binary_cross_entropy(p.masked_fill(missing, 0.5), torch.full_like(p, target))
    # The added term is 0, or NaN for a NaN input, also in the gradient.
    return loss + (p * (p.detach() * 0)).mean(), p.mean()


def _unchanged(images: Tensor) -> Tensor:
    return images


# --- graph fingerprint --------------------------------------------------------------------------------------


def _hashable(value: Any) -> Hashable:
    """Return a hashable stand-in for a value: a tensor's address, or for a list those of its items."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if type(value) in (list, tuple):
        return tuple(map(_hashable, value))
    return value if isinstance(value, int | float | str | None) else id(value)


def _fp32_precisions() -> tuple[str, ...]:
    backends: Any = torch.backends
    scopes = (backends, backends.cudnn, backends.cudnn.conv, backends.cuda.matmul)
    return tuple(scope.fp32_precision for scope in scopes)


def _autocast_state(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


# --- checks -------------------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _clip_pair(clip: Clip | None) -> tuple[float | None, float | None]:
    pair = clip if isinstance(clip, tuple) else (clip, clip)
    if len(pair) != 2 or any(c is not None and not (_is_number(c) and c > 0) for c in pair):
        raise ValueError(f"clip must be None, a positive number, or a pair (G's, D's) of these, got {clip!r}")
    return pair


def _common_device_and_dtype(networks: dict[str, nn.Module]) -> tuple[torch.device, torch.dtype]:
    """Return the device of all tensors and the dtype of the networks (that of their first parameters)."""
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
        raise ValueError(f"generator and discriminator must be on the same device, got {found}")
    if dtypes["generator"] != dtypes["discriminator"]:
        found = ", ".join(f"{dtype} ({name})" for name, dtype in dtypes.items())
        raise ValueError(f"generator and discriminator must have the same dtype, got {found}")
    return next(iter(devices)), dtypes["generator"]


def _check_optimizer(name: str, optimizer: Optimizer, of: str, network: nn.Module) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name} must be a torch.optim.Optimizer, got {type(optimizer).__qualname__}")
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in network.named_parameters() if p.requires_grad and id(p) not in owned]
    if missing:
        raise ValueError(
            f"{name} must hold every parameter of the {of} that requires a gradient, "
            f"but lacks {len(missing)}, e.g. {missing[0]}"
        )
    foreign = len(owned - {id(p) for p in network.parameters()})
    if foreign:
        raise ValueError(f"{name} must hold only parameters of the {of}, but has {foreign} others")


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
