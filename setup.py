"""Packages of the distribution; everything declarative is in pyproject.toml.

``dcgan/kernels`` is a link to the top-level folder ``kernels``, so that a checkout, an editable install,
a wheel and mypy all see the one package ``dcgan.kernels``.
"""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["dcgan", "dcgan.*"]))
