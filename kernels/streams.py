"""The streams of the counter-based generator: one number for each use of randomness, so that no two uses share a counter.

A random word is Philox4x32-10(counter = (block, sample, step, stream), key = seed); see
:func:`alphabar.kernels.reference.philox`. A draw that takes two words for an element finds the second in stream + 2^31.
"""

SAMPLER = 0  # z of a sampler step; step = row of the table, sample = global index of the sample
FORWARD = 1  # eps of q_sample; step = training step, sample = place in the batch
PRIOR = 2  # x_T ~ N(0, I); step = 0, sample = global index of the sample
TIMES = 3  # t ~ U{1..T} of a training batch; step = training step
ORDER = 4  # permutation of the data; step = epoch
DROP = 5  # which conditions are dropped; step = training step
INIT = 6  # initial weights; step = index of the parameter
DROPOUT = 7  # dropout masks; step = training step
DENSITY = 8  # samples of a closed-form density; step = 2·step (components), 2·step + 1 (normals), sample = index of the sample
PROJECTION = 9  # directions of slices and of Hutchinson's estimate; step = number of the direction, or training step
CORRECTOR = 10  # Langevin noise of predictor-corrector; step = row, sample = global index of the sample
DEQUANTIZE = 11  # uniform noise on 8-bit values; step = pass, sample = index of the sample
PATH = 12  # forward paths of the bound; step = draw·(rows + 1) + row, sample = index of the sample
KNOWN = 16  # noise of the known part in inpainting; step = visit of a level, sample = global index of the sample
RETURN = 17  # noise of RePaint's way back up; step = visit of a level, sample = global index of the sample
EDIT = 18  # seeds of the repeats of image-to-image editing; step = repeat
MEASURE = 19  # what a tool does to images before it restores them; step = 0 noise (sample = index of the image), 1 mask
EMBED = 20  # noise of embeddings, x_0 ~ N(Emb(w), σ_0²); step = training step, sample = place in the batch
