// What the operators and the kernels of every backend agree on: numbers and raw pointers, no torch
// header and no CUDA header, so that kernels compile fast and the emulator can stand in for a
// device.
#pragma once

#include <cstdint>

namespace lnl {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

inline std::int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// In which logits of a dtype are summed, and the dtype of the loss.
inline DType accumulation_of(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

// A number that is either known on the host or read by a kernel, so that nobody waits for it.
struct Coefficient {
  bool present = false;
  const void* device = nullptr;   // wins over host
  DType dtype = DType::kFloat64;  // of the number on the device
  double host = 0.0;

  static Coefficient of(double number) { return {true, nullptr, DType::kFloat64, number}; }
};

// One call. "Accumulation dtype" is float64 for float64 logits and float32 for every other.
struct BiasLossCall {
  DType dtype = DType::kFloat32;
  std::int64_t rows = 0;       // N
  std::int64_t heads = 1;      // K
  std::int64_t classes = 1;    // C
  std::int64_t positions = 1;  // S
  bool channels_last = false;  // memory [N, S, K, C]; else [N, K, C, S]; the same for S = 1

  const void* logits = nullptr;
  const std::int64_t* labels = nullptr;  // [N, K, S], or null with probabilities
  const void* probabilities = nullptr;   // in the memory order of logits
  bool wide_probabilities = false;       // of the accumulation dtype, not of that of logits
  const void* weight = nullptr;          // [C] of the accumulation dtype, or null
  Coefficient reversal, entropy_weight, confusion_weight;
  std::int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  Reduction reduction = Reduction::kMean;
  bool mask_entropy = false;

  // Forward: loss is set, and upstream is null. Backward: loss is null, upstream may be set. All of
  // the accumulation dtype.
  void* loss = nullptr;           // [] or [N, S]
  void* cross_entropy = nullptr;  // likewise
  void* entropy = nullptr;        // likewise
  // [K, 2], what a mean's sums of CE and of everything else are divided by; other reductions have
  // none. A forward call writes them, unless they are given.
  void* denominators = nullptr;
  bool denominators_given = false;
  const void* upstream = nullptr;  // [] or, for Reduction::kNone, [N, S]

  // CUDA: the call is one of several that together make one reduced loss: it writes its sums here,
  // for launch_linear_fold, reads denominators, and leaves loss (which is set), cross_entropy and
  // entropy alone. [LaunchFacts::blocks, K, kPartials] of the accumulation dtype.
  void* partials = nullptr;

  // With `denominators_given`, or in a backward call, one of them may be the logits' own memory: no
  // thread reads a logit that another may have overwritten.
  void* gradient = nullptr;       // dtype and memory order of logits; null: not wanted
  void* head_gradient = nullptr;  // likewise

  std::int64_t sites() const { return rows * positions; }  // of one head
  std::int64_t elements() const { return rows * heads * classes * positions; }
};

// One call of linear_bias_loss, whose logits, features times the transposed head_weight plus
// head_bias, never exist whole.
struct LinearBiasLossCall {
  // Everything about targets, terms and values; one position. Its logits and gradients are unused.
  BiasLossCall loss;
  std::int64_t width = 0;             // D
  const void* features = nullptr;     // [N, D] of loss.dtype
  const void* head_weight = nullptr;  // [K * C, D], likewise
  const void* head_bias = nullptr;    // [K * C], likewise, or null

  // Null where not wanted; of loss.dtype. With loss.reversal the head's two are those of CE alone,
  // without it all three are those of the value.
  void* features_gradient = nullptr;  // [N, D]
  void* weight_gradient = nullptr;    // [K * C, D]
  void* bias_gradient = nullptr;      // [K * C], only together with weight_gradient
};

}  // namespace lnl
