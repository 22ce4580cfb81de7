"""DCGAN: reference networks (:mod:`dcgan.models`) and their fast drop-ins (:mod:`dcgan.fast`)."""

import os

from . import _renamed

__version__ = "0.2.0"

# `dcgan/kernels` is a symlink to the top-level folder `kernels`. In a checkout without symlinks (Windows, a
# zip download) it is a text file, and Python has to look for the subpackage in the parent folder.
if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(__path__[0]))

_renamed.register()
