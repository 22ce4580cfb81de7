"""The command line, ``dcgan`` or ``python -m dcgan``: one module a command, thin over the library."""
