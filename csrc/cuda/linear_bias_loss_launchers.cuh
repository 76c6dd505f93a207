// Launchers of the linear head's kernels: what fits on chip, the grid, the place in the workspace.
#pragma once

#include "bias_loss_launchers.cuh"
#include "linear_bias_loss_kernels.cuh"

namespace lnl::cuda {

struct LinearPlan {
  Plan loss;
  bool on_chip = false;
  int threads = 0;
  int resident = 0;  // blocks of a multiprocessor
  int rows = 0;      // of a tile
  int slices = 0;
  int tile_columns = 0;
  int padded_columns = 0;
  int chunks = 0;
  int pitch = 0;
  LinearLayout layout;
  std::size_t head_partials = 0;  // byte offset into the workspace
  std::size_t workspace = 0;
};

// Shared memory of a block that works on `rows` rows at a time.
template <typename T>
LinearLayout lay_out(const LinearBiasLossCall& call, const LinearPlan& plan) {
  using A = Accumulation<T>;
  LinearLayout layout;
  const auto reserve = [&layout](std::size_t bytes) {
    const std::size_t begin = layout.total;
    layout.total += (bytes + 15) / 16 * 16;
    return begin;
  };
  const std::size_t columns = call.loss.heads * call.loss.classes;
  const std::size_t slots = plan.rows * call.loss.heads;
  // Distances, powers and, when dense, targets; before them the slices' parts of the logits.
  const int least = plan.loss.dense ? 3 : 2;
  const std::size_t tiles = plan.slices > least ? plan.slices : least;
  layout.weight = reserve(plan.padded_columns * plan.pitch * sizeof(A));
  const bool wanted = call.weight_gradient != nullptr;
  layout.weight_gradient = reserve(wanted ? columns * plan.pitch * sizeof(A) : 0);
  layout.tiles = reserve(tiles * slots * plan.loss.pitch * sizeof(A));
  layout.features_factors = reserve(columns * plan.rows * sizeof(A));
  layout.head_factors = reserve(plan.padded_columns * plan.rows * sizeof(A));
  layout.bias = reserve(columns * sizeof(A));
  layout.scales = reserve(call.loss.heads * sizeof(HeadScales<A>));
  layout.totals = reserve(slots * sizeof(Totals<A>));
  layout.bias_gradient = reserve(columns * sizeof(RunningSum<A>));
  layout.features = reserve(std::size_t(plan.rows) * plan.chunks * 16);
  return layout;
}

template <typename T>
LinearPlan make_linear_plan(const LinearBiasLossCall& call, const Device& device) {
  using A = Accumulation<T>;
  LinearPlan plan;
  plan.loss.dense = is_dense(call.loss);
  plan.loss.most_shared = device.shared_memory;
  const std::int64_t columns = call.loss.heads * call.loss.classes;
  if (columns > kMostColumns || call.width > device.shared_memory) return plan;
  plan.tile_columns = tile_columns<T>(static_cast<int>(columns));
  plan.padded_columns = static_cast<int>(divide_up(columns, plan.tile_columns)) * plan.tile_columns;
  plan.chunks = static_cast<int>(divide_up(call.width, kWide<T>));
  plan.pitch = place_of_chunk<T>(kWide<T> == 8 ? static_cast<int>(divide_up(plan.chunks, 8)) * 8
                                               : plan.chunks);
  plan.loss.pitch = static_cast<int>(divide_up(call.loss.classes, 4) | 1) * 4;
  // Larger tiles read and write the sums of the weights' gradient less often; two blocks on a
  // multiprocessor overlap one's loads with the other's arithmetic.
  struct Candidate {
    int threads, rows, resident;
  };
  const Candidate candidates[] = {{256, 32, 2}, {256, 16, 2}, {512, 32, 1},
                                  {512, 16, 1}, {512, 8, 1},  {512, 4, 1}};
  for (const Candidate& candidate : candidates) {
    if (candidate.rows * call.loss.heads > candidate.threads) continue;
    plan.threads = candidate.threads;
    plan.rows = candidate.rows;
    plan.resident = candidate.resident;
    plan.slices = plan.threads / kWarp / (plan.rows / kGroup);
    plan.layout = lay_out<T>(call, plan);
    plan.on_chip = plan.resident <= blocks_by_shared(plan.layout.total, device);
    if (plan.on_chip) break;
  }
  if (!plan.on_chip) return plan;
  const int resident = plan.resident < device.blocks_per_multiprocessor
                           ? plan.resident
                           : device.blocks_per_multiprocessor;
  const std::int64_t most = std::int64_t(device.multiprocessors) * resident;
  const std::int64_t needed = divide_up(call.loss.rows, plan.rows);
  plan.loss.blocks = static_cast<unsigned>(needed < most ? needed : most);
  plan_workspace<T>(call.loss, plan.loss);
  plan_denominators<Accumulation<T>>(call.loss, device, plan.loss);
  plan.head_partials = plan.loss.total;
  plan.workspace = plan.head_partials;
  if (call.weight_gradient != nullptr) {
    plan.workspace += plan.loss.blocks * columns * (call.width + 1) * sizeof(A);
  }
  return plan;
}

template <typename T>
LinearProblem<T> make_linear_problem(const LinearBiasLossCall& call, const LinearPlan& plan,
                                     unsigned char* workspace) {
  using A = Accumulation<T>;
  LinearProblem<T> problem{};
  problem.loss = make_problem<T>(call.loss, plan.loss, workspace);
  problem.features = static_cast<const T*>(call.features);
  problem.head_weight = static_cast<const T*>(call.head_weight);
  problem.head_bias = static_cast<const T*>(call.head_bias);
  problem.features_gradient = static_cast<T*>(call.features_gradient);
  if (call.weight_gradient != nullptr) {
    problem.head_partials = reinterpret_cast<A*>(workspace + plan.head_partials);
  }
  void* wanted = call.features_gradient != nullptr ? call.features_gradient : call.weight_gradient;
  // To the mathematics of a row these only say what is wanted; with reversal the head's differs.
  problem.loss.gradient = static_cast<T*>(wanted);
  if (call.loss.reversal.present) problem.loss.head_gradient = static_cast<T*>(wanted);
  problem.all_rows = call.loss.rows;
  problem.width = static_cast<int>(call.width);
  problem.columns = static_cast<int>(call.loss.heads * call.loss.classes);
  problem.padded_columns = plan.padded_columns;
  problem.chunks = plan.chunks;
  problem.pitch = plan.pitch;
  problem.rows = plan.rows;
  problem.slices = plan.slices;
  const bool whole = call.width % kWide<T> == 0;
  problem.wide_features = whole && aligned(call.features, 16);
  problem.wide_weight = whole && aligned(call.head_weight, 16);
  problem.wide_gradient = whole && aligned(call.features_gradient, 16);
  problem.layout = plan.layout;
  return problem;
}

template <typename T, int kColumns>
cudaError_t launch_on_chip(const LinearPlan& plan, const LinearProblem<T>& problem,
                           cudaStream_t stream) {
  const auto kernel = linear_on_chip<T, kColumns>;
  const cudaError_t error = allow_shared(kernel, plan.layout.total, plan.loss.most_shared);
  if (error != cudaSuccess) return error;
  LNL_LAUNCH(kernel, dim3(plan.loss.blocks), dim3(plan.threads), plan.layout.total, stream,
             problem);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_on_chip(const LinearPlan& plan, const LinearProblem<T>& problem,
                           cudaStream_t stream) {
  if (plan.tile_columns == 4) return launch_on_chip<T, 4>(plan, problem, stream);
  if constexpr (sizeof(T) == 8) {
    return launch_on_chip<T, 6>(plan, problem, stream);
  } else {
    return plan.tile_columns == 8 ? launch_on_chip<T, 8>(plan, problem, stream)
                                  : launch_on_chip<T, 12>(plan, problem, stream);
  }
}

template <typename T>
cudaError_t launch_head_fold(const LinearBiasLossCall& call, const LinearPlan& plan,
                             unsigned char* workspace, cudaStream_t stream) {
  using A = Accumulation<T>;
  const std::int64_t columns = call.loss.heads * call.loss.classes;
  HeadFoldProblem<T> problem{};
  problem.partials = reinterpret_cast<const A*>(workspace + plan.head_partials);
  problem.weight_gradient = static_cast<T*>(call.weight_gradient);
  problem.bias_gradient = static_cast<T*>(call.bias_gradient);
  problem.weights = columns * call.width;
  problem.biases = columns;
  problem.blocks = static_cast<int>(plan.loss.blocks);
  const auto kernel = fold_head_gradient<T>;
  const auto blocks = static_cast<unsigned>(divide_up(problem.weights + columns, kWarp));
  LNL_LAUNCH(kernel, dim3(blocks), dim3(256), 256 * sizeof(A), stream, problem);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_linear(const LinearBiasLossCall& call, const Device& device, void* workspace,
                          cudaStream_t stream) {
  const LinearPlan plan = make_linear_plan<T>(call, device);
  if (!plan.on_chip) return cudaErrorInvalidValue;
  auto* bytes = static_cast<unsigned char*>(workspace);
  cudaError_t error = cudaSuccess;
  if (call.loss.loss != nullptr && call.loss.reduction == Reduction::kMean &&
      !call.loss.denominators_given) {
    error = launch_denominators<T>(call.loss, plan.loss, bytes, stream);
  }
  if (error == cudaSuccess && plan.loss.blocks > 0) {
    error = launch_on_chip<T>(plan, make_linear_problem<T>(call, plan, bytes), stream);
  }
  if (error == cudaSuccess && call.loss.loss != nullptr) {
    error = launch_fold<T>(call.loss, plan.loss, bytes, true, stream);
  }
  if (error == cudaSuccess && call.weight_gradient != nullptr) {
    error = launch_head_fold<T>(call, plan, bytes, stream);
  }
  return error;
}

}  // namespace lnl::cuda
