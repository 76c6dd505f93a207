// The linear head's kernels for AVX2, FMA and F16C: a unit of their own, which
// another processor can compile meanwhile, in less memory.
#define LNL_LINEAR_KERNELS
#include "kernel_avx2.cpp"
