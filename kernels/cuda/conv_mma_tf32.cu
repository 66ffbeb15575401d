// Convolution on the tensor cores: arrays of float32, rounded to TF32.
#include "conv_mma.cuh"

CONVOLUTION(FORWARD, float, tf32)
CONVOLUTION(INPUT_GRADIENT, float, tf32)
