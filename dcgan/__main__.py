"""``python -m dcgan``: the command line, as ``dcgan`` is where the package is installed."""

from dcgan.cli.app import main

if __name__ == "__main__":
    main()
