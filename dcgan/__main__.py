"""``python -m dcgan``, and the command ``dcgan`` where the package is installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say which extra to install if its packages are missing."""
    try:
        from dcgan.cli.app import main as run
    except ModuleNotFoundError as error:
        from dcgan.extras import advice

        hint = advice(error)
        if hint is None:
            raise
        sys.exit(f"dcgan: {hint}")
    run()


if __name__ == "__main__":
    main()
