// linear_bias_loss on CPU tensors.
//
// Few outputs on many rows: the kernels do the products themselves, see linear_runner.h. Otherwise
// the products are what takes the time, and torch's matrix products do them on chunks of rows.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../backend.h"
#include "kernel.h"
#include "problem.h"

namespace lnl::cpu {

namespace {

// Up to so many outputs the kernels are faster than torch's products: (4096, 2048, 64) takes 22 ms
// here and 27 ms there, on two cores with AVX-512.
constexpr int64_t kMostKernelOutputs = 64;
constexpr int64_t kPartRows = 64;  // a part's rows are a multiple of it
constexpr int64_t kMostParts = 256;
constexpr int64_t kParallelProducts = 262144;
constexpr int64_t kChunkBytes = int64_t{64} << 20;  // of logits (and converted features) at a time

// ---- which gradients of the logits are needed

struct Plan {
  bool two_gradients = false;
  double features_factor = 1.0;  // of the one gradient, to get the features'
  Coefficients coefficients;     // of the first or only gradient
};

// The features' gradient of the logits and the head's: one where they are equal or not both wanted,
// and with `multiples` where the first is a multiple of the second.
Plan make_plan(const LinearBiasLossCall& call, const Coefficients& coefficients, bool multiples) {
  Plan plan;
  plan.coefficients = coefficients;
  if (!call.loss.reversal.present || call.weight_gradient == nullptr) {
    return plan;
  }
  multiples = multiples && coefficients.entropy == 0.0 && coefficients.confusion == 0.0;
  if (call.features_gradient != nullptr && !multiples) {
    plan.two_gradients = true;
    return plan;
  }
  // In the dtype of the products, where a number too large for it is infinite.
  plan.features_factor = accumulation_of(call.loss.dtype) == DType::kFloat64
                             ? coefficients.cross_entropy
                             : static_cast<float>(coefficients.cross_entropy);
  plan.coefficients.cross_entropy = 1.0;
  plan.coefficients.entropy = plan.coefficients.confusion = 0.0;
  return plan;
}

// A call, its tensors and its problem, whose logits are of the accumulation dtype.
struct LinearTask {
  const LinearBiasLossCall& call;
  backend::LinearTensors& tensors;
  const TensorFacts& features;
  Problem& problem;

  int64_t rows() const { return call.loss.rows; }
  int64_t outputs() const { return call.loss.heads * call.loss.classes; }
  int64_t width() const { return call.width; }
  DType accumulation() const { return accumulation_of(call.loss.dtype); }
  bool converted() const { return call.loss.dtype != accumulation(); }
  bool any_gradient() const {
    return call.features_gradient != nullptr || call.weight_gradient != nullptr;
  }
  Tensor wide(const Tensor& tensor) const {
    const TensorFacts facts(tensor);
    return laid_out(tensor, facts, accumulation(), dense_strides(facts.sizes));
  }
};

// ---- few outputs: the kernels' own products

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

bool uses_kernel(const LinearTask& task) {
  return task.call.loss.classes <= kMostLinearClasses && task.outputs() <= kMostKernelOutputs;
}

// A part is what has a weight's gradient of its own: fixed by the shape, so that results do not
// depend on the number of threads, and large enough that the parts' gradients together are a
// sixteenth of the features.
int64_t part_rows(int64_t rows, int64_t outputs) {
  const int64_t parts =
      std::clamp<int64_t>(rows / std::max(kPartRows, 16 * outputs), 1, kMostParts);
  return round_up((rows + parts - 1) / parts, kPartRows);
}

// The parts' [parts, values] sum in the first one, always in the same order.
template <typename T>
void sum_parts(T* parts, int64_t count, int64_t values) {
  torch::stable::parallel_for(0, values, std::max<int64_t>(1, kParallelElements / count),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  double sum = 0.0;
                                  for (int64_t part = 0; part < count; ++part)
                                    sum += static_cast<double>(parts[part * values + i]);
                                  parts[i] = static_cast<T>(sum);
                                }
                              });
}

void sum_parts(const Tensor& parts, DType dtype, int64_t count, int64_t values) {
  if (dtype == DType::kFloat64) {
    sum_parts(static_cast<double*>(parts.mutable_data_ptr()), count, values);
  } else {
    sum_parts(static_cast<float*>(parts.mutable_data_ptr()), count, values);
  }
}

void run_kernel(const LinearTask& task, const Plan& plan, std::vector<Sums>& total) {
  const LinearBiasLossCall& call = task.call;
  const int64_t rows = task.rows(), outputs = task.outputs(), width = task.width();
  const int64_t heads = call.loss.heads, padded = round_up(width, kWidthMultiple);
  const DType wide = task.accumulation();
  Tensor weight = task.tensors.head_weight;
  if (padded != width) {
    weight = empty({outputs, padded}, wide, task.features);
    zero(weight);
    copy_to(view(weight, {outputs, width}, {padded, 1}, 0), task.tensors.head_weight);
  } else {
    weight = task.wide(weight);
  }
  Tensor bias = weight;
  LinearProblem problem;
  problem.head_weight = weight.const_data_ptr();
  problem.loss = task.problem;
  problem.loss.coefficients = plan.coefficients;
  problem.features = call.features;
  if (task.tensors.head_bias.has_value()) {
    bias = task.wide(*task.tensors.head_bias);
    problem.head_bias = bias.const_data_ptr();
  }
  problem.width = width;
  problem.padded_width = padded;
  problem.dtype = call.loss.dtype;
  problem.features_gradient = call.features_gradient;
  problem.head_gradient = call.weight_gradient != nullptr;
  problem.two_gradients = plan.two_gradients;

  const int64_t each = part_rows(rows, outputs);
  const int64_t parts = (rows + each - 1) / each;
  const int64_t size = size_of(wide);
  const int64_t head_parts = problem.head_gradient ? parts : 0;
  const Tensor weight_parts = empty({head_parts, outputs, padded}, wide, task.features);
  const Tensor bias_parts = empty({head_parts, outputs}, wide, task.features);
  auto* const weight_data = static_cast<char*>(weight_parts.mutable_data_ptr());
  auto* const bias_data = static_cast<char*>(bias_parts.mutable_data_ptr());
  std::vector<Sums> sums(parts * heads);
  const int64_t grain = rows * outputs * width < kParallelProducts ? parts : 1;
  torch::stable::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      char* weight_gradient = nullptr;
      char* bias_gradient = nullptr;
      if (problem.head_gradient) {
        weight_gradient = weight_data + part * outputs * padded * size;
        bias_gradient = bias_data + part * outputs * size;
        std::fill_n(weight_gradient, outputs * padded * size, char{0});
        std::fill_n(bias_gradient, outputs * size, char{0});
      }
      kernels().run_linear(problem, part * each, std::min(rows, (part + 1) * each),
                           sums.data() + part * heads, weight_gradient, bias_gradient);
    }
  });
  add(sums, total);
  if (!problem.head_gradient) return;
  sum_parts(weight_parts, wide, parts, outputs * padded);
  copy_to(task.tensors.weight_gradient, view(weight_parts, {outputs, width}, {padded, 1}, 0));
  if (call.bias_gradient != nullptr) {
    sum_parts(bias_parts, wide, parts, outputs);
    copy_to(task.tensors.bias_gradient, view(bias_parts, {outputs}, {1}, 0));
  }
}

// ---- everything else: matrix products on chunks of rows

// out = beta * self + alpha * a b. Called past the dispatcher: neither autograd nor autocast has a
// say in the operator's own products.
void add_product(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b,
                 double beta, double alpha) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha));
}

int64_t chunk_rows(const LinearTask& task, bool two_gradients) {
  // Of 16-bit features a chunk has a float32 copy beside its logits, and their gradient likewise.
  const int64_t elements = task.outputs() * (two_gradients ? 2 : 1) +
                           (task.converted() ? task.width() * (task.any_gradient() ? 2 : 1) : 0);
  return std::max<int64_t>(1, kChunkBytes / (elements * size_of(task.accumulation())));
}

void run_products(const LinearTask& task, const Plan& plan, std::vector<Sums>& total) {
  const LinearBiasLossCall& call = task.call;
  const DType wide = task.accumulation();
  const int64_t rows = task.rows(), outputs = task.outputs(), width = task.width();
  const int64_t chunk = std::min(rows, chunk_rows(task, plan.two_gradients));
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const bool to_features = call.features_gradient != nullptr;
  const bool to_head = call.weight_gradient != nullptr;
  const bool to_bias = call.bias_gradient != nullptr;
  const Tensor weight = task.wide(task.tensors.head_weight);
  const Tensor transposed = transpose_of(weight, outputs, width);
  OptionalTensor bias;
  if (task.tensors.head_bias.has_value()) bias = task.wide(*task.tensors.head_bias);
  // The first gradient overwrites the logits.
  const Tensor buffer = empty({chunk, outputs}, wide, task.features);
  const Tensor second = empty({plan.two_gradients ? chunk : 0, outputs}, wide, task.features);
  const Tensor wide_features =
      empty({to_features && task.converted() ? chunk : 0, width}, wide, task.features);
  const Tensor weight_sum = to_head && task.converted()
                                ? empty({outputs, width}, wide, task.features)
                                : task.tensors.weight_gradient;
  const Tensor bias_sums = empty({to_bias ? chunks : 0, outputs}, wide, task.features);
  Problem problem = task.problem;
  problem.coefficients = plan.coefficients;
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t count = std::min(chunk, rows - first);
    const Tensor x = task.wide(rows_of(task.tensors.features, first, count, width));
    const Tensor logits = rows_of(buffer, 0, count, outputs);
    if (bias.has_value()) {
      add_product(logits, *bias, x, transposed, 1.0, 1.0);
    } else {
      add_product(logits, logits, x, transposed, 0.0, 1.0);
    }
    place_rows(task.problem, first, count, size_of(wide), problem);
    problem.logits = logits.const_data_ptr();
    if (task.any_gradient()) problem.gradient = logits.mutable_data_ptr();
    if (plan.two_gradients) problem.head_gradient = second.mutable_data_ptr();
    run(problem, count * outputs, total);
    if (to_features) {
      const Tensor to = rows_of(task.tensors.features_gradient, first, count, width);
      const Tensor made = task.converted() ? rows_of(wide_features, 0, count, width) : to;
      add_product(made, made, logits, weight, 0.0, plan.features_factor);
      if (task.converted()) copy_to(to, made);
    }
    if (to_head) {
      const Tensor gradient = plan.two_gradients ? rows_of(second, 0, count, outputs) : logits;
      add_product(weight_sum, weight_sum, transpose_of(gradient, count, outputs), x,
                  first > 0 ? 1.0 : 0.0, 1.0);
      if (to_bias) {
        sum_rows(view(bias_sums, {outputs}, {1}, first / chunk * outputs), gradient);
      }
    }
  }
  if (to_head && task.converted()) copy_to(task.tensors.weight_gradient, weight_sum);
  if (to_bias) {
    sum_parts(bias_sums, wide, chunks, outputs);
    copy_to(task.tensors.bias_gradient, view(bias_sums, {outputs}, {1}, 0));
  }
}

}  // namespace

}  // namespace lnl::cpu

namespace lnl::backend {

std::int64_t linear_bias_loss(const LinearBiasLossCall& call, LinearTensors& tensors,
                              const TensorFacts& features) {
  cpu::PreparedProblem prepared(call.loss);
  if (prepared.wrong_label >= 0) return prepared.wrong_label;
  cpu::Problem& problem = prepared.problem;
  problem.dtype = accumulation_of(call.loss.dtype);
  problem.probabilities_accumulate = true;
  const cpu::Values values(call.loss, problem);
  std::vector<cpu::Sums> sums(call.loss.heads);
  if (call.loss.rows > 0) {
    const cpu::LinearTask task{call, tensors, features, problem};
    const bool kernel = cpu::uses_kernel(task);
    const cpu::Plan plan = cpu::make_plan(call, problem.coefficients, !kernel);
    if (kernel) {
      cpu::run_kernel(task, plan, sums);
    } else {
      cpu::run_products(task, plan, sums);
    }
  }
  values.write(call.loss, prepared, problem.coefficients, sums);
  return -1;
}

}  // namespace lnl::backend
