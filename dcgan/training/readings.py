"""What steps have measured, read while the device goes on with later ones."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch

from dcgan.errors import RunError
from dcgan.training import distributed
from dcgan.training.step import Result

AHEAD = {"cuda": 4}
"""Steps that such a device has been given after the one that is read: its work while a person is told."""


class Position(NamedTuple):
    """Where a run is: epochs that are complete, batches of the next one, steps and images in all."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0


class Row(NamedTuple):
    """What one step measured, read."""

    step: int
    epoch: int
    """From 1, as all that a person reads."""
    batch: int
    images: int
    loss_d: float
    loss_g: float
    d_x: float
    d_g_z: float


class NotFiniteLoss(RunError):
    """A loss is NaN or infinite; says of which step."""


class _Unread(NamedTuple):
    before: Position
    after: Position
    result: Result
    done: torch.cuda.Event | None
    """The device is through with it."""


class Readings:
    """The results of steps, until they are read.

    To read a result is to wait for the device, and a device that is waited for runs dry while what was read
    is written down. So on a GPU the last :data:`AHEAD` steps are left for the next reading, and the others
    are read on a stream of their own, which does not wait for these.

    Args:
        device: where the results are.
    """

    def __init__(self, device: torch.device) -> None:
        self._ahead = AHEAD.get(device.type, 0)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._unread: list[_Unread] = []

    def add(self, before: Position, after: Position, result: Result) -> None:
        """A step that went from one position to the next."""
        done = None
        if self._stream is not None:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._stream.device))
        self._unread.append(_Unread(before, after, result, done))

    def read(self, everything: bool) -> list[Row]:
        """The steps that have not been read, in order; on a GPU without the last few, unless ``everything``.

        With several processes each calls it at the same steps, and gets the means over all.

        Raises:
            NotFiniteLoss: a loss is not finite.
        """
        count = len(self._unread) - (0 if everything else self._ahead)
        if count <= 0:
            return []
        now, self._unread = self._unread[:count], self._unread[count:]
        with self._beside(now[-1]):
            values = torch.stack([torch.stack(unread.result) for unread in now])
            means = distributed.mean_of_all(values).tolist()
        rows = [
            Row(after.step, before.epoch + 1, before.batch + 1, after.images, *four)
            for (before, after, *_), four in zip(now, means, strict=True)
        ]
        for row in rows:
            for name in ("loss_d", "loss_g"):
                value = getattr(row, name)
                if not math.isfinite(value):
                    where = f"step {row.step} (epoch {row.epoch}, batch {row.batch})"
                    raise NotFiniteLoss(f"{name} is {value} at {where}")
        return rows

    def _beside(self, last: _Unread) -> contextlib.AbstractContextManager[object]:
        """On the stream of its own, once the device is through with ``last``."""
        if self._stream is None or last.done is None:
            return contextlib.nullcontext()
        self._stream.wait_event(last.done)
        return torch.cuda.stream(self._stream)
