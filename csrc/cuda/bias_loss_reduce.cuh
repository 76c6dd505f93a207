// Deterministic sums: within warps and blocks, of whole calls (two stages, no float atomics), the
// denominators of means, and the kernels around the main one.
#pragma once

#include "bias_loss_site.cuh"

namespace lnl::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

// Sums and maxima of power-of-two groups of lanes, of those lanes only that lie multiples of
// `apart` from each other; every lane gets its own, always in the same order.
template <typename A>
__device__ inline A sum_of_lanes(A value, int lanes, int apart = 1) {
  for (int offset = lanes / 2; offset >= apart; offset /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, offset);
  }
  return value;
}

// The same in a loop: code that runs once a block is to be short.
template <typename A>
__device__ inline A sum_of_lanes_in_turn(A value, int lanes) {
#pragma unroll 1
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, offset);
  }
  return value;
}

template <typename A>
__device__ inline A largest_of_lanes(A value, int lanes, int apart = 1) {
  for (int offset = lanes / 2; offset >= apart; offset /= 2) {
    value = larger(value, __shfl_xor_sync(kWholeWarp, value, offset));
  }
  return value;
}

// All of a site's sums, step by step: where `lanes` is not a constant, in one loop.
template <typename A, bool kDense>
__device__ inline void sum_sites_of_lanes(SiteSums<A, kDense>& sums, int lanes, int apart = 1) {
  for (int offset = lanes / 2; offset >= apart; offset /= 2) {
    sums.t += __shfl_xor_sync(kWholeWarp, sums.t, offset);
    sums.u += __shfl_xor_sync(kWholeWarp, sums.u, offset);
    sums.ties += __shfl_xor_sync(kWholeWarp, sums.ties, offset);
    if constexpr (kDense) {
      sums.y_below += __shfl_xor_sync(kWholeWarp, sums.y_below, offset);
      sums.y_ties += __shfl_xor_sync(kWholeWarp, sums.y_ties, offset);
      sums.yd += __shfl_xor_sync(kWholeWarp, sums.yd, offset);
      sums.distance += __shfl_xor_sync(kWholeWarp, sums.distance, offset);
      sums.count += __shfl_xor_sync(kWholeWarp, sums.count, offset);
    }
  }
}

// A running sum that carries its rounding error along: a thread may add many thousands of sites.
template <typename A>
struct RunningSum {
  A value = 0;
  A lost = 0;

  __device__ void add(A term) {
    const A corrected = term - lost;
    const A next = value + corrected;
    lost = (next - value) - corrected;
    value = next;
    // An infinite sum has no rounding error, and inf - inf must not turn it into NaN.
    if (!(lost - lost == A(0))) lost = A(0);
  }
};

template <typename A>
struct Totals {
  RunningSum<A> values[kTerms];

  template <bool kDense>
  __device__ void add(const Site<A, kDense>& site) {
    values[0].add(site.cross_entropy);
    values[1].add(site.entropy);
    if constexpr (kDense) values[2].add(site.confusion);
  }
  // Several sites at once, which need not pay for the compensation each.
  template <bool kDense, int kCount>
  __device__ void add(const Site<A, kDense> (&sites)[kCount]) {
    Site<A, kDense> sum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum.cross_entropy += sites[i].cross_entropy;
      sum.entropy += sites[i].entropy;
      if constexpr (kDense) sum.confusion += sites[i].confusion;
    }
    add(sum);
  }
};

// What a thread has seen of the labels, where the denominators of a mean are not known yet.
template <typename A>
struct LabelCounts {
  RunningSum<A> weight;  // of those that count; without weights nobody asks
  int ignored = 0;

  template <typename T>
  __device__ void add(const Problem<T>& problem, const Label& label) {
    if (!problem.turns.counting) return;
    if (!label.counted()) {
      ++ignored;
    } else if (problem.weight != nullptr) {
      weight.add(label.is_class() ? problem.weight[label.value] : A(1));
    }
  }
};

// Writes the site's own values where an unreduced loss is wanted, by target index.
template <typename T, bool kDense>
__device__ void write_site(const Problem<T>& problem, const HeadScales<Accumulation<T>>& scales,
                           std::int64_t target, const Site<Accumulation<T>, kDense>& site) {
  if (problem.site_loss == nullptr) return;
  auto loss = site.cross_entropy;
  // A term of weight 0 is not added: that of an ignored site may be NaN.
  if (scales.entropy_weight != 0) loss -= scales.entropy_weight * site.entropy;
  if constexpr (kDense) {
    if (scales.confusion_weight != 0) loss += scales.confusion_weight * site.confusion;
  }
  problem.site_loss[target] = loss;
  problem.site_cross_entropy[target] = site.cross_entropy;
  problem.site_entropy[target] = site.entropy;
}

__device__ inline int block_of_grid() { return blockIdx.y * gridDim.x + blockIdx.x; }

// Adds the totals of a block's `slots` (one per row that it works on at a time) and writes the sums
// per head. Slot q holds sites of head (first_head + q) % heads only. `scratch` has room for
// kPartials * slots values; all threads of the block call this.
template <typename T>
__device__ void write_partials(const Problem<T>& problem, Accumulation<T>* scratch, int slots,
                               int slot, bool owner, int first_head, int heads, int head_offset,
                               const Totals<Accumulation<T>>& totals,
                               const LabelCounts<Accumulation<T>>& counts) {
  using A = Accumulation<T>;
  if (problem.partials == nullptr) return;
  __syncthreads();
  if (owner) {
    for (int i = 0; i < kTerms; ++i) scratch[i * slots + slot] = totals.values[i].value;
    scratch[kTerms * slots + slot] = counts.weight.value;
    scratch[(kTerms + 1) * slots + slot] = A(counts.ignored);
  }
  __syncthreads();
  // A warp for each sum, and one for the flag, which is the number of ignored labels of all heads.
  const int lane = threadIdx.x % kWarp;
  const int sums = heads * kPartials;
  const int last = problem.turns.flags != nullptr ? sums + 1 : sums;
#pragma unroll 1
  for (int unit = threadIdx.x / kWarp; unit < last; unit += blockDim.x / kWarp) {
    const bool flag = unit == sums;
    const int head = unit / kPartials;
    const int i = flag ? kPartials - 1 : unit - head * kPartials;
    const int step = flag ? 1 : heads;
    int q = flag ? 0 : head - first_head;
    if (q < 0) q += heads;
    A sum = 0;
#pragma unroll 1
    for (q += lane * step; q < slots; q += kWarp * step) sum += scratch[i * slots + q];
    sum = sum_of_lanes_in_turn(sum, kWarp);
    if (lane > 0) continue;
    if (flag) {
      problem.turns.flags[block_of_grid()] = sum > A(0);
    } else {
      const std::int64_t place =
          (std::int64_t(blockIdx.x) * problem.heads + head_offset + head) * kPartials;
      problem.partials[place + i] = sum;
    }
  }
}

// First stage of the denominators of means over labels: per block and head, the weights of the
// labels that count and their number. Grid (blocks, heads).
template <typename A>
struct DenominatorProblem {
  const std::int64_t* labels;
  const A* weight;
  A* partials;      // [blocks, K, 2]
  A* denominators;  // [K, 2]
  std::int64_t sites;
  std::int64_t positions;
  std::int64_t ignore_index;
  Divider by_positions;
  int classes;
  int heads;
  int blocks;
  bool mask_entropy;
};

template <typename A>
__global__ void __launch_bounds__(256, 4) sum_denominators(DenominatorProblem<A> problem) {
  LNL_SHARED(shared);
  A* scratch = reinterpret_cast<A*>(shared);
  const int head = blockIdx.y;
  RunningSum<A> weight, count;
  for (std::int64_t site = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
       site < problem.sites; site += std::int64_t(gridDim.x) * blockDim.x) {
    std::int64_t target = site;
    if (problem.heads > 1) {
      const std::int64_t sample = problem.by_positions.divide(site);
      target = site + (sample * (problem.heads - 1) + head) * problem.positions;
    }
    const std::int64_t label = problem.labels[target];
    if (label == problem.ignore_index) continue;
    const bool weighted = problem.weight != nullptr && label >= 0 && label < problem.classes;
    weight.add(weighted ? problem.weight[label] : A(1));
    count.add(A(1));
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const A weights = sum_of_lanes(weight.value, kWarp);
  const A counts = sum_of_lanes(count.value, kWarp);
  if (lane == 0) {
    scratch[warp] = weights;
    scratch[warps + warp] = counts;
  }
  __syncthreads();
  if (warp == 0) {
    const A total_weights = sum_of_lanes(lane < warps ? scratch[lane] : A(0), kWarp);
    const A total_counts = sum_of_lanes(lane < warps ? scratch[warps + lane] : A(0), kWarp);
    if (lane == 0) {
      A* partial = problem.partials + (std::int64_t(blockIdx.x) * problem.heads + head) * 2;
      partial[0] = total_weights;
      partial[1] = total_counts;
    }
  }
}

// Second stage: one warp per head. Without labels every site counts once.
template <typename A>
__global__ void __launch_bounds__(32) fold_denominators(DenominatorProblem<A> problem) {
  const int head = blockIdx.x;
  const int lane = threadIdx.x;
  RunningSum<A> weight, count;
  for (int block = lane; block < problem.blocks; block += kWarp) {
    const A* partial = problem.partials + (std::int64_t(block) * problem.heads + head) * 2;
    weight.add(partial[0]);
    count.add(partial[1]);
  }
  const A weights = sum_of_lanes(weight.value, kWarp);
  const A counts = sum_of_lanes(count.value, kWarp);
  if (lane == 0) {
    const A sites = A(problem.sites);
    problem.denominators[2 * head] = problem.labels != nullptr ? weights : sites;
    problem.denominators[2 * head + 1] =
        problem.labels != nullptr && problem.mask_entropy ? counts : sites;
  }
}

// What a head's sums of CE and of everything else are divided by: by its labels' counts, which are
// among the sums, by given numbers, or by 1.
template <typename A>
__device__ inline void denominators_of_head(const FoldProblem<A>& problem, int head, const A* sums,
                                            A (&denominators)[2]) {
  denominators[0] = denominators[1] = A(1);
  if (problem.denominators != nullptr) {
    const A counted = problem.sites - sums[kTerms + 1];
    denominators[0] = problem.weighted ? sums[kTerms] : counted;
    denominators[1] = problem.mask_entropy ? counted : problem.sites;
  } else if (problem.given != nullptr) {
    denominators[0] = problem.given[2 * head];
    denominators[1] = problem.given[2 * head + 1];
  }
}

// By one block, always in the same order: the heads [first, first + heads), or with `whole` all of
// them and the call's results. `own`, if not null, gets the denominators of the former. `scratch`
// has room for a number a thread.
template <typename A>
__device__ inline void fold(const FoldProblem<A>& problem, A* scratch, bool whole, A* own,
                            int first, int heads) {
  const int thread = threadIdx.x;
  const int most = blockDim.x / kPartials;  // heads at a time
  const int end = whole ? problem.heads : first + heads;
  A term = 0;
#pragma unroll 1
  for (int begin = whole ? 0 : first; begin < end; begin += most) {
    const int here = end - begin < most ? end - begin : most;
    // All blocks' sums are a matrix [blocks, heads * kPartials]; threads share a column of it.
    const int columns = here * kPartials, groups = blockDim.x / columns;
    const int group = thread / columns;
    __syncthreads();  // scratch is read no more
    if (group < groups) {
      const A* column = problem.partials + begin * kPartials + thread - group * columns;
      RunningSum<A> sum;
#pragma unroll 4
      for (int part = group; part < problem.blocks; part += groups) {
        sum.add(column[std::int64_t(part) * problem.heads * kPartials]);
      }
      scratch[thread] = sum.value;
    }
    __syncthreads();
    if (thread < columns) {
      A sum = scratch[thread];
#pragma unroll 4
      for (int g = 1; g < groups; ++g) sum += scratch[g * columns + thread];
      scratch[thread] = sum;
    }
    __syncthreads();
    if (thread < here) {
      A* sums = scratch + thread * kPartials;
      const int head = begin + thread;
      A denominators[2];
      denominators_of_head(problem, head, sums, denominators);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (own != nullptr && head >= first && head < first + heads) {
          own[2 * (head - first) + i] = denominators[i];
        }
        if (whole && problem.denominators != nullptr) {
          problem.denominators[2 * head + i] = denominators[i];
        }
        sums[kTerms + i] = denominators[i];
      }
    }
    if (!whole) continue;
    __syncthreads();
    if (thread < kTerms) {
#pragma unroll 1
      for (int head = 0; head < here; ++head) {
        const A* sums = scratch + head * kPartials;
        term += sums[thread] / sums[thread == 0 ? kTerms : kTerms + 1];
      }
    }
  }
  if (!whole) return;
  if (thread < kTerms) scratch[thread] = term;  // that of head 0, which no other thread reads
  __syncthreads();
  if (thread == 0) {
    const A cross_entropy = scratch[0], entropy = scratch[1], confusion = scratch[2];
    A loss = cross_entropy;
    const A entropy_weight = problem.entropy_weight.read();
    const A confusion_weight = problem.confusion_weight.read();
    if (entropy_weight != A(0)) loss -= entropy_weight * entropy;
    if (confusion_weight != A(0)) loss += confusion_weight * confusion;
    *problem.loss = loss;
    *problem.cross_entropy = cross_entropy;
    *problem.entropy = entropy;
  }
}

constexpr int kFoldThreads = 512;

template <typename A>
__global__ void __launch_bounds__(kFoldThreads) fold_totals(FoldProblem<A> problem) {
  LNL_SHARED(shared);
  fold(problem, reinterpret_cast<A*>(shared), true, static_cast<A*>(nullptr), 0, 0);
}

// Whether the block has anything to do in this turn, and the denominators for its heads
// [first_head, first_head + heads): see Turns. `shared` has room for a number a thread.
template <typename T>
__device__ inline bool begin_turn(const Problem<T>& problem, unsigned char* shared, int first_head,
                                  int heads, const Accumulation<T>*& denominators) {
  using A = Accumulation<T>;
  denominators = problem.denominators;
  const Turns<A>& turns = problem.turns;
  if (!turns.second) return true;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int* found = reinterpret_cast<int*>(shared);
  int any = turns.always;
  if (!turns.always) {
#pragma unroll 4
    for (int block = threadIdx.x; block < turns.blocks; block += blockDim.x) {
      any += turns.flags[block];
    }
    any = sum_of_lanes_in_turn(any, kWarp);
    if (lane == 0) found[warp] = any;
    __syncthreads();
    any = 0;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) any += found[w];
  }
  const bool folds = block_of_grid() == 0;
  if (!folds && any == 0) return false;
  A* own = turns.denominators + std::int64_t(block_of_grid()) * heads * 2;
  fold(turns.fold, reinterpret_cast<A*>(shared), folds, own, first_head, heads);
  if (any == 0) return false;
  __syncthreads();
  denominators = own - 2 * first_head;
  return true;
}

// Sums an unreduced loss over heads: [3, N, K, S] to three [N, S].
template <typename A>
struct SumHeadsProblem {
  const A* by_head;
  A* outputs[3];
  std::int64_t sites;
  std::int64_t positions;
  Divider by_positions;
  int heads;
};

template <typename A>
__global__ void __launch_bounds__(256) sum_heads(SumHeadsProblem<A> problem) {
  const std::int64_t site = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (site >= problem.sites) return;
  const std::int64_t sample = problem.by_positions.divide(site);
  const std::int64_t first = site + sample * (problem.heads - 1) * problem.positions;  // of head 0
  for (int i = 0; i < 3; ++i) {
    A sum = 0;
    for (int head = 0; head < problem.heads; ++head) {
      sum += problem.by_head[i * problem.sites * problem.heads + first + head * problem.positions];
    }
    problem.outputs[i][site] = sum;
  }
}

// gradient *= factor. Every block ends at once where the factor is 1, so that the usual backward
// call costs a launch and no memory traffic, and nobody waits to look at the factor.
template <typename T>
__global__ void __launch_bounds__(256)
    scale_gradient(T* gradient, std::int64_t elements, DeviceCoefficient<Accumulation<T>> factor,
                   bool wide) {
  using A = Accumulation<T>;
  const A scale = factor.read();
  if (scale == A(1)) return;
  constexpr int kBatch = 2;
  const std::int64_t windows = (elements + kWide<T> - 1) / kWide<T>;
  const std::int64_t stride = std::int64_t(gridDim.x) * blockDim.x;
  for (std::int64_t window = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; window < windows;
       window += kBatch * stride) {
    A values[kBatch][kWide<T>];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      load_window(gradient, (window + k * stride) * kWide<T>, elements, wide, A(0), values[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      for (int i = 0; i < kWide<T>; ++i) values[k][i] *= scale;
      store_window(gradient, (window + k * stride) * kWide<T>, elements, wide, values[k]);
    }
  }
}

}  // namespace lnl::cuda
