// Operator schemas and the argument checks that every backend shares. No kernels.
#include "bias_loss.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace lnl {

namespace {

std::vector<int64_t> expected_target_shape(const at::Tensor& logits, int64_t heads) {
  std::vector<int64_t> shape = logits.sizes().vec();
  if (heads == 1) {
    shape.erase(shape.begin() + 1);
  } else {
    shape[1] = heads;
  }
  return shape;
}

void check_coefficient(const std::optional<at::Tensor>& value, const at::Tensor& logits,
                       const char* name) {
  if (!value.has_value()) {
    return;
  }
  TORCH_CHECK_VALUE(value->dim() == 0, name, " must be a number or a 0-dim tensor, got shape ",
                    value->sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(value->scalar_type()), name,
                   " must be a floating point tensor, got ", value->scalar_type());
  TORCH_CHECK_VALUE(value->is_cpu() || value->device() == logits.device(), name,
                    " must be on the CPU or on the device of logits (", logits.device(), "), got ",
                    value->device());
}

// Any number of positions' dimensions, so that a transposed (N, L, C) tensor counts as well.
bool is_channels_last(const at::Tensor& tensor) { return tensor.movedim(1, -1).is_contiguous(); }

}  // namespace

at::ScalarType accumulation_dtype(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::vector<int64_t> site_shape(const at::Tensor& logits) {
  std::vector<int64_t> shape = logits.sizes().vec();
  shape.erase(shape.begin() + 1);
  return shape;
}

Geometry check(const BiasLossArguments& arguments) {
  const at::Tensor& logits = arguments.logits;
  TORCH_CHECK_VALUE(logits.dim() >= 2, "logits must have shape (N, C, *S), got ", logits.sizes());
  const auto dtype = logits.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "logits must be float32, float64, float16 or bfloat16, got ", dtype);
  TORCH_CHECK_VALUE(arguments.heads >= 1, "heads must be at least 1, got ", arguments.heads);
  TORCH_CHECK_VALUE(logits.size(1) > 0 && logits.size(1) % arguments.heads == 0, "logits of shape ",
                    logits.sizes(), " do not hold heads = ", arguments.heads,
                    " heads of at least one class each in dimension 1");
  TORCH_CHECK_VALUE(arguments.label_smoothing >= 0.0 && arguments.label_smoothing <= 1.0,
                    "label_smoothing must be in [0, 1], got ", arguments.label_smoothing);
  const auto reduction = static_cast<int64_t>(arguments.reduction);
  TORCH_CHECK_VALUE(reduction >= 0 && reduction <= 2,
                    "reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);

  Geometry geometry;
  geometry.rows = logits.size(0);
  geometry.heads = arguments.heads;
  geometry.classes = logits.size(1) / arguments.heads;
  for (int64_t dim = 2; dim < logits.dim(); ++dim) {
    geometry.positions *= logits.size(dim);
  }

  const auto target_dtype = arguments.target.scalar_type();
  TORCH_CHECK_VALUE(arguments.target.device() == logits.device(), "target is on ",
                    arguments.target.device(), ", logits on ", logits.device());
  geometry.probability_target = at::isFloatingType(target_dtype);
  if (geometry.probability_target) {
    TORCH_CHECK_VALUE(arguments.target.sizes() == logits.sizes(), "target has shape ",
                      arguments.target.sizes(), ", expected ", logits.sizes(),
                      " for class probabilities");
    TORCH_CHECK_VALUE(arguments.ignore_index < 0, "ignore_index = ", arguments.ignore_index,
                      " is not supported for probability targets");
  } else {
    TORCH_CHECK_TYPE(target_dtype == at::kLong,
                     "target must be int64 classes or floating point probabilities, got ",
                     target_dtype);
    const auto expected = expected_target_shape(logits, arguments.heads);
    TORCH_CHECK_VALUE(arguments.target.sizes() == at::IntArrayRef(expected), "target has shape ",
                      arguments.target.sizes(), ", expected ", at::IntArrayRef(expected),
                      " for logits of shape ", logits.sizes(), " and heads = ", arguments.heads);
  }
  if (arguments.weight.has_value()) {
    TORCH_CHECK_VALUE(arguments.weight->device() == logits.device(), "weight is on ",
                      arguments.weight->device(), ", logits on ", logits.device());
    TORCH_CHECK_VALUE(arguments.weight->dim() == 1 && arguments.weight->size(0) == geometry.classes,
                      "weight has shape ", arguments.weight->sizes(), ", expected (",
                      geometry.classes, ",)");
    TORCH_CHECK_TYPE(at::isFloatingType(arguments.weight->scalar_type()),
                     "weight must be floating point, got ", arguments.weight->scalar_type());
  }
  check_coefficient(arguments.reversal, logits, "reversal");
  check_coefficient(arguments.entropy_weight, logits, "entropy_weight");
  check_coefficient(arguments.confusion_weight, logits, "confusion_weight");

  return geometry;
}

void prepare_target(BiasLossArguments& arguments, const Geometry& geometry, bool transposed) {
  const at::ScalarType accumulate = accumulation_dtype(arguments.logits);
  if (arguments.weight.has_value()) {
    arguments.weight = arguments.weight->to(accumulate).contiguous();
  }
  if (geometry.probability_target &&
      arguments.target.scalar_type() != arguments.logits.scalar_type()) {
    arguments.target = arguments.target.to(accumulate);
  }
  if (geometry.probability_target && transposed) {
    arguments.target = arguments.target.movedim(1, -1).contiguous().movedim(-1, 1);
  } else {
    arguments.target = arguments.target.contiguous();
  }
}

Geometry prepare(BiasLossArguments& arguments) {
  Geometry geometry = check(arguments);
  const bool transposed = !arguments.logits.is_contiguous() && is_channels_last(arguments.logits);
  geometry.channels_last = geometry.positions == 1 || transposed;
  prepare_target(arguments, geometry, transposed);
  if (!transposed) {
    arguments.logits = arguments.logits.contiguous();
  }
  return geometry;
}

at::Tensor prepare_upstream(const at::Tensor& grad_loss, const BiasLossArguments& arguments) {
  TORCH_CHECK_VALUE(grad_loss.device() == arguments.logits.device(), "grad_loss is on ",
                    grad_loss.device(), ", logits on ", arguments.logits.device());
  if (arguments.reduction == Reduction::kNone) {
    const auto expected = site_shape(arguments.logits);
    TORCH_CHECK_VALUE(grad_loss.sizes() == at::IntArrayRef(expected), "grad_loss has shape ",
                      grad_loss.sizes(), ", expected ", at::IntArrayRef(expected));
  } else {
    TORCH_CHECK_VALUE(grad_loss.dim() == 0, "grad_loss has shape ", grad_loss.sizes(),
                      ", expected a 0-dim tensor");
  }
  return grad_loss.to(accumulation_dtype(arguments.logits)).contiguous();
}

}  // namespace lnl

TORCH_LIBRARY(lnl_ext, m) {
  m.set_python_module("lnl_ext.ops.bias_loss");
  m.def(
      "bias_loss(Tensor logits, Tensor target, Tensor? weight, Tensor? reversal, "
      "Tensor? entropy_weight, Tensor? confusion_weight, int ignore_index, float label_smoothing, "
      "int reduction, bool mask_entropy, int heads, bool logits_gradient, bool head_gradient) -> "
      "(Tensor loss, Tensor cross_entropy, Tensor entropy, Tensor denominators, Tensor gradient, "
      "Tensor head_gradient)");
  m.def(
      "bias_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor denominators, Tensor? reversal, Tensor? entropy_weight, Tensor? confusion_weight, "
      "int ignore_index, float label_smoothing, int reduction, bool mask_entropy, int heads, "
      "bool logits_gradient, bool head_gradient) -> (Tensor gradient, Tensor head_gradient)");
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor factor) -> ()");
}
