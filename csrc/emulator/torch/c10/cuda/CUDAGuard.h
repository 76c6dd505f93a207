// As CUDAException.h: there is one device, the CPU.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device device) {
    TORCH_CHECK(device.is_cpu(), device, " is not the CPU");
  }
};

}  // namespace c10::cuda
