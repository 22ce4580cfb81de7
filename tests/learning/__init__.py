"""Checks on real digits that fast training learns what the reference learns: ``python -m tests.learning``."""
