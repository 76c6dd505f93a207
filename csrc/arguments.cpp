#include "arguments.h"

#include <string>

namespace lnl {

namespace {

using torch::headeronly::ScalarType;

struct Heads {
  std::int64_t count;
};
std::ostream& operator<<(std::ostream& stream, const Heads& heads) {
  return heads.count > 1 ? stream << " and heads=" << heads.count : stream;
}

// [N, *S], with several heads [N, K, *S].
Sizes sites_of(const TensorFacts& logits, std::int64_t heads) {
  Sizes sizes = logits.sizes;
  if (heads == 1) {
    sizes.erase(sizes.begin() + 1);
  } else {
    sizes[1] = heads;
  }
  return sizes;
}

void check_device(const TensorFacts& tensor, const char* what, const TensorFacts& logits,
                  const char* name) {
  check(tensor.same_device(logits), what, " is on ", DeviceText{tensor}, ", expected ",
        DeviceText{logits}, " as ", name);
}

void check_logits(const TensorFacts& logits, std::int64_t heads, const char* name) {
  check(logits.is_floating(), name, " has dtype ", DTypeText{logits},
        ", expected float32, float64, float16 or bfloat16");
  check(logits.dim() >= 2, name, " has shape ", logits.shape(), ", expected (N, C) or (N, C, *S)");
  check(heads >= 1, "heads is ", heads, ", expected at least 1");
  check(logits.sizes[1] > 0, name, " has shape ", logits.shape(),
        ", which has no classes (dimension 1)");
  check(logits.sizes[1] % heads == 0, "heads is ", heads, ", which does not divide the ",
        logits.sizes[1], " channels of ", name, " of shape ", logits.shape());
}

void check_target(const TensorFacts& target, const TensorFacts& logits, std::int64_t heads,
                  std::int64_t ignore_index, const char* name) {
  check_device(target, "target", logits, name);
  if (target.is_floating()) {
    check(target.sizes == logits.sizes, "target has shape ", target.shape(),
          ", expected probabilities of shape ", logits.shape(), " as ", name,
          ", or int64 class indices");
    check(ignore_index < 0, "ignore_index is ", ignore_index,
          ", but a target of probabilities cannot be ignored: leave it negative");
    return;
  }
  check(target.dtype == ScalarType::Long, "target has dtype ", DTypeText{target},
        ", expected torch.int64 class indices or floating-point probabilities");
  const Sizes expected = sites_of(logits, heads);
  check(target.sizes == expected, "target has shape ", target.shape(), ", expected ",
        ShapeText{expected}, " for ", name, " of shape ", logits.shape(), Heads{heads});
}

double host_value(const TensorFacts& facts, const void* data) {
  switch (dtype_of(facts)) {
    case DType::kFloat64:
      return *static_cast<const double*>(data);
    case DType::kFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::Half*>(data));
    case DType::kBFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::BFloat16*>(data));
    case DType::kFloat32:
      break;
  }
  return *static_cast<const float*>(data);
}

// [K, 2] of the accumulation dtype.
void point_to_denominators(PreparedLoss& loss, const Tensor& denominators,
                           const TensorFacts& logits, const char* name) {
  const TensorFacts facts(denominators);
  check(facts.dim() == 2 && facts.sizes[0] == loss.call.heads && facts.sizes[1] == 2,
        "denominators has shape ", facts.shape(), ", expected (", loss.call.heads, ", 2)");
  check(facts.is_floating(), "denominators has dtype ", DTypeText{facts},
        ", expected a floating-point tensor");
  check_device(facts, "denominators", logits, name);
  loss.denominators = laid_out(denominators, facts, accumulation_of(loss.call.dtype), {2, 1});
  loss.call.denominators = loss.denominators->mutable_data_ptr();
  loss.call.denominators_given = true;
}

void point_to_labels(PreparedLoss& loss, const Tensor& target, const TensorFacts& facts) {
  // An empty tensor has no address, and null would mean probabilities.
  static const std::int64_t none = 0;
  const bool dense = has_strides(facts, dense_strides(facts.sizes));
  loss.held.push_back(dense ? target : contiguous_labels(target, facts));
  loss.call.labels = facts.numel() > 0
                         ? static_cast<const std::int64_t*>(loss.held.back().const_data_ptr())
                         : &none;
  loss.target_shape = facts.sizes;
}

}  // namespace

Coefficient coefficient_of(const OptionalTensor& value, const char* name,
                           const TensorFacts& device) {
  Coefficient result;
  if (!value.has_value()) return result;
  const TensorFacts facts(*value);
  check(facts.dim() == 0, name, " has shape ", facts.shape(),
        ", expected a 0-dim tensor or a number");
  check(facts.is_floating(), name, " has dtype ", DTypeText{facts},
        ", expected a floating-point tensor");
  check(facts.on_cpu() || facts.same_device(device), name, " is on ", DeviceText{facts},
        ", expected ", DeviceText{device}, " (the logits') or cpu");
  result.present = true;
  result.dtype = dtype_of(facts);
  if (facts.on_cpu()) {
    result.host = host_value(facts, value->const_data_ptr());
  } else {
    result.device = value->const_data_ptr();
  }
  return result;
}

PreparedLoss prepare(const LossArguments& arguments, const TensorFacts& logits, const char* name,
                     bool wide) {
  check_logits(logits, arguments.heads, name);
  const TensorFacts target(arguments.target);
  check_target(target, logits, arguments.heads, arguments.ignore_index, name);
  check(arguments.label_smoothing >= 0.0 && arguments.label_smoothing <= 1.0, "label_smoothing is ",
        arguments.label_smoothing, ", expected a number in [0, 1]");
  check(arguments.reduction >= 0 && arguments.reduction <= 2, "reduction is ", arguments.reduction,
        ", expected 0 (none), 1 (mean) or 2 (sum)");

  PreparedLoss loss;
  BiasLossCall& call = loss.call;
  call.dtype = dtype_of(logits);
  call.rows = logits.sizes[0];
  call.heads = arguments.heads;
  call.classes = logits.sizes[1] / arguments.heads;
  for (std::int64_t i = 2; i < logits.dim(); ++i) call.positions *= logits.sizes[i];
  loss.transposed = !has_strides(logits, dense_strides(logits.sizes)) &&
                    has_strides(logits, dense_strides(logits.sizes, true));
  call.channels_last = call.positions == 1 || loss.transposed;
  call.ignore_index = arguments.ignore_index;
  call.label_smoothing = arguments.label_smoothing;
  call.reduction = static_cast<Reduction>(arguments.reduction);
  call.mask_entropy = arguments.mask_entropy;
  call.reversal = coefficient_of(arguments.reversal, "reversal", logits);
  call.entropy_weight = coefficient_of(arguments.entropy_weight, "entropy_weight", logits);
  call.confusion_weight = coefficient_of(arguments.confusion_weight, "confusion_weight", logits);

  const DType accumulation = accumulation_of(call.dtype);
  if (arguments.weight.has_value()) {
    const TensorFacts weight(*arguments.weight);
    check(weight.dim() == 1 && weight.sizes[0] == call.classes, "weight has shape ", weight.shape(),
          ", expected (", call.classes, ",): one weight per class");
    check(weight.is_floating(), "weight has dtype ", DTypeText{weight},
          ", expected a floating-point tensor");
    check_device(weight, "weight", logits, name);
    loss.held.push_back(laid_out(*arguments.weight, weight, accumulation, {1}));
    call.weight = loss.held.back().const_data_ptr();
  }
  if (arguments.denominators.has_value()) {
    point_to_denominators(loss, *arguments.denominators, logits, name);
  }
  if (target.is_floating()) {
    const DType dtype = !wide && dtype_of(target) == call.dtype ? call.dtype : accumulation;
    loss.held.push_back(
        laid_out(arguments.target, target, dtype, dense_strides(target.sizes, loss.transposed)));
    call.probabilities = loss.held.back().const_data_ptr();
    call.wide_probabilities = dtype != call.dtype;
  } else {
    point_to_labels(loss, arguments.target, target);
  }
  return loss;
}

void prepare_backward(PreparedLoss& loss, const Tensor& grad_loss, const TensorFacts& logits,
                      const char* name) {
  check(loss.denominators.has_value() || loss.call.reduction != Reduction::kMean,
        "denominators is None, expected those of the forward call");
  const TensorFacts facts(grad_loss);
  check_device(facts, "grad_loss", logits, name);
  check(facts.is_floating(), "grad_loss has dtype ", DTypeText{facts},
        ", expected a floating-point tensor");
  const Sizes expected = loss.call.reduction == Reduction::kNone ? sites_of(logits, 1) : Sizes();
  check(facts.sizes == expected, "grad_loss has shape ", facts.shape(), ", expected ",
        ShapeText{expected});
  loss.held.push_back(
      laid_out(grad_loss, facts, accumulation_of(loss.call.dtype), dense_strides(expected)));
  loss.call.upstream = loss.held.back().const_data_ptr();
}

void check_labels(std::int64_t place, const BiasLossCall& call, const Sizes& target_shape) {
  if (place < 0) return;
  const std::int64_t value = call.labels[place];
  std::string index;
  for (std::size_t i = target_shape.size(); i-- > 0;) {
    const std::string number = std::to_string(place % target_shape[i]);
    index = index.empty() ? number : number + ", " + index;
    place /= target_shape[i];
  }
  check(false, "target[", index, "] is ", value, ", expected a class in [0, ", call.classes,
        ") or ignore_index = ", call.ignore_index);
}

}  // namespace lnl
