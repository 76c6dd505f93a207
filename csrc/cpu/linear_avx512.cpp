// The linear head's kernels for AVX-512 (F, BW, DQ, VL): a unit of their own, which
// another processor can compile meanwhile, in less memory.
#define LNL_LINEAR_KERNELS
#include "kernel_avx512.cpp"
