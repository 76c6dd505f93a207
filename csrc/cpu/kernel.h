// What the CPU kernels are given: raw pointers, no torch header, so that one source is built per
// instruction set in seconds and chosen at run time.
#pragma once

#include <cstdint>

namespace lnl::cpu {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

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
  void* gradient = nullptr;                      // as logits, or null
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

// Sums over a part of the sites of one head.
struct Sums {
  double cross_entropy = 0.0;
  double entropy = 0.0;
  double confusion = 0.0;
};

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
  // target[0], target[stride], ... : `count` of them.
  TargetCount (*count_targets)(const int64_t* target, int64_t count, int64_t stride,
                               int64_t ignore_index, int64_t classes, const void* weight,
                               bool weight_is_double);
  // gradient *= factor, in float32 for the halves.
  void (*scale)(void* gradient, int64_t begin, int64_t end, DType dtype, double factor);
};

const KernelTable& kernels_baseline();
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LNL_CPU_X86 1
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
#endif

// The best the processor and ATEN_CPU_CAPABILITY allow.
const KernelTable& kernels();

}  // namespace lnl::cpu
