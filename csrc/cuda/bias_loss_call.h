// From torch's tensors to a BiasLossCall, for the operators on CUDA tensors.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

#include <vector>

#include "../bias_loss.h"
#include "bias_loss_launch.h"

namespace lnl::cuda {

// The kernels count the classes of a row, and a little beyond, in 32 bits.
constexpr int64_t kMostClasses = int64_t{1} << 30;

inline Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kFloat32;
  }
}

// Of the current device; the runtime answers both from memory.
inline Device current_device() {
  int index = 0;
  C10_CUDA_CHECK(cudaGetDevice(&index));
  Device device;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&device.shared_memory,
                                        cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  return device;
}

// CPU coefficients are read now, device ones by the kernels; `held` keeps what they read.
inline Coefficient coefficient_of(const std::optional<at::Tensor>& value, at::ScalarType dtype,
                                  std::vector<at::Tensor>& held) {
  Coefficient result;
  result.present = value.has_value();
  if (!result.present) return result;
  if (value->is_cpu()) {
    result.host = value->item<double>();
  } else {
    held.push_back(value->to(dtype));
    result.device = held.back().const_data_ptr();
  }
  return result;
}

// Everything but logits, values and gradients, from checked arguments.
inline void fill_in(BiasLossCall& call, const BiasLossArguments& arguments,
                    const Geometry& geometry, std::vector<at::Tensor>& held) {
  const at::Tensor& logits = arguments.logits;
  TORCH_CHECK_VALUE(geometry.classes <= kMostClasses, "logits have ", geometry.classes,
                    " classes, at most ", kMostClasses, " are supported on CUDA");
  TORCH_CHECK_VALUE(geometry.heads <= 65535, "heads must be at most 65535 on CUDA, got ",
                    geometry.heads);
  const at::ScalarType accumulation = accumulation_dtype(logits);
  call.dtype = dtype_of(logits.scalar_type());
  call.rows = geometry.rows;
  call.heads = geometry.heads;
  call.classes = geometry.classes;
  call.positions = geometry.positions;
  call.channels_last = geometry.channels_last;
  if (geometry.probability_target) {
    call.probabilities = arguments.target.const_data_ptr();
    call.wide_probabilities = arguments.target.scalar_type() != logits.scalar_type();
  } else {
    // An empty tensor has no address, and null would mean probabilities.
    static const int64_t none = 0;
    call.labels = arguments.target.numel() > 0 ? arguments.target.const_data_ptr<int64_t>() : &none;
  }
  if (arguments.weight.has_value()) call.weight = arguments.weight->const_data_ptr();
  call.reversal = coefficient_of(arguments.reversal, accumulation, held);
  call.entropy_weight = coefficient_of(arguments.entropy_weight, accumulation, held);
  call.confusion_weight = coefficient_of(arguments.confusion_weight, accumulation, held);
  call.ignore_index = arguments.ignore_index;
  call.label_smoothing = arguments.label_smoothing;
  call.reduction = static_cast<Reduction>(arguments.reduction);
  call.mask_entropy = arguments.mask_entropy;
}

}  // namespace lnl::cuda
