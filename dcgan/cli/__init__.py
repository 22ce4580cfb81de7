"""The command-line interface, ``dcgan`` or ``python -m dcgan``: a thin module per command."""
