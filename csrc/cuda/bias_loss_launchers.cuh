// Launchers: from a call and its plan to the kernels. Raw pointers and a stream; no torch header.
#pragma once

#include "bias_loss_plan.cuh"

namespace lnl::cuda {

template <typename A>
DeviceCoefficient<A> coefficient(const Coefficient& given) {
  return {given.device, given.dtype, static_cast<A>(given.host)};
}

template <typename T>
Problem<T> make_problem(const BiasLossCall& call, const Plan& plan, unsigned char* workspace) {
  using A = Accumulation<T>;
  const std::int64_t sites = call.rows * call.positions;
  const std::int64_t all = sites * call.heads;
  Problem<T> problem{};
  problem.logits = static_cast<const T*>(call.logits);
  problem.labels = call.labels;
  problem.probabilities = call.probabilities;
  problem.wide_probabilities = call.wide_probabilities;
  problem.weight = static_cast<const A*>(call.weight);
  if (call.reduction == Reduction::kMean) {
    problem.denominators = static_cast<const A*>(call.denominators);
  }
  problem.upstream = static_cast<const A*>(call.upstream);
  problem.upstream_per_site = call.upstream != nullptr && call.reduction == Reduction::kNone;
  problem.gradient = static_cast<T*>(call.gradient);
  problem.head_gradient = static_cast<T*>(call.head_gradient);
  if (call.partials != nullptr) {
    problem.partials = static_cast<A*>(call.partials);
  } else if (call.loss != nullptr && call.reduction != Reduction::kNone) {
    problem.partials = reinterpret_cast<A*>(workspace + plan.partials);
  } else if (call.loss != nullptr && call.heads > 1) {
    problem.site_loss = reinterpret_cast<A*>(workspace + plan.by_head);
    problem.site_cross_entropy = problem.site_loss + all;
    problem.site_entropy = problem.site_cross_entropy + all;
  } else if (call.loss != nullptr) {
    problem.site_loss = static_cast<A*>(call.loss);
    problem.site_cross_entropy = static_cast<A*>(call.cross_entropy);
    problem.site_entropy = static_cast<A*>(call.entropy);
  }
  problem.reversal = coefficient<A>(call.reversal);
  problem.entropy_weight = coefficient<A>(call.entropy_weight);
  problem.confusion_weight = coefficient<A>(call.confusion_weight);
  problem.reversed = call.reversal.present;
  problem.confused = call.confusion_weight.present;
  problem.mask_entropy = call.mask_entropy;
  problem.sites = sites;
  problem.positions = call.positions;
  problem.ignore_index = call.ignore_index;
  problem.classes = static_cast<int>(call.classes);
  problem.heads = static_cast<int>(call.heads);
  problem.lanes_per_row = plan.lanes_per_row;
  problem.pitch = plan.pitch;
  problem.ahead = plan.ahead;
  problem.groups = plan.groups;
  problem.row_windows = plan.row_windows;
  problem.slot_windows = plan.groups == 1 ? plan.row_windows : plan.group_windows * plan.threads;
  problem.slots = plan.slots;
  while (kWarp << problem.warp_bits < plan.threads) ++problem.warp_bits;
  problem.by_heads = Divider(call.heads, all);
  problem.by_positions = Divider(call.positions, sites);
  problem.by_classes = Divider(call.classes, kWarp * call.classes + 256);
  problem.count = A(1);
  problem.keep = static_cast<A>(1.0 - call.label_smoothing);
  problem.floor = static_cast<A>(call.label_smoothing / static_cast<double>(call.classes));
  problem.wide_labels = aligned(call.labels, 16);
  if (!plan.for_sites()) {
    problem.wide_logits = aligned(call.logits, 16);
    problem.wide_targets = call.wide_probabilities
                               ? aligned(call.logits, 16) && aligned(call.probabilities, 16)
                               : same_phase(call.logits, call.probabilities);
    problem.wide_gradient = same_phase(call.logits, call.gradient);
    problem.wide_head_gradient = same_phase(call.logits, call.head_gradient);
    if (plan.kernel == Kernel::kRowsSmall) {
      // Tiles start at whole multiples of 16 bytes from the tensors' beginnings.
      problem.wide_targets = aligned(call.probabilities, 16);
      problem.wide_gradient = aligned(call.gradient, 16);
      problem.wide_head_gradient = aligned(call.head_gradient, 16);
    }
  }
  problem.stage = plan.stage;
  return problem;
}

// More than 48 KiB of shared memory must be asked for. The answer belongs to the kernel, not to the
// call: asking for what this call needs could take from another host thread what it has just asked
// for, between that and its launch. So every call asks for the most that the device gives; the
// kernels have no static shared memory that would count against it.
template <typename... Arguments>
cudaError_t allow_shared(void (*kernel)(Arguments...), std::size_t needed, int most) {
  if (needed <= kSmallShared) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

template <typename T>
cudaError_t launch(void (*kernel)(Problem<T>), dim3 grid, const Plan& plan,
                   const Problem<T>& problem, cudaStream_t stream) {
  const cudaError_t error = allow_shared(kernel, plan.shared, plan.most_shared);
  if (error != cudaSuccess) return error;
  LNL_LAUNCH(kernel, grid, dim3(plan.threads), plan.shared, stream, problem);
  return cudaGetLastError();
}

// The kernels for sites, in the order of their preference: 128 bits, 64, and one by one.
template <typename T, bool kDense>
cudaError_t launch_sites(const Plan& plan, const Problem<T>& problem, cudaStream_t stream) {
  const dim3 grid(plan.blocks, problem.heads);
  const bool large = plan.kernel == Kernel::kSitesLarge;
  constexpr int kSites = sizeof(T) == 8 ? 2 : 4;
  if constexpr (sizeof(T) == 2) {
    if (plan.sites == 8) {
      return launch<T>(large ? sites_large<T, kDense, 8, true> : sites_small<T, kDense, 8, true>,
                       grid, plan, problem, stream);
    }
  }
  if (plan.vector) {
    return launch<T>(
        large ? sites_large<T, kDense, kSites, true> : sites_small<T, kDense, kSites, true>, grid,
        plan, problem, stream);
  }
  return launch<T>(large ? sites_large<T, kDense, kScalarSites<T>, false>
                         : sites_small<T, kDense, kSites, false>,
                   grid, plan, problem, stream);
}

template <typename T, bool kDense>
cudaError_t launch_main(const Plan& plan, const Problem<T>& problem, cudaStream_t stream) {
  const dim3 rows(plan.blocks);
  switch (plan.kernel) {
    case Kernel::kRowsSmall:
      return launch<T>(rows_small<T, kDense>, rows, plan, problem, stream);
    case Kernel::kRowsMedium16:
      return launch<T>(rows_medium<T, kDense, 16>, rows, plan, problem, stream);
    case Kernel::kRowsMedium32:
      if constexpr (sizeof(T) < 8) {
        return launch<T>(rows_medium<T, kDense, 32>, rows, plan, problem, stream);
      }
      return cudaErrorInvalidValue;
    case Kernel::kRowsLarge:
      return launch<T>(rows_large<T, kDense>, rows, plan, problem, stream);
    case Kernel::kSitesLarge:
    case Kernel::kSitesSmall:
      return launch_sites<T, kDense>(plan, problem, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_denominators(const BiasLossCall& call, const Plan& plan,
                                unsigned char* workspace, cudaStream_t stream) {
  using A = Accumulation<T>;
  DenominatorProblem<A> problem{};
  problem.labels = call.labels;
  problem.weight = static_cast<const A*>(call.weight);
  problem.partials = reinterpret_cast<A*>(workspace + plan.denominator_partials);
  problem.denominators = static_cast<A*>(call.denominators);
  problem.sites = call.rows * call.positions;
  problem.positions = call.positions;
  problem.ignore_index = call.ignore_index;
  problem.by_positions = Divider(call.positions, problem.sites);
  problem.classes = static_cast<int>(call.classes);
  problem.heads = static_cast<int>(call.heads);
  problem.blocks = static_cast<int>(plan.denominator_blocks);
  problem.mask_entropy = call.mask_entropy;
  const unsigned heads = static_cast<unsigned>(call.heads);
  if (plan.denominator_blocks > 0) {
    const auto kernel = sum_denominators<A>;
    LNL_LAUNCH(kernel, dim3(plan.denominator_blocks, heads), dim3(256), 16 * sizeof(A), stream,
               problem);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  const auto kernel = fold_denominators<A>;
  LNL_LAUNCH(kernel, dim3(heads), dim3(kWarp), 0, stream, problem);
  return cudaGetLastError();
}

// `known`: the denominators of a mean are there already.
template <typename T>
FoldProblem<Accumulation<T>> make_fold(const BiasLossCall& call, const Plan& plan,
                                       unsigned char* workspace, bool known) {
  using A = Accumulation<T>;
  FoldProblem<A> problem{};
  problem.partials = reinterpret_cast<const A*>(workspace + plan.partials);
  if (call.reduction == Reduction::kMean) {
    if (known) problem.given = static_cast<const A*>(call.denominators);
    if (!known) problem.denominators = static_cast<A*>(call.denominators);
  }
  problem.sites = static_cast<A>(call.rows * call.positions);
  problem.weighted = call.labels != nullptr && call.weight != nullptr;
  problem.mask_entropy = call.mask_entropy;
  problem.loss = static_cast<A*>(call.loss);
  problem.cross_entropy = static_cast<A*>(call.cross_entropy);
  problem.entropy = static_cast<A*>(call.entropy);
  problem.entropy_weight = coefficient<A>(call.entropy_weight);
  problem.confusion_weight = coefficient<A>(call.confusion_weight);
  problem.blocks = static_cast<int>(plan.blocks);
  problem.heads = static_cast<int>(call.heads);
  return problem;
}

template <typename T>
cudaError_t launch_fold(const BiasLossCall& call, const Plan& plan, unsigned char* workspace,
                        bool known, cudaStream_t stream) {
  using A = Accumulation<T>;
  if (call.reduction == Reduction::kNone) {
    const std::int64_t sites = call.rows * call.positions;
    if (call.heads == 1 || sites == 0) return cudaSuccess;
    SumHeadsProblem<A> problem{};
    problem.by_head = reinterpret_cast<const A*>(workspace + plan.by_head);
    problem.outputs[0] = static_cast<A*>(call.loss);
    problem.outputs[1] = static_cast<A*>(call.cross_entropy);
    problem.outputs[2] = static_cast<A*>(call.entropy);
    problem.sites = sites;
    problem.positions = call.positions;
    problem.by_positions = Divider(call.positions, sites);
    problem.heads = static_cast<int>(call.heads);
    const auto kernel = sum_heads<A>;
    LNL_LAUNCH(kernel, dim3(static_cast<unsigned>(divide_up(sites, 256))), dim3(256), 0, stream,
               problem);
    return cudaGetLastError();
  }
  const auto kernel = fold_totals<A>;
  LNL_LAUNCH(kernel, dim3(1), dim3(kFoldThreads), kFoldThreads * sizeof(A), stream,
             make_fold<T>(call, plan, workspace, known));
  return cudaGetLastError();
}

// Either variant; a fault's test has one of them only.
template <typename T>
cudaError_t launch_variant(const Plan& plan, const Problem<T>& problem, cudaStream_t stream) {
  return plan.dense ? launch_main<T, true>(plan, problem, stream)
                    : launch_main<T, false>(plan, problem, stream);
}

// A forward call whose mean divides by what its labels count.
template <typename T>
cudaError_t launch_turns(const BiasLossCall& call, const Plan& plan, unsigned char* workspace,
                         cudaStream_t stream) {
  using A = Accumulation<T>;
  Problem<T> problem = make_problem<T>(call, plan, workspace);
  problem.denominators = nullptr;
  problem.count = static_cast<A>(problem.sites);
  problem.turns.flags = reinterpret_cast<std::uint16_t*>(workspace + plan.flags);
  Problem<T> first = problem;
  first.turns.counting = true;
  if (call.weight != nullptr) first.gradient = first.head_gradient = nullptr;
  const cudaError_t error = launch_variant<T>(plan, first, stream);
  if (error != cudaSuccess) return error;
  problem.partials = nullptr;
  problem.turns.second = true;
  problem.turns.always = call.weight != nullptr;
  problem.turns.blocks = static_cast<int>(plan.all_blocks(call.heads));
  problem.turns.denominators = reinterpret_cast<A*>(workspace + plan.denominators);
  problem.turns.fold = make_fold<T>(call, plan, workspace, false);
  return launch_variant<T>(plan, problem, stream);
}

template <typename T>
cudaError_t launch_call(const BiasLossCall& call, const Device& device, void* workspace,
                        cudaStream_t stream) {
  const Plan plan = make_plan<T>(call, device);
  auto* bytes = static_cast<unsigned char*>(workspace);
  if (has_two_turns(call) && plan.blocks > 0) return launch_turns<T>(call, plan, bytes, stream);
  const bool whole = call.loss != nullptr && call.partials == nullptr;
  const bool known = !whole || call.denominators_given;
  cudaError_t error = cudaSuccess;
  if (plan.blocks > 0) {
    Problem<T> problem = make_problem<T>(call, plan, bytes);
    if (!known) problem.denominators = nullptr;
    if (!known && call.reduction == Reduction::kMean) {
      problem.count = static_cast<Accumulation<T>>(problem.sites);
    }
    problem.turns.counting = counts_labels(call);
    error = launch_variant<T>(plan, problem, stream);
  }
  if (error == cudaSuccess && whole) {
    error = launch_fold<T>(call, plan, bytes, known, stream);
  }
  return error;
}

// function(T()) for the type T of a dtype.
template <typename Function>
auto with_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat64:
      return function(double());
    case DType::kFloat16:
      return function(__half());
    case DType::kBFloat16:
      return function(__nv_bfloat16());
    case DType::kFloat32:
      break;
  }
  return function(float());
}

template <typename T>
cudaError_t launch_scale(void* gradient, std::int64_t elements, const Coefficient& factor,
                         const Device& device, cudaStream_t stream) {
  using A = Accumulation<T>;
  const bool unscaled = factor.device == nullptr && factor.host == 1.0;
  if (elements == 0 || unscaled) return cudaSuccess;
  const std::int64_t needed = divide_up(elements, std::int64_t(256) * kWide<T>);
  const std::int64_t most = divide_up(most_blocks(device), 2);  // of 2048 threads
  const auto kernel = scale_gradient<T>;
  LNL_LAUNCH(kernel, dim3(static_cast<unsigned>(needed < most ? needed : most)), dim3(256), 0,
             stream, static_cast<T*>(gradient), elements, coefficient<A>(factor),
             aligned(gradient, 16));
  return cudaGetLastError();
}

}  // namespace lnl::cuda
