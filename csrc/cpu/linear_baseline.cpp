// The linear head's kernels for what every processor of the architecture has: a unit of their own,
// which another processor can compile meanwhile, in less memory.
#define LNL_LINEAR_KERNELS
#include "kernel_baseline.cpp"
