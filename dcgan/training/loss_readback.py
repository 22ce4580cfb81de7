"""Asynchronous readback of step results, while the device runs later steps."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch

from dcgan.errors import RunError
from dcgan.training import distributed
from dcgan.training.reference_step import Result

STEPS_IN_FLIGHT = {"cuda": 4}
"""Steps left unread by device type, so that the device has queued work while the host reports."""


class Position(NamedTuple):
    """Position of a run: completed epochs, batches of the next one, and total steps and images."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0


class Row(NamedTuple):
    """The result of one step as Python numbers."""

    step: int
    epoch: int
    """Counted from 1, like ``batch``."""
    batch: int
    images: int
    loss_d: float
    loss_g: float
    d_x: float
    d_g_z: float


class NotFiniteLoss(RunError):
    """A loss is NaN or infinite; the message names the step."""


class _Unread(NamedTuple):
    before: Position
    after: Position
    result: Result
    done: torch.cuda.Event | None
    """Recorded after the step; None on a CPU."""


class ResultQueue:
    """A queue of step results that have not been read back yet.

    Reading a result waits for the device, whose queue then runs empty while the host writes the result out.
    So on a GPU the last :data:`STEPS_IN_FLIGHT` steps are left for the next read, and earlier ones are read
    on a separate stream, which does not wait for those.

    Args:
        device: the device of the results.
    """

    def __init__(self, device: torch.device) -> None:
        self._in_flight = STEPS_IN_FLIGHT.get(device.type, 0)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._unread: list[_Unread] = []

    def add(self, before: Position, after: Position, result: Result) -> None:
        """Queue the result of a step between two positions."""
        done = None
        if self._stream is not None:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._stream.device))
        self._unread.append(_Unread(before, after, result, done))

    def read(self, everything: bool) -> list[Row]:
        """Return the unread steps in order; on a GPU without the last few, unless ``everything``.

        With several processes, all must call this at the same steps; each gets the means over all processes.

        Raises:
            NotFiniteLoss: if a loss is not finite.
        """
        count = len(self._unread) - (0 if everything else self._in_flight)
        if count <= 0:
            return []
        ready, self._unread = self._unread[:count], self._unread[count:]
        with self._side_stream(ready[-1]):
            values = torch.stack([torch.stack(unread.result) for unread in ready])
            means = distributed.mean_over_processes(values).tolist()
        rows = [
            Row(after.step, before.epoch + 1, before.batch + 1, after.images, *four)
            for (before, after, *_), four in zip(ready, means, strict=True)
        ]
        for row in rows:
            for name in ("loss_d", "loss_g"):
                value = getattr(row, name)
                if not math.isfinite(value):
                    where = f"step {row.step} (epoch {row.epoch}, batch {row.batch})"
                    raise NotFiniteLoss(f"{name} is {value} at {where}")
        return rows

    def _side_stream(self, last: _Unread) -> contextlib.AbstractContextManager[object]:
        """Return the context of the side stream, which first waits for ``last`` only."""
        if self._stream is None or last.done is None:
            return contextlib.nullcontext()
        self._stream.wait_event(last.done)
        return torch.cuda.stream(self._stream)
