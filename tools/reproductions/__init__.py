"""The parts of `alphabar reproduce`: one file each, with ``run(settings)`` that returns a :class:`report.Section`."""
