"""The demonstrations: one file each, with ``options(parser)`` and ``run(given)`` that returns the numbers and the picture."""
