"""The mathematics of diffusion in plain array code: schedules, the forward process, losses, sampler tables, samplers, guidance.

Import the part that you need: ``from alphabar.core import schedules, forward, tables, samplers``.
"""
