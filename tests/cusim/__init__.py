"""Runs CUDA C on the host: the same ``.cu`` files through g++, launched with NumPy arrays. README.md says how to use it.

Modes. ``fast`` computes, with the threads of a block in a chosen order: forward, reverse or random. ``check`` watches every
memory access and raises :class:`Fault` at a race, an access out of bounds or misaligned, or a read of unwritten shared memory;
where asked for, it counts what each source line moved. ``coverage`` counts the lines and branches that ran.
Built libraries are kept in the user's cache folder under the hash of all that went into them.
"""

from .building import ORDERS, available, build, kernels, prepare
from .launching import Fault, Host, Module, Traffic, module

__all__ = ["ORDERS", "Fault", "Host", "Module", "Traffic", "available", "build", "kernels", "module", "prepare"]
