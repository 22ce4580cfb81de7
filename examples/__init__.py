"""Scripts to read and run from a checkout: ``python examples/NAME.py``."""
