// The linear head's kernels: product, losses and both gradients of small heads in one, and the sum
// of its blocks' weight gradients.
#pragma once

#include "linear_bias_loss_tiles.cuh"

namespace lnl::cuda {

// The block's copy of head_weight and head_bias, and zeros where sums and factors begin.
template <typename T>
__device__ inline void prepare_block(const LinearProblem<T>& problem,
                                     const LinearMemory<T>& memory) {
  using A = Accumulation<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll 1
  for (int m = warp; m < problem.padded_columns; m += warps) {
#pragma unroll 1
    for (int chunk = lane; chunk < problem.chunks; chunk += kWarp) {
      A values[kWide<T>] = {};
      const int place = m * problem.pitch + place_of_chunk<T>(chunk);
      if (m < problem.columns) {
        if (problem.head_partials != nullptr) {
          store_chunk<T>(memory.weight_gradient + place, values);
        }
        const T* row = problem.head_weight + std::int64_t(m) * problem.width;
        load_window(row, chunk * kWide<T>, problem.width, problem.wide_weight, A(0), values);
      }
      store_chunk<T>(memory.weight + place, values);
    }
#pragma unroll 1
    for (int row = lane; row < problem.rows; row += kWarp) {
      memory.head_factors[m * problem.rows + row] = 0;
    }
  }
#pragma unroll 1
  for (int m = threadIdx.x; m < problem.columns; m += blockDim.x) {
    memory.bias[m] = problem.head_bias != nullptr ? A(widen(problem.head_bias[m])) : A(0);
    memory.bias_gradient[m] = RunningSum<A>();
  }
#pragma unroll 1
  for (int slot = threadIdx.x; slot < problem.slots(); slot += blockDim.x) {
    memory.totals[slot] = Totals<A>();
  }
#pragma unroll 1
  for (int head = threadIdx.x; head < problem.loss.heads; head += blockDim.x) {
    // By way of a variable: the emulator's checker sees no result that is made in place.
    const HeadScales<A> scales = head_scales(problem.loss, problem.loss.denominators, head);
    memory.scales[head] = scales;
  }
}

// One row of one head: its logits from the slices' parts, its losses, and what the rows of
// head_weight and of features are multiplied with in the gradients.
template <bool kDense, typename T>
__device__ inline void work_on_slot(const LinearProblem<T>& problem, const LinearMemory<T>& memory,
                                    std::int64_t first_row, int row, int head) {
  using A = Accumulation<T>;
  const Problem<T>& loss = problem.loss;
  const int classes = loss.classes, tile = problem.tile();
  A* distances = memory.tiles + (row * loss.heads + head) * loss.pitch;
  A* powers = distances + tile;
  A* targets = powers + tile;
  const A* bias = memory.bias + head * classes;
#pragma unroll 1
  for (int c = 0; c < classes; ++c) {
    A logit = distances[c];
    for (int slice = 1; slice < problem.slices; ++slice) logit += distances[slice * tile + c];
    distances[c] = logit + bias[c];
  }
  const std::int64_t site = (first_row + row) * loss.heads + head;
  if (kDense && loss.labels == nullptr) {
#pragma unroll 1
    for (int c = 0; c < classes; ++c) targets[c] = loss.probability(site * classes + c);
  }
  LabelCounts<A> counts;  // of labels that have been counted already
  work_on_row<T, kDense>(loss, memory.scales[head], site, distances, powers, targets,
                         memory.totals[row * loss.heads + head], counts);
  if (!loss.wants_gradient()) return;
  // The two gradients of work_on_row lie in powers and in distances.
  const A* by_head = loss.reversed ? distances : powers;
  A* features_factors = memory.features_factors + head * classes * problem.rows + row;
  A* head_factors = memory.head_factors + head * classes * problem.rows + row;
#pragma unroll 1
  for (int c = 0; c < classes; c += 4) {
    A to_features[4], to_head[4];
    load_four(powers + c, to_features);
    load_four(by_head + c, to_head);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (c + i >= classes) break;
      features_factors[(c + i) * problem.rows] = to_features[i];
      head_factors[(c + i) * problem.rows] = to_head[i];
    }
  }
}

// Rows that fill up the last group have no gradient.
template <typename T>
__device__ inline void clear_slot(const LinearProblem<T>& problem, const LinearMemory<T>& memory,
                                  int row, int head) {
  const int classes = problem.loss.classes;
#pragma unroll 1
  for (int m = head * classes; m < (head + 1) * classes; ++m) {
    memory.features_factors[m * problem.rows + row] = 0;
    memory.head_factors[m * problem.rows + row] = 0;
  }
}

// A block takes one tile of rows after another. Three barriers a tile: when the logits are there,
// when their gradients are, and when nobody reads the tile any more.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kLinearThreads, 1) linear_on_chip(LinearProblem<T> problem) {
  using A = Accumulation<T>;
  LNL_SHARED(shared);
  const LinearMemory<T> memory(shared, problem.layout);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int groups = problem.rows / kGroup;
  const int group = warp % groups, slice = warp / groups;
  // Adjacent threads work on adjacent rows, so that they write adjacent factors.
  const int row = threadIdx.x % problem.rows, head = threadIdx.x / problem.rows;
  const bool dense =
      problem.loss.labels == nullptr || problem.loss.floor > A(0) || problem.loss.confused;
  const LinearShares shares(warp, warps, problem.chunks, problem.columns, kSumColumns<T, kColumns>,
                            groups, problem.features_gradient != nullptr,
                            problem.head_partials != nullptr);
  prepare_block(problem, memory);
  __syncthreads();

  for (std::int64_t first = std::int64_t(blockIdx.x) * problem.rows; first < problem.all_rows;
       first += std::int64_t(gridDim.x) * problem.rows) {
    const std::int64_t left = problem.all_rows - first;
    const int here = left < problem.rows ? static_cast<int>(left) : problem.rows;
    const int whole = (here + kGroup - 1) / kGroup * kGroup;
    if (group * kGroup < here) {
      copy_group_in(problem, first + group * kGroup, here - group * kGroup, slice,
                    memory.features + group * kGroup * problem.chunks * kWide<T>);
      logits_of_group<kColumns>(problem, memory, group, slice);
    }
    __syncthreads();
    if (head < problem.loss.heads && row < here) {
      if (dense) {
        work_on_slot<true>(problem, memory, first, row, head);
      } else {
        work_on_slot<false>(problem, memory, first, row, head);
      }
    } else if (head < problem.loss.heads && row < whole) {
      clear_slot(problem, memory, row, head);
    }
    __syncthreads();
    if (problem.head_partials != nullptr) {
      for (int unit = warp; unit < shares.head_units; unit += warps) {
        const int columns = unit / shares.chunk_groups;
        const int chunk = (unit - columns * shares.chunk_groups) * kWarp + lane;
        if (chunk >= problem.chunks) continue;
        add_weight_gradient<kColumns>(problem, memory, whole, chunk,
                                      columns * kSumColumns<T, kColumns>);
      }
      if (static_cast<int>(threadIdx.x) < problem.columns) {
        const A* factors = memory.head_factors + threadIdx.x * problem.rows;
        A sum = 0;
        for (int r = 0; r < whole; ++r) sum += factors[r];
        memory.bias_gradient[threadIdx.x].add(sum);
      }
    }
    int of_group = shares.group, of_chunks = shares.chunk_group;
    for (int unit = 0; unit < shares.units && of_group * kGroup < here; ++unit) {
      const int chunk = of_chunks * kWarp + lane;
      if (chunk < problem.chunks) {
        write_features_gradient(problem, memory, first + of_group * kGroup,
                                here - of_group * kGroup, of_group, chunk);
      }
      if (++of_chunks == shares.chunk_groups) of_chunks = 0, ++of_group;
    }
    __syncthreads();  // the next tile overwrites this one
  }

  if (problem.head_partials != nullptr) {
    A* partials =
        problem.head_partials + std::int64_t(blockIdx.x) * problem.columns * (problem.width + 1);
#pragma unroll 1
    for (int m = warp; m < problem.columns; m += warps) {
      for (int d = lane; d < problem.width; d += kWarp) {
        const int chunk = d / kWide<T>, within = d % kWide<T>;
        const int place =
            place_of_chunk<T>(chunk) + within / kWide<A> * kHalfChunk + within % kWide<A>;
        partials[std::int64_t(m) * problem.width + d] =
            memory.weight_gradient[m * problem.pitch + place];
      }
    }
    if (static_cast<int>(threadIdx.x) < problem.columns) {
      partials[std::int64_t(problem.columns) * problem.width + threadIdx.x] =
          memory.bias_gradient[threadIdx.x].value;
    }
  }
  const bool owner = head < problem.loss.heads;
  const int slot = owner ? row * problem.loss.heads + head : 0;
  write_partials(problem.loss, memory.tiles, problem.slots(), slot, owner, 0, problem.loss.heads, 0,
                 owner ? memory.totals[slot] : Totals<A>(), LabelCounts<A>());
}

// The sum of the blocks' weight and bias gradients, always in the same order. A block takes kWarp
// adjacent elements; its warps share the partials.
template <typename T>
struct HeadFoldProblem {
  const Accumulation<T>* partials;  // [blocks, weights + biases]
  T* weight_gradient;
  T* bias_gradient;  // or null
  std::int64_t weights;
  std::int64_t biases;
  int blocks;
};

template <typename T>
__global__ void __launch_bounds__(256) fold_head_gradient(HeadFoldProblem<T> problem) {
  using A = Accumulation<T>;
  LNL_SHARED(shared);
  A* scratch = reinterpret_cast<A*>(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const std::int64_t all = problem.weights + problem.biases;
  const std::int64_t element = std::int64_t(blockIdx.x) * kWarp + lane;
  RunningSum<A> sum;
  if (element < all) {
#pragma unroll 4
    for (int block = warp; block < problem.blocks; block += warps) {
      sum.add(problem.partials[std::int64_t(block) * all + element]);
    }
  }
  scratch[threadIdx.x] = sum.value;
  __syncthreads();
  if (warp > 0 || element >= all) return;
  A total = 0;
  for (int w = 0; w < warps; ++w) total += scratch[w * kWarp + lane];
  if (element < problem.weights) {
    problem.weight_gradient[element] = narrow<T>(total);
  } else if (problem.bias_gradient != nullptr) {
    problem.bias_gradient[element - problem.weights] = narrow<T>(total);
  }
}

// to[r][c] += row[c]. Grid (columns, rows).
template <typename T>
__global__ void __launch_bounds__(256)
    add_row(Accumulation<T>* to, const T* row, std::int64_t rows, std::int64_t columns) {
  const std::int64_t column = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const Accumulation<T> value = widen(row[column]);
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) to[r * columns + column] += value;
}

}  // namespace lnl::cuda
