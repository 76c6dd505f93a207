// What the operators ask of the CPU and of CUDA. Every function is implemented once in csrc/cpu and
// once in csrc/cuda, whose libraries each contain the operators.
#pragma once

#include "tensor.h"
#include "types.h"

namespace lnl::backend {

std::int32_t device_type();  // of the tensors, as torch's C functions number them

// Runs a forward or backward call on the device of `logits`. Returns the place of the first label
// that is no class, or -1: on CUDA always, where such a label makes its site NaN.
std::int64_t bias_loss(const BiasLossCall& call, const TensorFacts& logits);

// The tensors of a call of linear_bias_loss, dense; the gradients are empty where not wanted.
struct LinearTensors {
  Tensor features, head_weight;
  OptionalTensor head_bias;
  Tensor features_gradient, weight_gradient, bias_gradient;
};

// The same for a linear head. Without rows the head's gradients are zeros already.
std::int64_t linear_bias_loss(const LinearBiasLossCall& call, LinearTensors& tensors,
                              const TensorFacts& features);

// gradient *= factor, without touching the gradient where the factor is 1.
void scale_gradient(void* gradient, std::int64_t elements, DType dtype, const Coefficient& factor,
                    const TensorFacts& facts);

}  // namespace lnl::backend
