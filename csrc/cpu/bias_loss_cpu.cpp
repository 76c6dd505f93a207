// The operators on CPU tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../backend.h"
#include "../operators.h"
#include "kernel.h"
#include "problem.h"

namespace lnl::backend {

std::int32_t device_type() { return aoti_torch_device_type_cpu(); }

std::int64_t bias_loss(const BiasLossCall& call, const TensorFacts&) {
  cpu::PreparedProblem prepared(call);
  if (prepared.wrong_label >= 0) return prepared.wrong_label;
  cpu::Problem& problem = prepared.problem;
  const cpu::Coefficients coefficients = problem.coefficients;
  problem.logits = call.logits;
  // The kernels write `gradient` first; the head's alone is that with other coefficients.
  problem.gradient = call.gradient;
  problem.head_gradient = call.head_gradient;
  if (call.gradient == nullptr && call.head_gradient != nullptr) {
    problem.gradient = call.head_gradient;
    problem.head_gradient = nullptr;
    problem.coefficients.cross_entropy = 1.0;
    problem.coefficients.entropy = 0.0;
    problem.coefficients.confusion = 0.0;
  }
  const cpu::Values values(call, problem);
  std::vector<cpu::Sums> sums(call.heads);
  cpu::run(problem, call.elements(), sums);
  values.write(call, prepared, coefficients, sums);
  return -1;
}

void scale_gradient(void* gradient, std::int64_t elements, DType dtype, const Coefficient& factor,
                    const TensorFacts&) {
  if (factor.host == 1.0) return;
  torch::stable::parallel_for(0, elements, cpu::kParallelElements,
                              [&](std::int64_t begin, std::int64_t end) {
                                cpu::kernels().scale(gradient, begin, end, dtype, factor.host);
                              });
}

}  // namespace lnl::backend

STABLE_TORCH_LIBRARY_IMPL(lnl_ext, CPU, m) { lnl::implement_operators(m); }
