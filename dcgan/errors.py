"""What is wrong with what the user gave, as one kind of error."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave can't be used: its message names it, what was given and what is allowed.

    The command line prints the message alone and exits with 2; from the library it is a ValueError.
    """


class RunError(RuntimeError):
    """A run that can't go on, through no fault of its arguments: a NaN loss, a full disk.

    The command line prints the message alone and exits with 1.
    """
