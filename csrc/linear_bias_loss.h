// The bias loss of a linear layer, whose logits never exist whole: arguments and checks that every
// backend shares.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "bias_loss.h"

namespace lnl {

// Everything one call is given; the operators of linear_bias_loss.cpp fill it from their arguments.
struct LinearBiasLossArguments {
  at::Tensor features;                  // [N, D]
  at::Tensor head_weight;               // [K * C, D]
  std::optional<at::Tensor> head_bias;  // [K * C]
  // Target, class weights, coefficients and options. Its gradients' flags stay false, and after
  // `prepare` its logits are a stand-in [N, K * C] of one element: shape, dtype and device only.
  BiasLossArguments loss;
  bool features_gradient = false;
  bool head_gradient = false;  // of head_weight and head_bias
};

// Checks shapes, dtypes and devices (no data) and makes every tensor dense, as bias_loss does.
// Returns the geometry of the logits.
Geometry prepare(LinearBiasLossArguments& arguments);

}  // namespace lnl
