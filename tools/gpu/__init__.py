"""The sections of `alphabar gpu-check`, each a function of a :class:`job.Job`: what a machine without a GPU cannot show."""
