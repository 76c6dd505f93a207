// What the operators on CUDA tensors ask of torch: device, stream and workspace, of which the
// kernels know nothing.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../tensor.h"
#include "bias_loss_launch.h"

namespace lnl::cuda {

inline void check_launch(int error) {
  if (error != 0) check(false, "CUDA error: ", error_text(error));
}

// The device of a tensor as the current one, and torch's current stream on it.
struct DeviceScope {
  torch::stable::accelerator::DeviceGuard guard;
  Device device;
  CUstream_st* stream = nullptr;

  explicit DeviceScope(const TensorFacts& tensor)
      : guard(tensor.device_index), device(device_facts(tensor.device_index)) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.device_index, &current));
    stream = static_cast<CUstream_st*>(current);
  }
};

// The kernels count the classes of a row, and a little beyond, in 32 bits, and heads are blocks of
// a grid's second dimension.
inline void check_limits(const BiasLossCall& call) {
  constexpr std::int64_t kMostClasses = std::int64_t{1} << 30;
  check(call.classes <= kMostClasses, "logits have ", call.classes, " classes, at most ",
        kMostClasses, " are supported on CUDA");
  check(call.heads <= 65535, "heads must be at most 65535 on CUDA, got ", call.heads);
}

}  // namespace lnl::cuda
