// Included before the sources of the operators on CUDA tensors: they are registered for CPU tensors
// under another name, beside the package's own, and call the functions of device.cpp where torch's
// own are those of its CUDA half.
#pragma once

#define USE_CUDA
#define aoti_torch_create_device_guard lnl_emulated_create_device_guard
#define aoti_torch_delete_device_guard lnl_emulated_delete_device_guard
#define aoti_torch_get_current_cuda_stream lnl_emulated_get_current_cuda_stream
#define aoti_torch_device_type_cuda lnl_emulated_device_type_cuda
#define aoti_torch_cuda_mm_out lnl_emulated_mm_out
#define aoti_torch_cuda_mm_dtype_out lnl_emulated_mm_dtype_out
#define aoti_torch_cuda_addmm_out lnl_emulated_addmm_out

#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY(name, m) _STABLE_TORCH_LIBRARY_FRAGMENT(lnl_emulated, m, C10_UID)
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(lnl_emulated, CPU, m, C10_UID)
