// From the dispatcher's arguments to a backend's call, and from its results to tensors.
#include "operators.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "arguments.h"
#include "backend.h"

namespace lnl {

namespace {

// The dispatcher's stack: arguments in the order of the schema, taken all before anything can fail,
// since they are ours from then on; then the results.
class Stack {
 public:
  explicit Stack(StableIValue* values) : values_(values) {}

  template <typename T>
  T take() {
    return torch::stable::detail::to<T>(values_[taken_++]);
  }
  LossArguments take_loss() {  // in braces, arguments are evaluated from left to right
    return {take<Tensor>(),         take<OptionalTensor>(), take<OptionalTensor>(),
            take<OptionalTensor>(), take<OptionalTensor>(), take<OptionalTensor>(),
            take<std::int64_t>(),   take<double>(),         take<std::int64_t>(),
            take<bool>(),           take<std::int64_t>()};
  }
  void give(std::initializer_list<Tensor> results) {
    StableIValue* place = values_;
    for (const Tensor& result : results) *place++ = torch::stable::detail::from(result);
  }

 private:
  StableIValue* values_;
  int taken_ = 0;
};

// Loss, cross-entropy and entropy, and the denominators, for a forward call to fill in.
struct Values {
  Tensor loss, cross_entropy, entropy, denominators;

  Values(PreparedLoss& prepared, const TensorFacts& logits) {
    BiasLossCall& call = prepared.call;
    const DType dtype = accumulation_of(call.dtype);
    Sizes shape;
    if (call.reduction == Reduction::kNone) {
      shape = logits.sizes;
      shape.erase(shape.begin() + 1);
    }
    loss = empty(shape, dtype, logits);
    cross_entropy = empty(shape, dtype, logits);
    entropy = empty(shape, dtype, logits);
    denominators = empty({call.heads, 2}, dtype, logits);
    // An unreduced loss of no sites has no address, and there is nothing to do for it.
    call.loss = loss.mutable_data_ptr();
    call.cross_entropy = cross_entropy.mutable_data_ptr();
    call.entropy = entropy.mutable_data_ptr();
    if (call.reduction != Reduction::kMean) {
      torch::stable::fill_(denominators, 1.0);
    } else if (call.denominators_given) {
      copy_to(denominators, *prepared.denominators);
    } else {
      call.denominators = denominators.mutable_data_ptr();
    }
  }
};

void check_backend(const TensorFacts& facts, const char* name) {
  check(facts.device_type == backend::device_type(), name, " is on ", DeviceText{facts},
        ", and other tensors are not");
}

// ---- given logits

struct LogitsCall {
  Tensor logits;
  TensorFacts facts;
  PreparedLoss loss;
  Tensor gradient, head_gradient;  // as logits, or empty

  LogitsCall(const Tensor& given, const LossArguments& arguments, bool wants_gradient,
             bool wants_head_gradient)
      : logits(given), facts(given) {
    check_backend(facts, "logits");
    loss = prepare(arguments, facts, "logits", false);
    BiasLossCall& call = loss.call;
    const Sizes dense = dense_strides(facts.sizes);
    if (!loss.transposed) logits = laid_out(given, facts, call.dtype, dense);
    call.logits = logits.const_data_ptr();
    const auto allocate = [&](bool wanted) {
      return wanted ? empty(facts.sizes, loss.transposed ? facts.strides : dense, call.dtype, facts)
                    : empty({0}, call.dtype, facts);
    };
    gradient = allocate(wants_gradient);
    head_gradient = allocate(wants_head_gradient);
    if (wants_gradient) call.gradient = gradient.mutable_data_ptr();
    if (wants_head_gradient) call.head_gradient = head_gradient.mutable_data_ptr();
  }

  void run() { check_labels(backend::bias_loss(loss.call, facts), loss.call, loss.target_shape); }
};

void bias_loss(StableIValue* values, std::uint64_t, std::uint64_t) {
  Stack stack(values);
  const auto logits = stack.take<Tensor>();
  const LossArguments arguments = stack.take_loss();
  const bool gradient = stack.take<bool>(), head_gradient = stack.take<bool>();
  LogitsCall call(logits, arguments, gradient, head_gradient);
  const Values result(call.loss, call.facts);
  if (call.loss.call.reduction != Reduction::kNone || call.loss.call.sites() > 0) call.run();
  stack.give({result.loss, result.cross_entropy, result.entropy, result.denominators, call.gradient,
              call.head_gradient});
}

void bias_loss_backward(StableIValue* values, std::uint64_t, std::uint64_t) {
  Stack stack(values);
  const auto grad_loss = stack.take<Tensor>(), logits = stack.take<Tensor>();
  const LossArguments arguments = stack.take_loss();
  const bool gradient = stack.take<bool>(), head_gradient = stack.take<bool>();
  LogitsCall call(logits, arguments, gradient, head_gradient);
  prepare_backward(call.loss, grad_loss, call.facts, "logits");
  if ((gradient || head_gradient) && call.loss.call.elements() > 0) call.run();
  stack.give({call.gradient, call.head_gradient});
}

// ---- a linear head

struct LinearCall {
  TensorFacts features, logits;
  PreparedLoss loss;
  LinearBiasLossCall call;
  backend::LinearTensors tensors;

  LinearCall(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
             const LossArguments& arguments, bool wants_features_gradient, bool wants_head_gradient)
      : features(x), logits(features) {
    check_backend(features, "features");
    const TensorFacts head(weight);
    check(features.is_floating(), "features has dtype ", DTypeText{features},
          ", expected float32, float64, float16 or bfloat16");
    check(features.dim() == 2, "features has shape ", features.shape(), ", expected (N, D)");
    check_head(head, "head_weight");
    check(head.dim() == 2 && head.sizes[1] == features.sizes[1], "head_weight has shape ",
          head.shape(), ", expected (heads * C, ", features.sizes[1], ") for features of shape ",
          features.shape());
    const DType dtype = dtype_of(features);
    tensors.features = laid_out(x, features, dtype, dense_strides(features.sizes));
    tensors.head_weight = laid_out(weight, head, dtype, dense_strides(head.sizes));
    if (bias.has_value()) {
      const TensorFacts facts(*bias);
      check_head(facts, "head_bias");
      check(facts.dim() == 1 && facts.sizes[0] == head.sizes[0], "head_bias has shape ",
            facts.shape(), ", expected (", head.sizes[0], ",) for head_weight of shape ",
            head.shape());
      tensors.head_bias = laid_out(*bias, facts, dtype, {1});
    }
    logits.sizes[1] = head.sizes[0];
    logits.strides = dense_strides(logits.sizes);
    loss = prepare(arguments, logits, "logits", true);

    const auto allocate = [&](bool wanted, const Sizes& sizes) {
      return empty(wanted ? sizes : Sizes{0}, dtype, features);
    };
    tensors.features_gradient = allocate(wants_features_gradient, features.sizes);
    tensors.weight_gradient = allocate(wants_head_gradient, head.sizes);
    tensors.bias_gradient = allocate(wants_head_gradient && bias.has_value(), {head.sizes[0]});
    call.width = features.sizes[1];
    call.features = tensors.features.const_data_ptr();
    call.head_weight = tensors.head_weight.const_data_ptr();
    if (bias.has_value()) call.head_bias = tensors.head_bias->const_data_ptr();
    // An empty gradient (of features of no width) has no address, and null would mean that it, and
    // with head_weight's also head_bias', is not wanted.
    static std::int64_t none = 0;
    const auto address = [&](const Tensor& tensor) -> void* {
      return tensor.numel() > 0 ? tensor.mutable_data_ptr() : &none;
    };
    if (wants_features_gradient) call.features_gradient = address(tensors.features_gradient);
    if (wants_head_gradient) call.weight_gradient = address(tensors.weight_gradient);
    if (wants_head_gradient && bias.has_value()) {
      call.bias_gradient = address(tensors.bias_gradient);
    }
  }

  void run() {
    call.loss = loss.call;
    if (call.loss.rows == 0) {
      zero(tensors.weight_gradient);
      zero(tensors.bias_gradient);
    }
    if (call.loss.rows == 0 &&
        (call.loss.loss == nullptr || call.loss.reduction == Reduction::kNone))
      return;
    check_labels(backend::linear_bias_loss(call, tensors, features), loss.call, loss.target_shape);
  }

 private:
  void check_head(const TensorFacts& tensor, const char* name) const {
    check(tensor.dtype == features.dtype, name, " has dtype ", DTypeText{tensor}, ", expected ",
          DTypeText{features}, " as features");
    check(tensor.same_device(features), name, " is on ", DeviceText{tensor}, ", expected ",
          DeviceText{features}, " as features");
  }
};

void linear_bias_loss(StableIValue* values, std::uint64_t, std::uint64_t) {
  Stack stack(values);
  const auto features = stack.take<Tensor>(), head_weight = stack.take<Tensor>();
  const auto head_bias = stack.take<OptionalTensor>();
  const LossArguments arguments = stack.take_loss();
  const bool features_gradient = stack.take<bool>(), head_gradient = stack.take<bool>();
  LinearCall call(features, head_weight, head_bias, arguments, features_gradient, head_gradient);
  const Values result(call.loss, call.logits);
  call.run();
  const backend::LinearTensors& tensors = call.tensors;
  stack.give({result.loss, result.cross_entropy, result.entropy, result.denominators,
              tensors.features_gradient, tensors.weight_gradient, tensors.bias_gradient});
}

void linear_bias_loss_backward(StableIValue* values, std::uint64_t, std::uint64_t) {
  Stack stack(values);
  const auto grad_loss = stack.take<Tensor>(), features = stack.take<Tensor>();
  const auto head_weight = stack.take<Tensor>();
  const auto head_bias = stack.take<OptionalTensor>();
  const LossArguments arguments = stack.take_loss();
  const bool features_gradient = stack.take<bool>(), head_gradient = stack.take<bool>();
  LinearCall call(features, head_weight, head_bias, arguments, features_gradient, head_gradient);
  prepare_backward(call.loss, grad_loss, call.logits, "features");
  if (features_gradient || head_gradient) call.run();
  const backend::LinearTensors& tensors = call.tensors;
  stack.give({tensors.features_gradient, tensors.weight_gradient, tensors.bias_gradient});
}

// ---- gradients that wait for the upstream factor

void scale_gradient_(StableIValue* values, std::uint64_t, std::uint64_t) {
  Stack stack(values);
  const auto gradient = stack.take<Tensor>(), factor = stack.take<Tensor>();
  const TensorFacts facts(gradient);
  check_backend(facts, "gradient");
  check(facts.is_floating(), "gradient has dtype ", DTypeText{facts},
        ", expected float32, float64, float16 or bfloat16");
  check(is_dense(facts), "gradient of shape ", facts.shape(), " has strides ",
        ShapeText{facts.strides}, ", expected a dense tensor");
  const Coefficient scale = coefficient_of(factor, "factor", facts);
  if (facts.numel() > 0) {
    backend::scale_gradient(gradient.mutable_data_ptr(), facts.numel(), dtype_of(facts), scale,
                            facts);
  }
}

}  // namespace

void implement_operators(torch::stable::detail::StableLibrary& library) {
  library.impl("bias_loss", &bias_loss);
  library.impl("bias_loss_backward", &bias_loss_backward);
  library.impl("linear_bias_loss", &linear_bias_loss);
  library.impl("linear_bias_loss_backward", &linear_bias_loss_backward);
  library.impl("scale_gradient_", &scale_gradient_);
}

}  // namespace lnl
