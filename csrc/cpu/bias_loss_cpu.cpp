// The operators of bias_loss on CPU tensors.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "../bias_loss.h"
#include "kernel.h"
#include "problem.h"

namespace lnl::cpu {

namespace {

// The kernels write `gradient` first; the head's alone is that with other coefficients.
struct Gradients {
  at::Tensor logits;
  at::Tensor head;

  Gradients(const BiasLossArguments& arguments, Problem& problem)
      : logits(allocate(arguments.logits, arguments.logits_gradient)),
        head(allocate(arguments.logits, arguments.head_gradient)) {
    if (arguments.logits_gradient) {
      problem.gradient = logits.data_ptr();
      problem.head_gradient = arguments.head_gradient ? head.data_ptr() : nullptr;
    } else if (arguments.head_gradient) {
      problem.gradient = head.data_ptr();
      problem.coefficients.cross_entropy = 1.0;
      problem.coefficients.entropy = 0.0;
      problem.coefficients.confusion = 0.0;
    }
  }

  static at::Tensor allocate(const at::Tensor& like, bool wanted) {
    return wanted ? at::empty_like(like) : at::empty({0}, like.options());
  }
};

using ForwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ForwardResult bias_loss(const at::Tensor& logits, const at::Tensor& target,
                        const std::optional<at::Tensor>& weight,
                        const std::optional<at::Tensor>& reversal,
                        const std::optional<at::Tensor>& entropy_weight,
                        const std::optional<at::Tensor>& confusion_weight, int64_t ignore_index,
                        double label_smoothing, int64_t reduction, bool mask_entropy, int64_t heads,
                        bool logits_gradient, bool head_gradient) {
  BiasLossArguments arguments{logits,       target,          weight,
                              reversal,     entropy_weight,  confusion_weight,
                              ignore_index, label_smoothing, static_cast<Reduction>(reduction),
                              mask_entropy, heads,           logits_gradient,
                              head_gradient};
  const Geometry geometry = prepare(arguments);
  const at::Tensor denominators = count_denominators(arguments, geometry);
  const std::vector<double> inverse = inverse_of(denominators, arguments.reduction);
  Problem problem = make_problem(arguments, geometry);
  problem.logits = arguments.logits.const_data_ptr();
  problem.inverse_denominators = inverse.data();
  const Coefficients coefficients = problem.coefficients;
  Gradients gradients(arguments, problem);

  const auto options =
      logits.options().dtype(accumulation_dtype(logits)).memory_format(std::nullopt);
  Values values;
  if (arguments.reduction == Reduction::kNone) {
    const SiteValues sites(geometry, options, problem);
    std::vector<Sums> sums(geometry.heads);
    run(problem, geometry.elements(), sums);
    values = sites.values(arguments, coefficients);
  } else {
    std::vector<Sums> sums(geometry.heads);
    run(problem, geometry.elements(), sums);
    values = reduced_values(sums, denominators, arguments, coefficients, options);
  }
  return {values.loss,      values.cross_entropy, values.entropy, denominators.to(options.dtype()),
          gradients.logits, gradients.head};
}

std::tuple<at::Tensor, at::Tensor> bias_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, const at::Tensor& denominators,
    const std::optional<at::Tensor>& reversal, const std::optional<at::Tensor>& entropy_weight,
    const std::optional<at::Tensor>& confusion_weight, int64_t ignore_index, double label_smoothing,
    int64_t reduction, bool mask_entropy, int64_t heads, bool logits_gradient, bool head_gradient) {
  BiasLossArguments arguments{logits,       target,          weight,
                              reversal,     entropy_weight,  confusion_weight,
                              ignore_index, label_smoothing, static_cast<Reduction>(reduction),
                              mask_entropy, heads,           logits_gradient,
                              head_gradient};
  const Geometry geometry = prepare(arguments);
  const at::Tensor upstream = prepare_upstream(grad_loss, arguments);
  check_denominators(denominators, heads);
  count_denominators(arguments,
                     geometry);  // the targets may have been changed: never index out of range
  const std::vector<double> inverse = inverse_of(denominators, arguments.reduction);
  Problem problem = make_problem(arguments, geometry);
  problem.logits = arguments.logits.const_data_ptr();
  problem.inverse_denominators = inverse.data();
  problem.upstream = upstream.const_data_ptr();
  problem.upstream_per_site = arguments.reduction == Reduction::kNone;
  Gradients gradients(arguments, problem);
  if (logits_gradient || head_gradient) {
    std::vector<Sums> sums(geometry.heads);
    run(problem, geometry.elements(), sums);
  }
  return {gradients.logits, gradients.head};
}

void scale_gradient_(at::Tensor& gradient, const at::Tensor& factor) {
  TORCH_CHECK_VALUE(factor.numel() == 1, "factor has shape ", factor.sizes(),
                    ", expected one value");
  TORCH_CHECK_VALUE(gradient.is_non_overlapping_and_dense(), "gradient must be dense, got strides ",
                    gradient.strides());
  TORCH_CHECK_TYPE(at::isFloatingType(gradient.scalar_type()),
                   "gradient must be floating point, got ", gradient.scalar_type());
  const double value = factor.item<double>();
  if (value == 1.0) {
    return;
  }
  void* const data = gradient.data_ptr();
  const DType dtype = dtype_of(gradient);
  at::parallel_for(0, gradient.numel(), kParallelElements, [&](int64_t begin, int64_t end) {
    kernels().scale(data, begin, end, dtype, value);
  });
}

}  // namespace
}  // namespace lnl::cpu

TORCH_LIBRARY_IMPL(lnl_ext, CPU, m) {
  m.impl("bias_loss", &lnl::cpu::bias_loss);
  m.impl("bias_loss_backward", &lnl::cpu::bias_loss_backward);
  m.impl("scale_gradient_", &lnl::cpu::scale_gradient_);
}
