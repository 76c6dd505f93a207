// The arguments of the losses, as every backend takes them: the checks of shapes, dtypes, devices
// and numbers, and the way to raw pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "tensor.h"
#include "types.h"

namespace lnl {

// What both losses are given beside logits, or features and head; in the order of the schemas.
struct LossArguments {
  Tensor target;                    // [N, K, *S] (or [N, *S] for K = 1) int64, or as logits
  OptionalTensor weight;            // [C]
  OptionalTensor denominators;      // [K, 2]; none: the mean's own
  OptionalTensor reversal;          // [], none: the true gradient
  OptionalTensor entropy_weight;    // [], none: 0
  OptionalTensor confusion_weight;  // [], none: the term is not computed
  std::int64_t ignore_index;
  double label_smoothing;
  std::int64_t reduction;
  bool mask_entropy;
  std::int64_t heads;
};

// A call and the tensors that hold what it points to, where those are not the arguments themselves.
struct PreparedLoss {
  BiasLossCall call;
  std::vector<Tensor> held;
  OptionalTensor denominators;  // those given, of the accumulation dtype
  Sizes target_shape;
  bool transposed = false;  // the logits are channels_last, and not contiguous as well
};

// Checks everything but the labels' values and fills in a call but for logits, values and
// gradients. `logits` are facts only: those of a linear head do not exist, and `name` is then what
// they are made of. Probabilities of another dtype than the logits' come in the accumulation dtype,
// with `wide` all do.
PreparedLoss prepare(const LossArguments& arguments, const TensorFacts& logits, const char* name,
                     bool wide);

// The upstream factor of a backward call, and whether it has what it divides by.
void prepare_backward(PreparedLoss& loss, const Tensor& grad_loss, const TensorFacts& logits,
                      const char* name);

// A 0-dim factor of a tensor on `device`: read now where it is on the CPU.
Coefficient coefficient_of(const OptionalTensor& value, const char* name,
                           const TensorFacts& device);

// Raises the error of a wrong label, `place` of which a kernel has found in the target's memory.
void check_labels(std::int64_t place, const BiasLossCall& call, const Sizes& target_shape);

}  // namespace lnl
