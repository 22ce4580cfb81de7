"""Errors that the command line reports without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """An argument or input is not allowed; the message names it, what was given and what is allowed.

    The command line prints only the message and exits with 2.
    """


class RunError(RuntimeError):
    """A run cannot continue although its arguments are valid: for example a NaN loss or a full disk.

    The command line prints only the message and exits with 1.
    """
