// Included before the sources of the operators: what they register for lnl_ext and CUDA tensors is
// registered for CPU tensors under another name, beside the module's own.
#pragma once

#include <torch/library.h>

#undef TORCH_LIBRARY
#undef TORCH_LIBRARY_FRAGMENT
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY(name, m) _TORCH_LIBRARY_FRAGMENT(lnl_emulated, m, C10_UID)
#define TORCH_LIBRARY_FRAGMENT(name, m) _TORCH_LIBRARY_FRAGMENT(lnl_emulated, m, C10_UID)
#define TORCH_LIBRARY_IMPL(name, key, m) _TORCH_LIBRARY_IMPL(lnl_emulated, CPU, m, C10_UID)
