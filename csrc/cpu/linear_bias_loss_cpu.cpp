// The operators of linear_bias_loss on CPU tensors.
//
// Few outputs on many rows: the kernels do the products themselves, see linear_runner.h. Otherwise
// the products are what takes the time, and torch's matrix products do them on chunks of rows.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../linear_bias_loss.h"
#include "kernel.h"
#include "problem.h"

namespace lnl::cpu {

namespace {

// Up to so many outputs the kernels are faster than torch's products: (4096, 2048, 64) takes 22 ms
// here and 27 ms there, on two cores with AVX-512.
constexpr int64_t kMostKernelOutputs = 64;
constexpr int64_t kPartRows = 64;  // a part's rows are a multiple of it
constexpr int64_t kMostParts = 256;
constexpr int64_t kParallelProducts = 262144;
constexpr int64_t kChunkBytes = int64_t{64} << 20;  // of logits (and converted features) at a time

// ---- which gradients of the logits are needed

struct Plan {
  bool two_gradients = false;
  double features_factor = 1.0;  // of the one gradient, to get the features'
  Coefficients coefficients;     // of the first or only gradient
};

// The features' gradient of the logits and the head's: one where they are equal or not both wanted,
// and with `multiples` where the first is a multiple of the second.
Plan make_plan(const LinearBiasLossArguments& arguments, const Coefficients& coefficients,
               bool multiples) {
  Plan plan;
  plan.coefficients = coefficients;
  if (!arguments.loss.reversal.has_value() || !arguments.head_gradient) {
    return plan;
  }
  multiples = multiples && coefficients.entropy == 0.0 && coefficients.confusion == 0.0;
  if (arguments.features_gradient && !multiples) {
    plan.two_gradients = true;
    return plan;
  }
  // In the dtype of the products, where a number too large for it is infinite.
  plan.features_factor = accumulation_dtype(arguments.features) == at::kDouble
                             ? coefficients.cross_entropy
                             : static_cast<float>(coefficients.cross_entropy);
  plan.coefficients.cross_entropy = 1.0;
  plan.coefficients.entropy = plan.coefficients.confusion = 0.0;
  return plan;
}

struct Gradients {
  at::Tensor features, weight, bias;  // empty where not wanted
};

struct Call {
  LinearBiasLossArguments arguments;
  Geometry geometry;
  Problem problem;  // without logits and gradients
  std::vector<double> inverse;

  int64_t outputs() const { return geometry.heads * geometry.classes; }
  int64_t width() const { return arguments.features.size(1); }
  at::ScalarType accumulate() const { return accumulation_dtype(arguments.features); }
  bool any_gradient() const { return arguments.features_gradient || arguments.head_gradient; }
};

Call make_call(LinearBiasLossArguments arguments, at::Tensor& denominators) {
  Call call;
  call.arguments = std::move(arguments);
  call.geometry = prepare(call.arguments);
  BiasLossArguments& loss = call.arguments.loss;
  if (call.geometry.probability_target) {
    loss.target = loss.target.to(call.accumulate());
  }
  const at::Tensor counted = count_denominators(loss, call.geometry);  // checks the targets, too
  if (!denominators.defined()) {
    denominators = counted;
  }
  check_denominators(denominators, call.geometry.heads);
  call.inverse = inverse_of(denominators, loss.reduction);
  call.problem = make_problem(loss, call.geometry);
  call.problem.probabilities_accumulate = true;
  call.problem.dtype = call.accumulate() == at::kDouble ? DType::kFloat64 : DType::kFloat32;
  call.problem.inverse_denominators = call.inverse.data();
  return call;
}

// ---- few outputs: the kernels' own products

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

bool uses_kernel(const Call& call) {
  return call.geometry.classes <= kMostLinearClasses && call.outputs() <= kMostKernelOutputs;
}

// A part is what has a weight's gradient of its own: fixed by the shape, so that results do not
// depend on the number of threads, and large enough that the parts' gradients together are a
// sixteenth of the features.
int64_t part_rows(int64_t rows, int64_t outputs) {
  const int64_t parts =
      std::clamp<int64_t>(rows / std::max(kPartRows, 16 * outputs), 1, kMostParts);
  return round_up((rows + parts - 1) / parts, kPartRows);
}

Gradients run_kernel(Call& call, const Plan& plan, std::vector<Sums>& total) {
  const LinearBiasLossArguments& arguments = call.arguments;
  const int64_t rows = call.geometry.rows, outputs = call.outputs(), width = call.width();
  const int64_t padded = round_up(width, kWidthMultiple);
  const auto options = arguments.features.options().dtype(call.accumulate());
  at::Tensor weight = arguments.head_weight.to(call.accumulate());
  if (padded != width) {
    weight = at::constant_pad_nd(weight, {0, padded - width});
  }
  at::Tensor bias;
  LinearProblem problem;
  problem.head_weight = weight.const_data_ptr();
  problem.loss = call.problem;
  problem.loss.coefficients = plan.coefficients;
  problem.features = arguments.features.const_data_ptr();
  if (arguments.head_bias.has_value()) {
    bias = arguments.head_bias->to(call.accumulate());
    problem.head_bias = bias.const_data_ptr();
  }
  problem.width = width;
  problem.padded_width = padded;
  problem.dtype = dtype_of(arguments.features);
  problem.head_gradient = arguments.head_gradient;
  problem.two_gradients = plan.two_gradients;

  Gradients gradients;
  if (arguments.features_gradient) {
    gradients.features = at::empty({rows, width}, arguments.features.options());
    problem.features_gradient = gradients.features.data_ptr();
  }
  const int64_t each = part_rows(rows, outputs);
  const int64_t parts = (rows + each - 1) / each;
  const int64_t head_parts = arguments.head_gradient ? parts : 0;
  const at::Tensor weight_parts = at::empty({head_parts, outputs, padded}, options);
  const at::Tensor bias_parts = at::empty({head_parts, outputs}, options);
  std::vector<Sums> sums(parts * call.geometry.heads);
  const int64_t grain = rows * outputs * width < kParallelProducts ? parts : 1;
  at::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      void* weight_gradient = nullptr;
      void* bias_gradient = nullptr;
      if (arguments.head_gradient) {
        weight_gradient = weight_parts[part].zero_().data_ptr();
        bias_gradient = bias_parts[part].zero_().data_ptr();
      }
      kernels().run_linear(problem, part * each, std::min(rows, (part + 1) * each),
                           sums.data() + part * call.geometry.heads, weight_gradient,
                           bias_gradient);
    }
  });
  add(sums, total);
  if (arguments.head_gradient) {
    gradients.weight = weight_parts.sum(0).narrow(1, 0, width);
    gradients.bias = bias_parts.sum(0);
  }
  return gradients;
}

// ---- everything else: matrix products on chunks of rows

int64_t chunk_rows(const Call& call, bool two_gradients) {
  // Of 16-bit features a chunk has a float32 copy beside its logits, and their gradient likewise.
  const bool converted = call.arguments.features.scalar_type() != call.accumulate();
  const int64_t elements = call.outputs() * (two_gradients ? 2 : 1) +
                           (converted ? call.width() * (call.any_gradient() ? 2 : 1) : 0);
  const auto row = elements * static_cast<int64_t>(c10::elementSize(call.accumulate()));
  return std::max<int64_t>(1, kChunkBytes / row);
}

Gradients run_products(Call& call, const Plan& plan, std::vector<Sums>& total) {
  const LinearBiasLossArguments& arguments = call.arguments;
  const at::ScalarType accumulate = call.accumulate();
  const int64_t rows = call.geometry.rows, outputs = call.outputs(), width = call.width();
  const int64_t chunk = std::min(rows, chunk_rows(call, plan.two_gradients));
  const bool converted = arguments.features.scalar_type() != accumulate;
  const auto options = arguments.features.options().dtype(accumulate);
  const at::Tensor weight = arguments.head_weight.to(accumulate);
  at::Tensor bias;
  if (arguments.head_bias.has_value()) {
    bias = arguments.head_bias->to(accumulate);
  }
  // The first gradient overwrites the logits.
  const at::Tensor buffer = at::empty({chunk, outputs}, options);
  const at::Tensor second = at::empty({plan.two_gradients ? chunk : 0, outputs}, options);
  Gradients gradients;
  if (arguments.features_gradient) {
    gradients.features = at::empty({rows, width}, arguments.features.options());
  }
  if (arguments.head_gradient) {
    gradients.weight = at::empty({outputs, width}, options);
    gradients.bias = at::zeros({outputs}, options);
  }
  Problem problem = call.problem;
  problem.coefficients = plan.coefficients;
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t count = std::min(chunk, rows - first);
    const at::Tensor x = arguments.features.narrow(0, first, count).to(accumulate);
    at::Tensor logits = buffer.narrow(0, 0, count);
    if (bias.defined()) {
      at::addmm_out(logits, bias, x, weight.t());
    } else {
      at::mm_out(logits, x, weight.t());
    }
    place_rows(call.problem, first, count, logits.element_size(), problem);
    problem.logits = logits.const_data_ptr();
    at::Tensor head_gradient = logits;
    if (call.any_gradient()) {
      problem.gradient = logits.data_ptr();
    }
    if (plan.two_gradients) {
      head_gradient = second.narrow(0, 0, count);
      problem.head_gradient = head_gradient.data_ptr();
    }
    run(problem, count * outputs, total);
    if (arguments.features_gradient) {
      at::Tensor to = gradients.features.narrow(0, first, count);
      if (converted) {
        to.copy_(at::mm(logits, weight).mul_(plan.features_factor));
      } else {
        at::addmm_out(to, to, logits, weight, 0.0, plan.features_factor);
      }
    }
    if (arguments.head_gradient) {
      at::addmm_out(gradients.weight, gradients.weight, head_gradient.t(), x,
                    first > 0 ? 1.0 : 0.0);
      if (bias.defined()) {
        gradients.bias.add_(head_gradient.sum(0));
      }
    }
  }
  return gradients;
}

// ---- the operators

using GradientTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Runs the problem; returns the gradients in the dtypes of their tensors.
GradientTensors run_call(Call& call, std::vector<Sums>& total) {
  const LinearBiasLossArguments& arguments = call.arguments;
  const at::Tensor& features = arguments.features;
  Gradients gradients;
  if (call.geometry.rows == 0) {
    gradients.features = at::zeros_like(features);
    gradients.weight = at::zeros_like(arguments.head_weight);
    gradients.bias = at::zeros({call.outputs()}, features.options());
  } else {
    const bool kernel = uses_kernel(call);
    const Plan plan = make_plan(arguments, call.problem.coefficients, !kernel);
    gradients = kernel ? run_kernel(call, plan, total) : run_products(call, plan, total);
  }
  const auto result = [&](const at::Tensor& gradient, bool wanted) {
    return wanted ? gradient.to(features.scalar_type()).contiguous()
                  : at::empty({0}, features.options());
  };
  return {result(gradients.features, arguments.features_gradient),
          result(gradients.weight, arguments.head_gradient),
          result(gradients.bias, arguments.head_gradient && arguments.head_bias.has_value())};
}

LinearBiasLossArguments collect(const at::Tensor& features, const at::Tensor& head_weight,
                                const std::optional<at::Tensor>& head_bias,
                                const at::Tensor& target, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& reversal,
                                const std::optional<at::Tensor>& entropy_weight,
                                const std::optional<at::Tensor>& confusion_weight,
                                int64_t ignore_index, double label_smoothing, int64_t reduction,
                                bool mask_entropy, int64_t heads, bool features_gradient,
                                bool head_gradient) {
  return {features,
          head_weight,
          head_bias,
          {{},
           target,
           weight,
           reversal,
           entropy_weight,
           confusion_weight,
           ignore_index,
           label_smoothing,
           static_cast<Reduction>(reduction),
           mask_entropy,
           heads},
          features_gradient,
          head_gradient};
}

// Matrix products in here are of the operator: neither autograd nor autocast has a say in them.
struct PlainTensors {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

using ForwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ForwardResult linear_bias_loss(const at::Tensor& features, const at::Tensor& head_weight,
                               const std::optional<at::Tensor>& head_bias, const at::Tensor& target,
                               const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& reversal,
                               const std::optional<at::Tensor>& entropy_weight,
                               const std::optional<at::Tensor>& confusion_weight,
                               int64_t ignore_index, double label_smoothing, int64_t reduction,
                               bool mask_entropy, int64_t heads, bool features_gradient,
                               bool head_gradient) {
  const PlainTensors guard;
  at::Tensor denominators;
  Call call = make_call(collect(features, head_weight, head_bias, target, weight, reversal,
                                entropy_weight, confusion_weight, ignore_index, label_smoothing,
                                reduction, mask_entropy, heads, features_gradient, head_gradient),
                        denominators);
  const BiasLossArguments& loss = call.arguments.loss;
  const Coefficients coefficients = call.problem.coefficients;
  const auto options = features.options().dtype(call.accumulate()).memory_format(std::nullopt);
  std::vector<Sums> sums(heads);
  GradientTensors gradients;
  Values values;
  if (loss.reduction == Reduction::kNone) {
    const SiteValues sites(call.geometry, options, call.problem);
    gradients = run_call(call, sums);
    values = sites.values(loss, coefficients);
  } else {
    gradients = run_call(call, sums);
    values = reduced_values(sums, denominators, loss, coefficients, options);
  }
  const auto& [for_features, for_weight, for_bias] = gradients;
  return {values.loss,  values.cross_entropy, values.entropy, denominators.to(call.accumulate()),
          for_features, for_weight,           for_bias};
}

GradientTensors linear_bias_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& features, const at::Tensor& head_weight,
    const std::optional<at::Tensor>& head_bias, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, const at::Tensor& denominators,
    const std::optional<at::Tensor>& reversal, const std::optional<at::Tensor>& entropy_weight,
    const std::optional<at::Tensor>& confusion_weight, int64_t ignore_index, double label_smoothing,
    int64_t reduction, bool mask_entropy, int64_t heads, bool features_gradient,
    bool head_gradient) {
  const PlainTensors guard;
  at::Tensor divisors = denominators;
  Call call = make_call(collect(features, head_weight, head_bias, target, weight, reversal,
                                entropy_weight, confusion_weight, ignore_index, label_smoothing,
                                reduction, mask_entropy, heads, features_gradient, head_gradient),
                        divisors);
  const at::Tensor upstream = prepare_upstream(grad_loss, call.arguments.loss);
  call.problem.upstream = upstream.const_data_ptr();
  call.problem.upstream_per_site = call.arguments.loss.reduction == Reduction::kNone;
  std::vector<Sums> sums(heads);
  return run_call(call, sums);
}

}  // namespace
}  // namespace lnl::cpu

TORCH_LIBRARY_IMPL(lnl_ext, CPU, m) {
  m.impl("linear_bias_loss", &lnl::cpu::linear_bias_loss);
  m.impl("linear_bias_loss_backward", &lnl::cpu::linear_bias_loss_backward);
}
