// The operators on CPU tensors: denominators from the targets, the kernels over all threads,
// reductions.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../bias_loss.h"
#include "kernel.h"

namespace lnl::cpu {

const KernelTable& kernels() {
#ifdef LNL_CPU_X86
  static const KernelTable& chosen = []() -> const KernelTable& {
    const std::string capability = at::get_cpu_capability();  // honours ATEN_CPU_CAPABILITY
    if (capability.rfind("AVX512", 0) == 0) {
      return kernels_avx512();
    }
    return capability == "AVX2" ? kernels_avx2() : kernels_baseline();
  }();
  return chosen;
#else
  return kernels_baseline();
#endif
}

namespace {

// A chunk is what one thread takes at a time and sums on its own: fixed, so that results do not
// depend on the number of threads, and large enough to be worth a thread.
constexpr int64_t kChunkElements = 16384;
constexpr int64_t kParallelElements = 32768;

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return DType::kBFloat16;
  }
}

double host_value(const std::optional<at::Tensor>& coefficient, double otherwise) {
  return coefficient.has_value() ? coefficient->item<double>() : otherwise;
}

Coefficients host_coefficients(const BiasLossArguments& arguments) {
  Coefficients coefficients;
  coefficients.cross_entropy =
      arguments.reversal.has_value() ? -host_value(arguments.reversal, 0.0) : 1.0;
  coefficients.entropy = host_value(arguments.entropy_weight, 0.0);
  coefficients.confusion = host_value(arguments.confusion_weight, 0.0);
  coefficients.has_confusion = arguments.confusion_weight.has_value();
  return coefficients;
}

// Names the first target that is out of range, as an index into the tensor the user gave.
[[noreturn]] void report_target(const at::Tensor& target, int64_t ignore_index, int64_t classes) {
  const auto outside =
      (target.ne(ignore_index)).logical_and(target.lt(0).logical_or(target.ge(classes)));
  const auto position = outside.nonzero()[0];
  std::vector<int64_t> index(position.data_ptr<int64_t>(),
                             position.data_ptr<int64_t>() + position.numel());
  at::Tensor value = target;
  for (const int64_t i : index) {
    value = value[i];
  }
  std::string place;
  for (const int64_t i : index) {
    place += (place.empty() ? "" : ", ") + std::to_string(i);
  }
  TORCH_CHECK_INDEX(false, "target[", place, "] is ", value.item<int64_t>(),
                    ", expected a class in [0, ", classes, ") or ignore_index = ", ignore_index);
  std::abort();  // not reached: the check above always throws
}

// [heads, 2] in float64: what the sums of CE and H are divided by. Checks the range of class
// targets.
at::Tensor count_denominators(const BiasLossArguments& arguments, const Geometry& geometry) {
  at::Tensor denominators = at::empty({geometry.heads, 2}, at::kDouble);
  double* const out = denominators.data_ptr<double>();
  const auto sites = static_cast<double>(geometry.sites());
  if (geometry.probability_target) {
    std::fill(out, out + 2 * geometry.heads, sites);
    return denominators;
  }
  const int64_t* const target = arguments.target.const_data_ptr<int64_t>();
  const void* const weight =
      arguments.weight.has_value() ? arguments.weight->const_data_ptr() : nullptr;
  const bool weight_is_double = weight != nullptr && arguments.weight->scalar_type() == at::kDouble;
  const KernelTable& table = kernels();
  // Targets are [rows, heads, positions]. One part is a piece of what belongs to one head: of a
  // plane of positions, or with one position a row, or one head, of all its sites at a stride.
  const bool whole_heads = geometry.positions == 1 || geometry.heads == 1;
  const int64_t planes = whole_heads ? geometry.heads : geometry.rows * geometry.heads;
  const int64_t plane = whole_heads ? geometry.sites() : geometry.positions;
  const int64_t stride = whole_heads ? geometry.heads : 1;
  const int64_t pieces = (plane + kChunkElements - 1) / kChunkElements;
  const int64_t parts = planes * pieces;
  std::vector<TargetCount> counts(parts);
  const int64_t grain = std::max<int64_t>(1, kParallelElements / std::max<int64_t>(1, plane));
  at::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = (part % pieces) * kChunkElements;
      const int64_t count = std::min(kChunkElements, plane - first);
      const int64_t start = whole_heads ? part / pieces : (part / pieces) * plane;
      counts[part] =
          table.count_targets(target + start + first * stride, count, stride,
                              arguments.ignore_index, geometry.classes, weight, weight_is_double);
    }
  });
  std::fill(out, out + 2 * geometry.heads, 0.0);
  for (int64_t part = 0; part < parts; ++part) {
    if (!counts[part].in_range) {
      report_target(arguments.target, arguments.ignore_index, geometry.classes);
    }
    const int64_t head = (part / pieces) % geometry.heads;
    out[2 * head] += counts[part].weight;
    out[2 * head + 1] += static_cast<double>(counts[part].counted);
  }
  if (!arguments.mask_entropy) {
    for (int64_t head = 0; head < geometry.heads; ++head) {
      out[2 * head + 1] = sites;
    }
  }
  return denominators;
}

// What the kernels share between forward and backward; tensors it points into must outlive it.
Problem make_problem(const BiasLossArguments& arguments, const Geometry& geometry) {
  Problem problem;
  problem.logits = arguments.logits.const_data_ptr();
  if (geometry.probability_target) {
    problem.probabilities = arguments.target.const_data_ptr();
    problem.probabilities_accumulate =
        arguments.target.scalar_type() == accumulation_dtype(arguments.logits);
  } else {
    problem.target = arguments.target.const_data_ptr<int64_t>();
  }
  if (arguments.weight.has_value()) {
    problem.weight = arguments.weight->const_data_ptr();
  }
  problem.rows = geometry.rows;
  problem.heads = geometry.heads;
  problem.classes = geometry.classes;
  problem.positions = geometry.positions;
  problem.channels_last = geometry.channels_last;
  problem.dtype = dtype_of(arguments.logits);
  problem.ignore_index = arguments.ignore_index;
  problem.label_smoothing = arguments.label_smoothing;
  problem.mask_entropy = arguments.mask_entropy;
  problem.coefficients = host_coefficients(arguments);
  return problem;
}

std::vector<double> inverse_of(const at::Tensor& denominators, Reduction reduction) {
  std::vector<double> inverse(denominators.numel(), 1.0);
  if (reduction == Reduction::kMean) {
    const at::Tensor values = denominators.to(at::kDouble).contiguous();
    for (int64_t i = 0; i < values.numel(); ++i) {
      inverse[i] = 1.0 / values.const_data_ptr<double>()[i];
    }
  }
  return inverse;
}

// Runs the kernels; returns the sums of every head, added in a fixed order.
std::vector<Sums> run(const Problem& problem, int64_t elements) {
  const KernelTable& table = kernels();
  std::vector<Sums> total(problem.heads);
  if (elements == 0) {
    return total;
  }
  const int64_t units = table.units(problem);
  const int64_t unit_elements = std::max<int64_t>(1, elements / units);
  const int64_t chunk = std::max<int64_t>(1, kChunkElements / unit_elements);
  const int64_t chunks = (units + chunk - 1) / chunk;
  std::vector<Sums> sums(chunks * problem.heads);
  const int64_t grain = elements < kParallelElements ? chunks : 1;
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    table.run(problem, begin, end, chunk, sums.data());
  });
  for (int64_t i = 0; i < chunks * problem.heads; ++i) {
    Sums& head = total[i % problem.heads];
    head.cross_entropy += sums[i].cross_entropy;
    head.entropy += sums[i].entropy;
    head.confusion += sums[i].confusion;
  }
  return total;
}

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
  problem.inverse_denominators = inverse.data();
  const Coefficients coefficients = problem.coefficients;
  Gradients gradients(arguments, problem);

  const auto options =
      logits.options().dtype(accumulation_dtype(logits)).memory_format(std::nullopt);
  at::Tensor loss, cross_entropy, entropy;
  if (arguments.reduction == Reduction::kNone) {
    const std::vector<int64_t> shape{geometry.rows, geometry.heads, geometry.positions};
    cross_entropy = at::empty(shape, options);
    entropy = at::empty(shape, options);
    problem.site_cross_entropy = cross_entropy.data_ptr();
    problem.site_entropy = entropy.data_ptr();
    at::Tensor confusion;
    if (coefficients.has_confusion) {
      confusion = at::empty(shape, options);
      problem.site_confusion = confusion.data_ptr();
    }
    run(problem, geometry.elements());
    const auto sites = site_shape(logits);
    cross_entropy = cross_entropy.sum(1).view(sites);
    entropy = entropy.sum(1).view(sites);
    loss = cross_entropy - coefficients.entropy * entropy;
    if (confusion.defined()) {
      loss = loss + coefficients.confusion * confusion.sum(1).view(sites);
    }
  } else {
    const std::vector<Sums> sums = run(problem, geometry.elements());
    const double* const divisor = denominators.const_data_ptr<double>();
    const bool mean = arguments.reduction == Reduction::kMean;
    Sums value;
    for (int64_t head = 0; head < geometry.heads; ++head) {
      value.cross_entropy += sums[head].cross_entropy / (mean ? divisor[2 * head] : 1.0);
      value.entropy += sums[head].entropy / (mean ? divisor[2 * head + 1] : 1.0);
      value.confusion += sums[head].confusion / (mean ? divisor[2 * head + 1] : 1.0);
    }
    double total = value.cross_entropy - coefficients.entropy * value.entropy;
    if (coefficients.has_confusion) {
      total += coefficients.confusion * value.confusion;
    }
    loss = at::full({}, total, options);
    cross_entropy = at::full({}, value.cross_entropy, options);
    entropy = at::full({}, value.entropy, options);
  }
  return {loss,          cross_entropy, entropy, denominators.to(options.dtype()), gradients.logits,
          gradients.head};
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
  TORCH_CHECK_VALUE(
      denominators.dim() == 2 && denominators.size(0) == heads && denominators.size(1) == 2,
      "denominators has shape ", denominators.sizes(), ", expected (", heads, ", 2)");
  count_denominators(arguments,
                     geometry);  // the targets may have been changed: never index out of range
  const std::vector<double> inverse = inverse_of(denominators, arguments.reduction);
  Problem problem = make_problem(arguments, geometry);
  problem.inverse_denominators = inverse.data();
  problem.upstream = upstream.const_data_ptr();
  problem.upstream_per_site = arguments.reduction == Reduction::kNone;
  Gradients gradients(arguments, problem);
  if (logits_gradient || head_gradient) {
    run(problem, geometry.elements());
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
