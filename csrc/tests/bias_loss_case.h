// One call of the kernels for the tests: its inputs as float64 numbers that the call's dtype holds
// exactly, and its results.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../cuda/bias_loss_launch.h"

namespace lnl::tests {

enum class Target { kLabels, kProbabilities, kWideProbabilities };

// What the logits look like besides normal numbers.
enum class Pattern {
  kNormal,
  kLarge,         // up to +-1e4
  kCertain,       // one class 20 above equal others
  kTies,          // few different values
  kInfinite,      // some classes -inf, never the label's
  kInfiniteRow,   // some sites all -inf
  kNotANumber,    // a NaN
  kPlusInfinity,  // a +inf
  kEqual,         // all the same
};

struct Case {
  DType dtype = DType::kFloat32;
  std::int64_t rows = 1, heads = 1, classes = 2, positions = 1;
  bool channels_last = false;
  Target target = Target::kLabels;
  Pattern pattern = Pattern::kNormal;
  bool weighted = false;
  double smoothing = 0.0;
  double ignored = 0.0;       // share of sites
  bool out_of_range = false;  // one label is
  Reduction reduction = Reduction::kMean;
  bool mask_entropy = false;
  // Absent below 0; coefficients_on_device chooses how they are passed.
  double reversal = -1.0, entropy_weight = -1.0, confusion_weight = -1.0;
  bool coefficients_on_device = false;
  bool gradient = true, head_gradient = true;
  bool separate_backward = false;  // forward without gradients, then backward with upstream
  bool in_place = false;  // the gradient (the head's, where it alone is wanted) is over the logits
  std::int64_t misaligned = 0;  // elements before the logits (not before the gradients)
  bool misaligned_gradient = false, misaligned_head_gradient = false;  // one element before them
  bool misaligned_labels = false;                                      // one label before the first
  bool few_blocks = false;   // so that each takes several turns
  bool many_blocks = false;  // a device with room for more than a block of a fold has threads
  int shared_memory = 227 * 1024;
  bool bulk_copies = false;  // the device has them, as sm_90
  std::uint64_t seed = 1;

  std::int64_t sites() const { return rows * positions; }
  std::int64_t elements() const { return rows * heads * classes * positions; }
  // Where class c of head k at (row, position) lies.
  std::int64_t element(std::int64_t row, std::int64_t head, std::int64_t c,
                       std::int64_t position) const {
    return channels_last ? ((row * positions + position) * heads + head) * classes + c
                         : ((row * heads + head) * classes + c) * positions + position;
  }
  std::string name() const;
};

struct Inputs {
  std::vector<double> logits;         // in memory order
  std::vector<std::int64_t> labels;   // [N, K, S]
  std::vector<double> probabilities;  // in the memory order of logits
  std::vector<double> weight;         // [C]
  std::vector<double> upstream;       // 1, or [N, S]
};

struct Results {
  std::vector<double> loss, cross_entropy, entropy;  // 1, or [N, S]
  std::vector<double> denominators;                  // [K, 2]
  std::vector<double> gradient, head_gradient;       // in memory order
  // The oracle's: the largest p times what it is multiplied with in a gradient. Where every class
  // has a target, p W - y and p - 1 / C are small differences, and the rounding of p is left of
  // them.
  double largest_term = 0;
};

constexpr std::int64_t kIgnoreIndex = -100;

Inputs make_inputs(const Case& c);

// The definition, in extended precision.
Results oracle(const Case& c, const Inputs& inputs);

// The kernels, on the emulator.
Results run_kernels(const Case& c, const Inputs& inputs);

// Differences beyond what the dtype explains, one a line; empty when there are none. `roundings`:
// by how much longer the chains of float32 sums are than those of a warp's lanes.
std::string compare(const Case& c, const Results& wanted, const Results& got, double roundings = 1);

// One comparison: |wanted - got| <= relative * |wanted| + absolute, element by element. NaN and
// infinite numbers must be the same.
std::string differences(const char* what, const std::vector<double>& wanted,
                        const std::vector<double>& got, double relative,
                        const std::vector<double>& absolute);

// The largest finite magnitude.
double largest(const std::vector<double>& values);

// A number rounded to a dtype.
double rounded(DType dtype, double value);

std::vector<Case> all_cases();

}  // namespace lnl::tests
