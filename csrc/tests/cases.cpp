// The list of cases: every kernel, dtype, layout and option, and the edges of each.
#include <cmath>
#include <limits>
#include <random>
#include <sstream>
#include <utility>

#include "bias_loss_case.h"

namespace lnl::tests {

namespace {

struct Shape {
  std::int64_t rows, heads, classes, positions;
};

// Options that go round with the shapes; together they hold every option and most pairs.
std::vector<Case> option_sets() {
  std::vector<Case> sets;
  const auto add = [&](auto change) {
    Case c;
    change(c);
    sets.push_back(c);
  };
  add([](Case&) {});
  add([](Case& c) { c.entropy_weight = 0.3, c.reversal = 0.7; });
  add([](Case& c) {
    c.entropy_weight = 0.2, c.weighted = true, c.ignored = 0.3, c.mask_entropy = true;
  });
  add([](Case& c) {
    c.reduction = Reduction::kSum, c.entropy_weight = 0.1, c.reversal = 0.5;
    c.coefficients_on_device = true, c.ignored = 0.2, c.head_gradient = false;
  });
  add([](Case& c) {
    c.reduction = Reduction::kNone, c.entropy_weight = 0.4, c.separate_backward = true;
    c.weighted = true, c.ignored = 0.2;
  });
  add([](Case& c) {
    c.smoothing = 0.1, c.weighted = true, c.entropy_weight = 0.3, c.reversal = 0.6;
    c.ignored = 0.3;
  });
  add([](Case& c) {
    c.target = Target::kProbabilities, c.entropy_weight = 0.2, c.reversal = 0.1;
    c.separate_backward = true;
  });
  add([](Case& c) {
    c.target = Target::kWideProbabilities, c.weighted = true, c.smoothing = 0.2;
    c.reduction = Reduction::kNone, c.entropy_weight = 0.2, c.coefficients_on_device = true;
  });
  add([](Case& c) {
    c.confusion_weight = 0.5, c.reversal = 0.0, c.entropy_weight = 0.0, c.ignored = 0.2;
    c.mask_entropy = true, c.separate_backward = true;
  });
  add([](Case& c) {
    c.confusion_weight = 0.5, c.entropy_weight = 0.3, c.reduction = Reduction::kSum;
    c.target = Target::kProbabilities, c.gradient = false;
  });
  add([](Case& c) { c.gradient = c.head_gradient = false, c.entropy_weight = 0.2; });
  add([](Case& c) {
    c.reduction = Reduction::kNone, c.confusion_weight = 0.4, c.ignored = 0.3;
    c.coefficients_on_device = true, c.separate_backward = true, c.reversal = 0.3;
  });
  // Without weights: labels of which some blocks, or all, have ignored ones.
  add([](Case& c) { c.entropy_weight = 0.3, c.reversal = 0.7, c.ignored = 0.02; });
  add([](Case& c) {
    c.smoothing = 0.1, c.entropy_weight = 0.2, c.ignored = 0.3, c.mask_entropy = true;
  });
  add([](Case& c) { c.entropy_weight = 0.1, c.ignored = 0.3, c.reversal = 0.4; });
  return sets;
}

const Shape kShapes[] = {
    // rows_small
    {1, 1, 1, 1},
    {5, 1, 2, 1},
    {70, 1, 3, 1},
    {33, 1, 8, 1},
    {300, 1, 12, 1},
    {31, 3, 7, 1},
    {50, 2, 31, 1},
    {40, 1, 32, 1},
    {450, 3, 5, 1},
    // rows_medium
    {9, 1, 33, 1},
    {60, 3, 40, 1},
    {7, 1, 64, 1},
    {5, 3, 100, 1},
    {6, 1, 257, 1},
    {3, 1, 497, 1},
    {3, 2, 1000, 1},
    // rows_large
    {5, 2, 1025, 1},
    {3, 2, 4099, 1},
    // sites_small (channels_last: rows again)
    {3, 1, 2, 5},
    {2, 1, 8, 196},
    {1, 3, 8, 64},
    {2, 2, 5, 49},
    {4, 2, 5, 300},
    {1, 1, 16, 256},
    {1, 2, 32, 72},
    {3, 1, 3, 128},
    {2, 1, 1, 16},
    // sites_large
    {1, 1, 33, 40},
    {2, 2, 65, 33},
    {1, 1, 150, 64},
    {2, 1, 1100, 3},
};

// Up to the most classes that are supported: on chip, and from about 58,000 of 4 bytes on not.
const Shape kManyClasses[] = {
    {2, 1, 8191, 1},   {1, 2, 8192, 1},   {2, 1, 32000, 1},  {1, 1, 65536, 1},
    {1, 1, 131072, 1}, {1, 1, 131073, 1}, {1, 1, 262144, 1}, {1, 1, 1790, 35},
    {1, 1, 1900, 33},  {1, 2, 8193, 3},   {1, 1, 65536, 2},
};

const Shape kEmptyShapes[] = {{0, 1, 5, 1}, {0, 2, 5, 3}, {4, 1, 5, 0}};

}  // namespace

std::string Case::name() const {
  static const char* dtypes[] = {"float32", "float64", "float16", "bfloat16"};
  static const char* reductions[] = {"none", "mean", "sum"};
  static const char* targets[] = {"labels", "probabilities", "wide-probabilities"};
  static const char* patterns[] = {"normal",       "large", "certain",       "ties", "infinite",
                                   "infinite-row", "nan",   "plus-infinity", "equal"};
  std::ostringstream out;
  out << dtypes[static_cast<int>(dtype)] << " N" << rows << " K" << heads << " C" << classes << " S"
      << positions << (channels_last ? " channels_last" : "") << ' '
      << targets[static_cast<int>(target)] << ' ' << patterns[static_cast<int>(pattern)] << ' '
      << reductions[static_cast<int>(reduction)];
  if (weighted) out << " weight";
  if (smoothing > 0) out << " smoothing=" << smoothing;
  if (ignored > 0) out << " ignored=" << ignored;
  if (out_of_range) out << " out-of-range";
  if (mask_entropy) out << " mask_entropy";
  if (reversal >= 0) out << " reversal=" << reversal;
  if (entropy_weight >= 0) out << " entropy=" << entropy_weight;
  if (confusion_weight >= 0) out << " confusion=" << confusion_weight;
  if (coefficients_on_device) out << " on-device";
  if (!gradient) out << " no-gradient";
  if (!head_gradient) out << " no-head-gradient";
  if (separate_backward) out << " backward";
  if (few_blocks) out << " few-blocks";
  if (many_blocks) out << " many-blocks";
  if (in_place) out << " in-place";
  if (misaligned != 0) out << " misaligned=" << misaligned;
  if (misaligned_gradient) out << " misaligned-gradient";
  if (misaligned_head_gradient) out << " misaligned-head-gradient";
  if (misaligned_labels) out << " misaligned-labels";
  if (bulk_copies) out << " bulk-copies";
  if (shared_memory != 227 * 1024) out << " shared=" << shared_memory;
  return out.str();
}

Inputs make_inputs(const Case& c) {
  Inputs inputs;
  std::mt19937_64 random(c.seed);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  const bool narrow = c.dtype == DType::kFloat16 || c.dtype == DType::kBFloat16;
  const DType wide = c.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  inputs.logits.resize(c.elements());
  inputs.labels.resize(c.rows * c.heads * c.positions);
  for (auto& label : inputs.labels) {
    label = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(c.classes));
  }
  for (auto& logit : inputs.logits) {
    switch (c.pattern) {
      case Pattern::kLarge:
        logit = (uniform(random) * 2 - 1) * 1e4;
        break;
      case Pattern::kTies:
        logit = static_cast<double>(random() % 3);
        break;
      case Pattern::kCertain:
      case Pattern::kEqual:
        logit = 0;
        break;
      default:
        logit = 2 * normal(random);
    }
    logit = rounded(c.dtype, logit);
  }
  const double infinite = std::numeric_limits<double>::infinity();
  std::int64_t site = 0;
  for (std::int64_t row = 0; row < c.rows; ++row) {
    for (std::int64_t head = 0; head < c.heads; ++head) {
      for (std::int64_t position = 0; position < c.positions; ++position, ++site) {
        const std::int64_t label = inputs.labels[site];
        const auto at = [&](std::int64_t k) -> double& {
          return inputs.logits[c.element(row, head, k, position)];
        };
        if (c.pattern == Pattern::kCertain) {
          // Certain of the label, or of another class.
          at(site % 3 == 0 ? (label + 1) % c.classes : label) = 20;
        }
        if (c.pattern == Pattern::kInfinite) {
          for (std::int64_t k = 0; k < c.classes; ++k) {
            if (k != label && (site + k) % 3 == 0) at(k) = -infinite;
          }
        }
        if (c.pattern == Pattern::kInfiniteRow && site % 4 == 1) {
          for (std::int64_t k = 0; k < c.classes; ++k) at(k) = -infinite;
        }
        if (c.pattern == Pattern::kNotANumber && site == 1) {
          at(c.classes / 2) = std::numeric_limits<double>::quiet_NaN();
        }
        if (c.pattern == Pattern::kPlusInfinity && site == 1) at(c.classes / 2) = infinite;
      }
    }
  }
  for (auto& label : inputs.labels) {
    if (uniform(random) < c.ignored) label = kIgnoreIndex;
  }
  if (c.out_of_range && !inputs.labels.empty()) {
    inputs.labels[0] = c.classes;
    inputs.labels[inputs.labels.size() / 2] = -5;
    inputs.labels.back() = std::int64_t{1} << 40;
  }
  if (c.target != Target::kLabels) {
    inputs.probabilities.resize(c.elements());
    const DType dtype = c.target == Target::kWideProbabilities ? wide : c.dtype;
    for (auto& q : inputs.probabilities) q = rounded(dtype, uniform(random) / c.classes);
  }
  if (c.weighted) {
    for (std::int64_t k = 0; k < c.classes; ++k) {
      inputs.weight.push_back(rounded(wide, 0.25 + uniform(random)));
    }
  }
  const bool none = c.reduction == Reduction::kNone;
  for (std::int64_t i = 0; i < (none ? c.sites() : 1); ++i) {
    inputs.upstream.push_back(rounded(wide, (narrow ? 64.0 : 1.5) * (0.5 + uniform(random))));
  }
  return inputs;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  const std::vector<Case> options = option_sets();
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  std::size_t turn = 0;
  std::uint64_t number = 0;
  const auto add = [&](Case c, const Shape& shape, DType dtype) {
    c.rows = shape.rows, c.heads = shape.heads, c.classes = shape.classes;
    c.positions = shape.positions;
    c.dtype = dtype;
    c.seed = ++number;
    c.few_blocks = c.seed % 2 == 0;
    cases.push_back(c);
    // rows_large has two ways to stage its rows.
    const bool rows = c.positions == 1 || c.channels_last;
    if (!rows || c.classes * (dtype == DType::kFloat64 ? 2 : 1) <= 1024) return;
    c.bulk_copies = true;
    cases.push_back(c);
  };
  // Every shape, dtype and layout with a third of the option sets, other ones each time.
  for (const Shape& shape : kShapes) {
    for (const DType dtype : dtypes) {
      for (int layout = 0; layout < (shape.positions > 1 ? 2 : 1); ++layout) {
        for (std::size_t i = turn++ % 3; i < options.size(); i += 3) {
          Case c = options[i];
          c.channels_last = layout == 1;
          add(c, shape, dtype);
        }
      }
    }
  }
  // Every pattern of logits on every kernel.
  const Shape by_kernel[] = {{37, 1, 6, 1},  {5, 1, 77, 1}, {3, 1, 700, 1}, {2, 1, 1500, 1},
                             {2, 1, 6, 36},  {2, 1, 6, 40}, {2, 1, 7, 15},  {1, 1, 40, 36},
                             {1, 2, 40, 48}, {2, 1, 40, 15}};
  for (const Shape& shape : by_kernel) {
    for (const DType dtype : dtypes) {
      for (int pattern = 1; pattern <= static_cast<int>(Pattern::kPlusInfinity); ++pattern) {
        Case c = options[1 + (turn++ & 1)];
        c.pattern = static_cast<Pattern>(pattern);
        const bool many = shape.classes == 1500;
        c.shared_memory = (many && pattern % 2 == 1 ? 2 : 227) * 1024;
        if (dtype == DType::kFloat64 && shape.classes == 700) continue;
        add(c, shape, dtype);
        if (pattern <= static_cast<int>(Pattern::kInfinite)) {
          c = options[5 + turn % 2];
          c.pattern = static_cast<Pattern>(pattern);
          if (c.smoothing > 0 && c.pattern == Pattern::kInfinite) c.smoothing = 0;
          if (c.target != Target::kLabels && c.pattern == Pattern::kInfinite) continue;
          add(c, shape, dtype);
        }
      }
      // Labels out of range and all labels ignored.
      Case c = options[1];
      c.out_of_range = true;
      add(c, shape, dtype);
      c.smoothing = 0.1;
      add(c, shape, dtype);
      c = options[2];
      c.ignored = 1.1;
      c.mask_entropy = false;
      add(c, shape, dtype);
      // NaN at sites to which no term gives a gradient.
      c = Case{};
      c.pattern = Pattern::kNotANumber;
      c.ignored = 1.1;
      c.reduction = Reduction::kSum;
      c.entropy_weight = 0.0, c.coefficients_on_device = true;
      add(c, shape, dtype);
      c.confusion_weight = 0.0, c.reversal = 0.3;
      add(c, shape, dtype);
      // Logits off the alignment that wide accesses need.
      c = options[turn % options.size()];
      c.misaligned = 1;
      add(c, shape, dtype);
      c = options[6];
      c.misaligned = 3;
      add(c, shape, dtype);
      // One gradient off it where nothing else is.
      c = options[1];
      c.misaligned_gradient = true;
      add(c, shape, dtype);
      std::swap(c.misaligned_gradient, c.misaligned_head_gradient);
      add(c, shape, dtype);
      // A gradient over the logits: with either or both wanted, and where each class has a target.
      const bool large = shape.classes > 1024 || (shape.positions > 1 && shape.classes > 32);
      for (const int shared_memory : {227 * 1024, 2 * 1024}) {
        if (shared_memory < 227 * 1024 && !large) continue;
        c = options[1];
        c.in_place = true;
        c.shared_memory = shared_memory;
        add(c, shape, dtype);
        c.gradient = false;
        add(c, shape, dtype);
        c = options[5];
        c.in_place = true;
        c.shared_memory = shared_memory;
        c.misaligned = 3;
        add(c, shape, dtype);
      }
      // Labels that cannot be read two at a time.
      for (const std::size_t i : {2u, 5u}) {
        c = options[i];
        c.misaligned_labels = true;
        add(c, shape, dtype);
      }
    }
  }
  for (const DType dtype : dtypes) {
    // Rows and columns too long for the chip.
    for (const std::size_t i : {1u, 6u, 11u}) {
      Case c = options[i];
      c.shared_memory = 4 * 1024;
      add(c, {2, 1, 2100, 1}, dtype);
      c.shared_memory = 24 * 1024;
      add(c, {1, 2, 300, 35}, dtype);
    }
    for (const Shape& shape : kEmptyShapes) {
      add(options[2], shape, dtype);
      add(options[3], shape, dtype);
      add(options[4], shape, dtype);
      add(options[6], shape, dtype);
    }
  }
  // A thread that adds up hundreds of equal terms, whose rounding errors have the same sign; and
  // more partial sums than a fold has threads, of values and of denominators.
  Case sums = options[1];
  sums.gradient = sums.head_gradient = false;
  sums.pattern = Pattern::kEqual;
  add(sums, {100'000, 1, 3, 1}, DType::kFloat32);
  cases.back().few_blocks = true;
  sums.pattern = Pattern::kNormal;
  sums.many_blocks = true;
  add(sums, {33'000, 1, 2, 1}, DType::kFloat32);
  cases.back().few_blocks = false;
  // One block in four has an ignored label; all have to make their gradients again.
  Case turns = options[12];
  turns.ignored = 0.002, turns.many_blocks = true;
  add(turns, {33'000, 1, 2, 1}, DType::kFloat32);
  cases.back().few_blocks = false;
  // Labels, plain or smoothed, and probabilities, narrow or wide, in turn.
  for (const Shape& shape : kManyClasses) {
    for (const DType dtype : dtypes) {
      for (const std::size_t i : {turn % 2 == 0 ? 1u : 5u, turn % 2 == 0 ? 6u : 7u}) {
        add(options[i], shape, dtype);
      }
      ++turn;
    }
  }
  return cases;
}

}  // namespace lnl::tests
