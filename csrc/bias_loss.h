// Shared by every backend: the options of one call, its geometry, and the argument checks.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace lnl {

// The values of torch's own at::Reduction, which the operators take as an integer.
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// Everything one call is given; the operators of bias_loss.cpp fill it from their arguments.
struct BiasLossArguments {
  at::Tensor logits;                   // [N, K * C, *S]
  at::Tensor target;                   // [N, K, *S] (or [N, *S] for K = 1) int64, or as logits
  std::optional<at::Tensor> weight;    // [C]
  std::optional<at::Tensor> reversal;  // [], none: the true gradient
  std::optional<at::Tensor> entropy_weight;    // [], none: 0
  std::optional<at::Tensor> confusion_weight;  // [], none: the term is not computed
  int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  Reduction reduction = Reduction::kMean;
  bool mask_entropy = false;
  int64_t heads = 1;
  bool logits_gradient = false;
  bool head_gradient = false;
};

// Logits as [rows, heads, classes, positions]; with channels_last the memory order is
// [rows, positions, heads, classes]. One position makes both the same; channels_last is then true.
struct Geometry {
  int64_t rows = 0;
  int64_t heads = 1;
  int64_t classes = 0;
  int64_t positions = 1;
  bool channels_last = false;
  bool probability_target = false;

  int64_t sites() const { return rows * positions; }  // of one head
  int64_t elements() const { return rows * heads * classes * positions; }
};

// Checks shapes, dtypes and devices (no data). Of the logits it reads nothing else.
Geometry check(const BiasLossArguments& arguments);

// Makes target and weight dense, and casts weight and probability targets to a dtype the kernels
// read, as `prepare` says. `transposed`: probabilities are laid out as channels_last.
void prepare_target(BiasLossArguments& arguments, const Geometry& geometry, bool transposed);

// Checks (see above), makes logits, target and weight dense (without a
// copy where they are contiguous or channels_last), and casts weight and probability targets to a
// dtype the kernels read: the logits' own for targets where it is already so, else the accumulation
// dtype.
Geometry prepare(BiasLossArguments& arguments);

// float64 for float64 logits, float32 for every other.
at::ScalarType accumulation_dtype(const at::Tensor& logits);

// [N, *S]: the shape of an unreduced loss.
std::vector<int64_t> site_shape(const at::Tensor& logits);

// Checks the upstream factor of a backward call and returns it dense in the accumulation dtype.
at::Tensor prepare_upstream(const at::Tensor& grad_loss, const BiasLossArguments& arguments);

}  // namespace lnl
