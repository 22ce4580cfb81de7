"""DCGAN: reference networks (:mod:`dcgan.models`) and their fast drop-ins (:mod:`dcgan.fast`)."""

__version__ = "0.1.0"
