// The torch side of the CUDA kernels. The kernels arrive with the CUDA part of the package.
#include <torch/library.h>

TORCH_LIBRARY_IMPL(lnl_ext, CUDA, m) {}
