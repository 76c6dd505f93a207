// What the CPU kernels are given: raw pointers, no torch header, so that one source is built per
// instruction set in seconds and chosen at run time.
#pragma once

#include <cstdint>

#include "../types.h"

namespace lnl::cpu {

// Coefficients of the two gradients, already on the host.
struct Coefficients {
  double cross_entropy = 1.0;  // +1, or -reversal
  double entropy = 0.0;        // entropy_weight
  double confusion = 0.0;      // confusion_weight
  bool has_confusion = false;  // whether its value is computed
};

struct Problem {
  const void* logits = nullptr;         // [rows, heads, classes, positions], see Geometry
  const int64_t* target = nullptr;      // [rows, heads, positions], or null
  const void* probabilities = nullptr;  // as logits, or null
  bool probabilities_accumulate =
      false;                       // probabilities have the accumulation dtype, not the logits'
  const void* weight = nullptr;    // [classes] in the accumulation dtype, or null
  const void* upstream = nullptr;  // null: 1
  bool upstream_per_site = false;  // [rows, positions], else one value
  const double* inverse_denominators = nullptr;  // [heads, 2]: cross entropy, entropy
  void* gradient = nullptr;                      // as logits, or null; rows: the logits themselves
  void* head_gradient = nullptr;                 // as logits, or null
  void* site_cross_entropy =
      nullptr;  // [rows, heads, positions] in the accumulation dtype, or null
  void* site_entropy = nullptr;
  void* site_confusion = nullptr;
  int64_t rows = 0;
  int64_t heads = 1;
  int64_t classes = 0;
  int64_t positions = 1;
  bool channels_last = false;
  DType dtype = DType::kFloat32;
  int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  bool mask_entropy = false;
  Coefficients coefficients;
};

// The same problem for `count` rows from `first` on, whose logits and gradients are elsewhere: what
// it reads and writes per row, in values of `size` bytes. One position; static, so that no
// instruction set's version is taken for another's.
static inline void place_rows(const Problem& whole, int64_t first, int64_t count, int64_t size,
                              Problem& part) {
  const auto read = [&](const void* from, int64_t values) -> const void* {
    return from == nullptr ? nullptr : static_cast<const char*>(from) + first * values * size;
  };
  const auto write = [&](void* to) -> void* {
    return to == nullptr ? nullptr : static_cast<char*>(to) + first * whole.heads * size;
  };
  part.rows = count;
  part.target = whole.target == nullptr ? nullptr : whole.target + first * whole.heads;
  part.probabilities = read(whole.probabilities, whole.heads * whole.classes);
  part.upstream = whole.upstream_per_site ? read(whole.upstream, 1) : whole.upstream;
  part.site_cross_entropy = write(whole.site_cross_entropy);
  part.site_entropy = write(whole.site_entropy);
  part.site_confusion = write(whole.site_confusion);
}

// A linear layer with few outputs before the problem's logits, which exist a block of rows at a
// time.
struct LinearProblem {
  // One position, channels_last. Logits and gradients are not given; probabilities have the
  // accumulation dtype.
  Problem loss;
  const void* features = nullptr;     // [rows, width]
  const void* head_weight = nullptr;  // [heads * classes, padded_width], accumulation dtype
  const void* head_bias = nullptr;    // [heads * classes], accumulation dtype, or null
  void* features_gradient = nullptr;  // [rows, width], or null
  int64_t width = 0;
  int64_t padded_width = 0;       // a multiple of kWidthMultiple, filled with zeros
  DType dtype = DType::kFloat32;  // of features and their gradient
  bool head_gradient = false;
  bool two_gradients = false;  // of the logits: the features' and dCE for the head
};
constexpr int64_t kWidthMultiple = 16;
constexpr int64_t kMostLinearClasses = 64;

// Sums over a part of the sites of one head.
struct Sums {
  double cross_entropy = 0.0;
  double entropy = 0.0;
  double confusion = 0.0;
};

// Rows [begin, end); adds to the sums [heads], and to the gradients of weight
// [heads * classes, padded_width] and bias [heads * classes] in the accumulation dtype.
using LinearKernel = void (*)(const LinearProblem&, int64_t begin, int64_t end, Sums* sums,
                              void* weight_gradient, void* bias_gradient);

// What one pass over the targets of one head finds.
struct TargetCount {
  double weight = 0.0;   // of the sites that are not ignored (their number without weights)
  int64_t counted = 0;   // sites that are not ignored
  bool in_range = true;  // every target is ignored or in [0, classes)
};

// One instruction set's kernels.
struct KernelTable {
  const char* name;
  // How many units of work a problem has. A unit is a few sites; its results do not depend on which
  // other units the same call computes.
  int64_t (*units)(const Problem&);
  // Chunks [begin, end) of `chunk` units each; adds chunk i's sums to sums[i * heads ...].
  void (*run)(const Problem&, int64_t begin, int64_t end, int64_t chunk, Sums* sums);
  LinearKernel run_linear;
  // target[0], target[stride], ... : `count` of them.
  TargetCount (*count_targets)(const int64_t* target, int64_t count, int64_t stride,
                               int64_t ignore_index, int64_t classes, const void* weight,
                               bool weight_is_double);
  // gradient *= factor, in float32 for the halves.
  void (*scale)(void* gradient, int64_t begin, int64_t end, DType dtype, double factor);
};

const KernelTable& kernels_baseline();
LinearKernel linear_baseline();
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LNL_CPU_X86 1
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
LinearKernel linear_avx2();
LinearKernel linear_avx512();
#endif

// The best that capability() allows.
const KernelTable& kernels();

}  // namespace lnl::cpu
