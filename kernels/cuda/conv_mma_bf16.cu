// Convolution on the tensor cores: arrays of bfloat16.
#include "conv_mma.cuh"

CONVOLUTION(FORWARD, bf16, bf16)
CONVOLUTION(INPUT_GRADIENT, bf16, bf16)
