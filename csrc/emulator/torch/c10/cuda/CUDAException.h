// What csrc/cuda uses of torch's header of this name, for CPU tensors and emulated kernels.
#pragma once

#include <c10/util/Exception.h>

#define C10_CUDA_CHECK(call)                                                 \
  do {                                                                       \
    const int error_code = static_cast<int>(call);                           \
    TORCH_CHECK(error_code == 0, #call " returned CUDA error ", error_code); \
  } while (0)
