// Between the operators on CPU tensors and the kernels: problems, denominators, values. Shared by
// the operators of both losses.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../bias_loss.h"
#include "kernel.h"

namespace lnl::cpu {

// A chunk is what one thread takes at a time and sums on its own: fixed, so that results do not
// depend on the number of threads, and large enough to be worth a thread.
constexpr int64_t kChunkElements = 16384;
constexpr int64_t kParallelElements = 32768;

DType dtype_of(const at::Tensor& tensor);

// [heads, 2] in float64: what the sums of CE and H are divided by. Checks the range of class
// targets.
at::Tensor count_denominators(const BiasLossArguments& arguments, const Geometry& geometry);

// One over the denominators of a mean, [heads, 2]; ones for the other reductions.
std::vector<double> inverse_of(const at::Tensor& denominators, Reduction reduction);

void check_denominators(const at::Tensor& denominators, int64_t heads);

// What the kernels share between forward and backward, but for the logits; tensors it points into
// must outlive it.
Problem make_problem(const BiasLossArguments& arguments, const Geometry& geometry);

// Runs the kernels on the sites from `begin` on, of which there are `elements` logits; adds the
// sums of every head to `total`, in a fixed order.
void run(const Problem& problem, int64_t elements, std::vector<Sums>& total);

// Adds the parts' sums, [parts, heads], to those of every head, in a fixed order.
void add(const std::vector<Sums>& parts, std::vector<Sums>& total);

// What a forward operator returns first.
struct Values {
  at::Tensor loss;
  at::Tensor cross_entropy;
  at::Tensor entropy;
};

// The tensors that an unreduced loss is written to.
class SiteValues {
 public:
  // `options`: of the values. Points the problem to the tensors.
  SiteValues(const Geometry& geometry, const at::TensorOptions& options, Problem& problem);
  Values values(const BiasLossArguments& arguments, const Coefficients& coefficients) const;

 private:
  at::Tensor cross_entropy_, entropy_, confusion_;  // [rows, heads, positions]
};

// The values of a mean or a sum. `sums` are those of every head.
Values reduced_values(const std::vector<Sums>& sums, const at::Tensor& denominators,
                      const BiasLossArguments& arguments, const Coefficients& coefficients,
                      const at::TensorOptions& options);

}  // namespace lnl::cpu
