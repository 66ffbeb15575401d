"""alphabar: a framework-free diffusion engine in NumPy, Numba and CUDA.

The package has three floors: :mod:`alphabar.kernels` (the hot loops), :mod:`alphabar.core` (schedules, samplers, losses) and
:mod:`alphabar.nets` (autograd, the U-Net, optimisers); :mod:`alphabar.tools` holds the command-line programs.
"""

__version__ = "0.1.0"
