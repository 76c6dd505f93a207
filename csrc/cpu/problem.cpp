// From an operator's arguments to the kernels' problem, and from the kernels' sums to values.
#include "problem.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <cmath>
#include <string>

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

}  // namespace

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

void check_denominators(const at::Tensor& denominators, int64_t heads) {
  TORCH_CHECK_VALUE(
      denominators.dim() == 2 && denominators.size(0) == heads && denominators.size(1) == 2,
      "denominators has shape ", denominators.sizes(), ", expected (", heads, ", 2)");
}

Problem make_problem(const BiasLossArguments& arguments, const Geometry& geometry) {
  Problem problem;
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

void run(const Problem& problem, int64_t elements, std::vector<Sums>& total) {
  if (elements == 0) {
    return;
  }
  const KernelTable& table = kernels();
  const int64_t units = table.units(problem);
  const int64_t unit_elements = std::max<int64_t>(1, elements / units);
  const int64_t chunk = std::max<int64_t>(1, kChunkElements / unit_elements);
  const int64_t chunks = (units + chunk - 1) / chunk;
  std::vector<Sums> sums(chunks * problem.heads);
  const int64_t grain = elements < kParallelElements ? chunks : 1;
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    table.run(problem, begin, end, chunk, sums.data());
  });
  add(sums, total);
}

void add(const std::vector<Sums>& parts, std::vector<Sums>& total) {
  for (size_t i = 0; i < parts.size(); ++i) {
    Sums& head = total[i % total.size()];
    head.cross_entropy += parts[i].cross_entropy;
    head.entropy += parts[i].entropy;
    head.confusion += parts[i].confusion;
  }
}

SiteValues::SiteValues(const Geometry& geometry, const at::TensorOptions& options,
                       Problem& problem) {
  const std::vector<int64_t> shape{geometry.rows, geometry.heads, geometry.positions};
  cross_entropy_ = at::empty(shape, options);
  entropy_ = at::empty(shape, options);
  problem.site_cross_entropy = cross_entropy_.data_ptr();
  problem.site_entropy = entropy_.data_ptr();
  if (problem.coefficients.has_confusion) {
    confusion_ = at::empty(shape, options);
    problem.site_confusion = confusion_.data_ptr();
  }
}

Values SiteValues::values(const BiasLossArguments& arguments,
                          const Coefficients& coefficients) const {
  const auto sites = site_shape(arguments.logits);
  Values values;
  values.cross_entropy = cross_entropy_.sum(1).view(sites);
  values.entropy = entropy_.sum(1).view(sites);
  values.loss = values.cross_entropy.clone();
  if (coefficients.entropy != 0.0) {
    values.loss.sub_(coefficients.entropy * values.entropy);
  }
  if (coefficients.confusion != 0.0) {
    values.loss.add_(coefficients.confusion * confusion_.sum(1).view(sites));
  }
  return values;
}

namespace {

// Numbers that a float32 cannot hold are infinite in it.
double as_held(double value, const at::TensorOptions& options) {
  const bool wide = options.dtype() == at::kDouble;
  return wide ? value : static_cast<double>(static_cast<float>(value));
}

// Also where its mean is not: as in torch, and where the kernels have summed in float32.
double unless_too_large(double sum, const at::TensorOptions& options) {
  const double held = as_held(sum, options);
  return std::isinf(held) ? held : sum;
}

}  // namespace

Values reduced_values(const std::vector<Sums>& sums, const at::Tensor& denominators,
                      const BiasLossArguments& arguments, const Coefficients& coefficients,
                      const at::TensorOptions& options) {
  const double* const divisor = denominators.const_data_ptr<double>();
  const bool mean = arguments.reduction == Reduction::kMean;
  Sums value;
  for (size_t head = 0; head < sums.size(); ++head) {
    const double by_weight = mean ? divisor[2 * head] : 1.0;
    const double by_site = mean ? divisor[2 * head + 1] : 1.0;
    value.cross_entropy += unless_too_large(sums[head].cross_entropy, options) / by_weight;
    value.entropy += sums[head].entropy / by_site;
    value.confusion += unless_too_large(sums[head].confusion, options) / by_site;
  }
  // A term of weight 0 is not added: where sites are ignored it may be NaN.
  double total = value.cross_entropy;
  if (coefficients.entropy != 0.0) {
    total -= coefficients.entropy * value.entropy;
  }
  if (coefficients.confusion != 0.0) {
    total += coefficients.confusion * value.confusion;
  }
  const auto scalar = [&](double number) {
    return at::full({}, as_held(number, options), options);
  };
  return {scalar(total), scalar(value.cross_entropy), scalar(value.entropy)};
}

}  // namespace lnl::cpu
