"""Errors that the command line reports without a traceback, and the checks of arguments that raise them."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """An argument or input is not allowed; the message names it, what was given and what is allowed.

    The command line prints only the message and exits with 2.
    """


class RunError(RuntimeError):
    """A run cannot continue although its arguments are valid: for example a NaN loss or a full disk.

    The command line prints only the message and exits with 1.
    """


def is_integer(value: object) -> bool:
    """Return whether ``value`` is an ``int``; a ``bool``, which Python counts as one, is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_plain(value: object) -> bool:
    """Return whether ``value`` is a number, string, bool or None, or a list or dict of such values."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(is_plain, value.values()))
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def check_integers(
    minimum: int, error: type[ValueError] = InputError, allowed: str = "", /, **values: object
) -> None:
    """Raise ``error`` unless every value is an integer of at least ``minimum``.

    Its message names the first other value by its keyword, and ``allowed``: 'an integer of at least
    ``minimum``' by default.
    """
    for name, value in values.items():
        if not is_integer(value) or value < minimum:  # type: ignore[operator]
            allowed = allowed or f"an integer of at least {minimum}"
            raise error(f"{name} must be {allowed}, got {value!r}")


def check_positive_integers(error: type[ValueError] = InputError, /, **values: object) -> None:
    """Raise ``error`` unless every value is a positive integer; see :func:`check_integers`."""
    check_integers(1, error, "a positive integer", **values)


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise InputError, which lists ``allowed``, unless ``value`` is one of them, of the same type."""
    if not any(isinstance(value, type(one)) and value == one for one in allowed):
        raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def counted(count: int, noun: str) -> str:
    """Return for example '1 step' or '2,000 steps'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def one_line(error: BaseException) -> str:
    """Return the error's message as one line, or its type's name if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
