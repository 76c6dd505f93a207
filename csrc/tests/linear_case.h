// One call of the linear head's kernels for the tests. Its targets and options are a Case without
// positions; features and head are numbers that the dtype holds exactly.
#pragma once

#include "bias_loss_case.h"

namespace lnl::tests {

struct LinearCase {
  // gradient: of the features; head_gradient: of the head. Its pattern and alignment are not used.
  Case loss;
  std::int64_t width = 8;  // D
  bool bias = true;
  bool unaligned = false;  // features and weights begin one element after a multiple of 16 bytes
  // Rows of a chunk whose logits exist, and then are overwritten by a gradient; 0: on chip.
  std::int64_t chunk = 0;
  bool not_a_number = false;  // a feature is

  std::int64_t columns() const { return loss.heads * loss.classes; }
  std::string name() const;
};

struct LinearInputs {
  Inputs loss;                   // its logits are those of the features and the head
  std::vector<double> features;  // [N, D]
  std::vector<double> weight;    // [K * C, D]
  std::vector<double> bias;      // [K * C]
};

struct LinearResults {
  Results loss;  // without its gradients
  std::vector<double> features_gradient, weight_gradient, bias_gradient;
  // The oracle's: the sums of the magnitudes of what these are sums of, for their rounding errors.
  std::vector<double> features_terms, weight_terms, bias_terms;
};

LinearInputs make_linear_inputs(const LinearCase& c);
LinearResults linear_oracle(const LinearCase& c, const LinearInputs& inputs);
LinearResults run_linear_kernels(const LinearCase& c, const LinearInputs& inputs);
std::string compare_linear(const LinearCase& c, const LinearResults& wanted,
                           const LinearResults& got);
std::vector<LinearCase> all_linear_cases();

}  // namespace lnl::tests
