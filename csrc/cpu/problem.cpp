// From an operator's call to the kernels' problem, and from the kernels' sums to values.
#include "problem.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "capability.h"

namespace lnl::cpu {

const KernelTable& kernels() {
#ifdef LNL_CPU_X86
  switch (capability()) {
    case Capability::kAvx512:
      return kernels_avx512();
    case Capability::kAvx2:
      return kernels_avx2();
    case Capability::kBaseline:
      break;
  }
#endif
  return kernels_baseline();
}

namespace {

// Values of the accumulation dtype, behind a pointer.
double load(const void* values, DType dtype, int64_t i) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(values)[i]
                                  : static_cast<const float*>(values)[i];
}

void store(void* values, DType dtype, int64_t i, double value) {
  if (dtype == DType::kFloat64) {
    static_cast<double*>(values)[i] = value;
  } else {
    static_cast<float*>(values)[i] = static_cast<float>(value);
  }
}

int64_t first_wrong(const BiasLossCall& call) {
  int64_t place = 0;
  for (;; ++place) {
    const int64_t label = call.labels[place];
    if (label != call.ignore_index && (label < 0 || label >= call.classes)) return place;
  }
}

// Fills in [heads, 2]; returns the first wrong label, or -1.
int64_t count(const BiasLossCall& call, std::vector<double>& denominators) {
  const auto sites = static_cast<double>(call.sites());
  std::fill(denominators.begin(), denominators.end(), sites);
  if (call.labels == nullptr) return -1;
  const bool weight_is_double = accumulation_of(call.dtype) == DType::kFloat64;
  const KernelTable& table = kernels();
  // Labels are [rows, heads, positions]. One part is a piece of what belongs to one head: of a
  // plane of positions, or with one position a row, or one head, of all its sites at a stride.
  const bool whole_heads = call.positions == 1 || call.heads == 1;
  const int64_t planes = whole_heads ? call.heads : call.rows * call.heads;
  const int64_t plane = whole_heads ? call.sites() : call.positions;
  const int64_t stride = whole_heads ? call.heads : 1;
  const int64_t pieces = (plane + kChunkElements - 1) / kChunkElements;
  const int64_t parts = planes * pieces;
  std::vector<TargetCount> counts(parts);
  const int64_t grain = std::max<int64_t>(1, kParallelElements / std::max<int64_t>(1, plane));
  torch::stable::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = (part % pieces) * kChunkElements;
      const int64_t size = std::min(kChunkElements, plane - first);
      const int64_t start = whole_heads ? part / pieces : (part / pieces) * plane;
      counts[part] =
          table.count_targets(call.labels + start + first * stride, size, stride, call.ignore_index,
                              call.classes, call.weight, weight_is_double);
    }
  });
  for (int64_t head = 0; head < call.heads; ++head) {
    denominators[2 * head] = 0.0;
    if (call.mask_entropy) denominators[2 * head + 1] = 0.0;
  }
  for (int64_t part = 0; part < parts; ++part) {
    if (!counts[part].in_range) return first_wrong(call);
    const int64_t head = (part / pieces) % call.heads;
    denominators[2 * head] += counts[part].weight;
    if (call.mask_entropy) {
      denominators[2 * head + 1] += static_cast<double>(counts[part].counted);
    }
  }
  return -1;
}

// Numbers that a float32 cannot hold are infinite in it.
double as_held(double value, DType dtype) {
  // By a comparison: GCC 12 leaves two conversions to float and back out where it vectorises them.
  const bool held =
      dtype == DType::kFloat64 || !(std::abs(value) > std::numeric_limits<float>::max());
  return held ? value : std::copysign(std::numeric_limits<double>::infinity(), value);
}

// A term of weight 0 is not added: where sites are ignored it may be NaN.
double total_of(const Coefficients& coefficients, double cross_entropy, double entropy,
                double confusion) {
  double total = cross_entropy;
  if (coefficients.entropy != 0.0) total -= coefficients.entropy * entropy;
  if (coefficients.confusion != 0.0) total += coefficients.confusion * confusion;
  return total;
}

Coefficients coefficients_of(const BiasLossCall& call) {
  Coefficients coefficients;
  coefficients.cross_entropy = call.reversal.present ? -call.reversal.host : 1.0;
  coefficients.entropy = call.entropy_weight.host;
  coefficients.confusion = call.confusion_weight.host;
  coefficients.has_confusion = call.confusion_weight.present;
  return coefficients;
}

}  // namespace

PreparedProblem::PreparedProblem(const BiasLossCall& call) : inverse(2 * call.heads, 1.0) {
  const DType wide = accumulation_of(call.dtype);
  std::vector<double> denominators(2 * call.heads);
  wrong_label = count(call, denominators);
  if (call.reduction == Reduction::kMean) {
    for (int64_t i = 0; i < 2 * call.heads; ++i) {
      if (call.denominators_given) {
        denominators[i] = load(call.denominators, wide, i);
      } else {
        store(call.denominators, wide, i, denominators[i]);
      }
      inverse[i] = 1.0 / denominators[i];
    }
  }
  problem.target = call.labels;
  problem.probabilities = call.probabilities;
  problem.probabilities_accumulate = call.wide_probabilities || wide == call.dtype;
  problem.weight = call.weight;
  problem.upstream = call.upstream;
  problem.upstream_per_site = call.reduction == Reduction::kNone;
  problem.inverse_denominators = inverse.data();
  problem.rows = call.rows;
  problem.heads = call.heads;
  problem.classes = call.classes;
  problem.positions = call.positions;
  problem.channels_last = call.channels_last;
  problem.dtype = call.dtype;
  problem.ignore_index = call.ignore_index;
  problem.label_smoothing = call.label_smoothing;
  problem.mask_entropy = call.mask_entropy;
  problem.coefficients = coefficients_of(call);
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
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
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

Values::Values(const BiasLossCall& call, Problem& problem) {
  if (call.loss == nullptr || call.reduction != Reduction::kNone) return;
  const int64_t bytes = call.sites() * call.heads * size_of(accumulation_of(call.dtype));
  by_head_.resize(3 * bytes);
  problem.site_cross_entropy = by_head_.data();
  problem.site_entropy = by_head_.data() + bytes;
  if (problem.coefficients.has_confusion) problem.site_confusion = by_head_.data() + 2 * bytes;
}

void Values::write(const BiasLossCall& call, const PreparedProblem& prepared,
                   const Coefficients& coefficients, const std::vector<Sums>& sums) const {
  if (call.loss == nullptr) return;
  const DType dtype = accumulation_of(call.dtype);
  if (call.reduction != Reduction::kNone) {
    Sums value;
    for (int64_t head = 0; head < call.heads; ++head) {
      const double* const inverse = prepared.inverse.data() + 2 * head;
      // Also where the mean is not: as in torch, and where the kernels have summed in float32.
      value.cross_entropy += as_held(sums[head].cross_entropy, dtype) * inverse[0];
      value.entropy += sums[head].entropy * inverse[1];
      value.confusion += as_held(sums[head].confusion, dtype) * inverse[1];
    }
    store(call.loss, dtype, 0,
          total_of(coefficients, value.cross_entropy, value.entropy, value.confusion));
    store(call.cross_entropy, dtype, 0, value.cross_entropy);
    store(call.entropy, dtype, 0, value.entropy);
    return;
  }
  // The sites' terms are of the outputs' dtype, and so is what they are multiplied with.
  Coefficients held = coefficients;
  held.entropy = as_held(held.entropy, dtype);
  held.confusion = as_held(held.confusion, dtype);
  const int64_t all = call.sites() * call.heads;
  const int64_t grain =
      kParallelElements / std::clamp<int64_t>(call.positions, 1, kParallelElements);
  torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t position = 0; position < call.positions; ++position) {
        double terms[3] = {};
        for (int64_t head = 0; head < call.heads; ++head) {
          const int64_t place = (row * call.heads + head) * call.positions + position;
          for (int i = 0; i < (coefficients.has_confusion ? 3 : 2); ++i) {
            terms[i] += load(by_head_.data(), dtype, i * all + place);
          }
        }
        const int64_t site = row * call.positions + position;
        store(call.loss, dtype, site, total_of(held, terms[0], terms[1], terms[2]));
        store(call.cross_entropy, dtype, site, terms[0]);
        store(call.entropy, dtype, site, terms[1]);
      }
    }
  });
}

}  // namespace lnl::cpu
