// Between the operators' calls and the kernels: problems, denominators, values. Shared by the
// operators of both losses.
#pragma once

#include <cstdint>
#include <vector>

#include "../types.h"
#include "kernel.h"

namespace lnl::cpu {

// A chunk is what one thread takes at a time and sums on its own: fixed, so that results do not
// depend on the number of threads, and large enough to be worth a thread.
constexpr int64_t kChunkElements = 16384;
constexpr int64_t kParallelElements = 32768;

// A call's problem, without logits and gradients, and what it points to.
struct PreparedProblem {
  Problem problem;
  // One over what the sums of CE and of everything else are divided by, [heads, 2].
  std::vector<double> inverse;
  // The first label that is no class, or -1. Nothing may be computed with it.
  int64_t wrong_label = -1;

  // Looks at all labels, and writes the denominators of a forward call.
  explicit PreparedProblem(const BiasLossCall& call);
  PreparedProblem(const PreparedProblem&) = delete;
  PreparedProblem& operator=(const PreparedProblem&) = delete;
};

// Runs the kernels on `elements` logits; adds the sums of every head to `total`, in a fixed order.
void run(const Problem& problem, int64_t elements, std::vector<Sums>& total);

// Adds the parts' sums, [parts, heads], to those of every head, in a fixed order.
void add(const std::vector<Sums>& parts, std::vector<Sums>& total);

// The values of a forward call: where an unreduced loss's come from the kernels by head, and the
// way from there, or from the sums, to the call's outputs.
class Values {
 public:
  // Points the problem to memory for the sites' values; does nothing for a backward call.
  Values(const BiasLossCall& call, Problem& problem);
  void write(const BiasLossCall& call, const PreparedProblem& prepared,
             const Coefficients& coefficients, const std::vector<Sums>& sums) const;

 private:
  std::vector<unsigned char> by_head_;  // [3, rows, heads, positions]
};

}  // namespace lnl::cpu
