// Operator schemas and the argument checks that every backend shares. No kernels.
#include "linear_bias_loss.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace lnl {

namespace {

void check_head_tensor(const at::Tensor& tensor, const at::Tensor& features, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == features.scalar_type(), name, " has dtype ",
                   tensor.scalar_type(), ", expected that of features, ", features.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == features.device(), name, " is on ", tensor.device(),
                    ", features on ", features.device());
}

}  // namespace

Geometry prepare(LinearBiasLossArguments& arguments) {
  const at::Tensor& features = arguments.features;
  const at::Tensor& head_weight = arguments.head_weight;
  TORCH_CHECK_VALUE(features.dim() == 2, "features must have shape (N, D), got ", features.sizes());
  TORCH_CHECK_VALUE(head_weight.dim() == 2 && head_weight.size(1) == features.size(1),
                    "head_weight has shape ", head_weight.sizes(), ", expected (heads * C, ",
                    features.size(1), ") for features of shape ", features.sizes());
  check_head_tensor(head_weight, features, "head_weight");
  if (arguments.head_bias.has_value()) {
    TORCH_CHECK_VALUE(
        arguments.head_bias->dim() == 1 && arguments.head_bias->size(0) == head_weight.size(0),
        "head_bias has shape ", arguments.head_bias->sizes(), ", expected (", head_weight.size(0),
        ",)");
    check_head_tensor(*arguments.head_bias, features, "head_bias");
    arguments.head_bias = arguments.head_bias->contiguous();
  }
  arguments.loss.logits =
      at::empty({}, features.options()).expand({features.size(0), head_weight.size(0)});
  Geometry geometry = check(arguments.loss);
  geometry.channels_last = true;  // one position
  prepare_target(arguments.loss, geometry, false);
  arguments.features = features.contiguous();
  arguments.head_weight = head_weight.contiguous();
  return geometry;
}

}  // namespace lnl

TORCH_LIBRARY_FRAGMENT(lnl_ext, m) {
  m.set_python_module("lnl_ext.ops.linear_bias_loss");
  m.def(
      "linear_bias_loss(Tensor features, Tensor head_weight, Tensor? head_bias, Tensor target, "
      "Tensor? weight, Tensor? reversal, Tensor? entropy_weight, Tensor? confusion_weight, "
      "int ignore_index, float label_smoothing, int reduction, bool mask_entropy, int heads, "
      "bool features_gradient, bool head_gradient) -> "
      "(Tensor loss, Tensor cross_entropy, Tensor entropy, Tensor denominators, "
      "Tensor features_gradient, Tensor weight_gradient, Tensor bias_gradient)");
  m.def(
      "linear_bias_loss_backward(Tensor grad_loss, Tensor features, Tensor head_weight, "
      "Tensor? head_bias, Tensor target, Tensor? weight, Tensor denominators, Tensor? reversal, "
      "Tensor? entropy_weight, Tensor? confusion_weight, int ignore_index, float label_smoothing, "
      "int reduction, bool mask_entropy, int heads, bool features_gradient, bool head_gradient) -> "
      "(Tensor features_gradient, Tensor weight_gradient, Tensor bias_gradient)");
}
