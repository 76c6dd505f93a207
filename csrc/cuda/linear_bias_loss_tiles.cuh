// The three products of a tile of rows: logits from features and weights, the features' gradient
// from weights, the weights' gradient from features. A thread works on kGroup rows, or a tile of
// columns, times a chunk, so that a value read from shared memory is multiplied several times.
#pragma once

#include "linear_bias_loss_problem.cuh"

namespace lnl::cuda {

// Copies a group of rows of features to shared memory. A lane copies the chunks that it multiplies
// in logits_of_group. Rows that are not there are zeros: they are multiplied with factors of zero.
template <typename T>
__device__ inline void copy_group_in(const LinearProblem<T>& problem, std::int64_t first_row,
                                     int rows, int slice, T* to) {
  constexpr int kBatch = 2;
  const int step = problem.slices * kWarp;
  for (int first = slice * kWarp + threadIdx.x % kWarp; first < problem.chunks;
       first += kBatch * step) {
    Pack<T, kWide<T>> packs[kBatch][kGroup] = {};
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int chunk = first + k * step;
      if (chunk >= problem.chunks) break;
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        if (r >= rows) break;
        const T* row = problem.features + (first_row + r) * problem.width;
        if (problem.wide_features) {
          packs[k][r] = Pack<T, kWide<T>>::load(row + chunk * kWide<T>);
        } else {
#pragma unroll
          for (int i = 0; i < kWide<T>; ++i) {
            const int element = chunk * kWide<T> + i;
            if (element < problem.width) packs[k][r].values[i] = row[element];
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int chunk = first + k * step;
      if (chunk >= problem.chunks) break;
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        packs[k][r].store(to + (r * problem.chunks + chunk) * kWide<T>);
      }
    }
  }
}

// Two bfloat16 are a word whose halves are the upper halves of their float32: one instruction each,
// which compilers do not find when they are converted one by one.
template <typename T>
__device__ inline void widen_pack(const Pack<T, kWide<T>>& pack,
                                  Accumulation<T> (&values)[kWide<T>]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    std::uint32_t words[kWide<T> / 2];
    std::memcpy(words, pack.values, sizeof words);
#pragma unroll
    for (int i = 0; i < kWide<T> / 2; ++i) {
      const std::uint32_t lower = words[i] << 16, upper = words[i] & 0xffff0000u;
      std::memcpy(&values[2 * i], &lower, sizeof lower);
      std::memcpy(&values[2 * i + 1], &upper, sizeof upper);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) values[i] = widen(pack.values[i]);
  }
}

template <typename T>
__device__ inline void load_features(const LinearProblem<T>& problem, const T* group, int chunk,
                                     Accumulation<T> (&values)[kGroup][kWide<T>]) {
#pragma unroll
  for (int r = 0; r < kGroup; ++r) {
    widen_pack(Pack<T, kWide<T>>::load(group + (r * problem.chunks + chunk) * kWide<T>), values[r]);
  }
}

// Adds kCount values over the lanes of a warp such that each lane keeps a few of the sums: in every
// step a lane gives away one half of its values and adds to the other. Returns which of the
// original values the lane's first one is; values that several lanes hold belong to the `owner`.
template <int kCount, int kLanes, typename A, int kSize>
__device__ inline int scatter_sums(A (&values)[kSize], bool& owner) {
  if constexpr (kLanes == 1) {
    return 0;
  } else {
    constexpr int kOther = kLanes / 2;
    const bool upper = (threadIdx.x & kOther) != 0;
    if constexpr (kCount % 2 == 0) {
      constexpr int kHalf = kCount / 2;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const A given = upper ? values[i] : values[kHalf + i];
        const A kept = upper ? values[kHalf + i] : values[i];
        values[i] = kept + __shfl_xor_sync(kWholeWarp, given, kOther);
      }
      return (upper ? kHalf : 0) + scatter_sums<kHalf, kOther>(values, owner);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kWholeWarp, values[i], kOther);
      owner = owner && !upper;
      return scatter_sums<kCount, kOther>(values, owner);
    }
  }
}

// How many of kCount values scatter_sums leaves to a lane.
__host__ __device__ constexpr int scattered(int count, int lanes) {
  return lanes == 1 ? count : scattered(count % 2 == 0 ? count / 2 : count, lanes / 2);
}

// The logits of a group of rows, as far as they come from the chunks of one slice.
template <int kColumns, typename T>
__device__ inline void logits_of_group(const LinearProblem<T>& problem,
                                       const LinearMemory<T>& memory, int group, int slice) {
  using A = Accumulation<T>;
  constexpr int kCount = kGroup * kColumns;
  const int heads = problem.loss.heads, classes = problem.loss.classes;
  const T* features = memory.features + group * kGroup * problem.chunks * kWide<T>;
  A* tile = memory.tiles + slice * problem.tile();
  for (int first = 0; first < problem.columns; first += kColumns) {
    A sums[kCount] = {};
    for (int chunk = slice * kWarp + threadIdx.x % kWarp; chunk < problem.chunks;
         chunk += problem.slices * kWarp) {
      A x[kGroup][kWide<T>];
      load_features(problem, features, chunk, x);
      const A* weight = memory.weight + first * problem.pitch + place_of_chunk<T>(chunk);
#pragma unroll
      for (int m = 0; m < kColumns; ++m) {
        A w[kWide<T>];
        load_chunk<T>(weight + m * problem.pitch, w);
#pragma unroll
        for (int r = 0; r < kGroup; ++r) {
#pragma unroll
          for (int i = 0; i < kWide<T>; ++i) sums[r * kColumns + m] += x[r][i] * w[i];
        }
      }
    }
    bool owner = true;
    const int begin = scatter_sums<kCount, kWarp>(sums, owner);
    if (!owner) continue;
#pragma unroll
    for (int i = 0; i < scattered(kCount, kWarp); ++i) {
      const int row = group * kGroup + (begin + i) / kColumns;
      const int column = first + (begin + i) % kColumns;
      if (column >= problem.columns) continue;
      const int head = heads == 1 ? 0 : problem.loss.by_classes.divide_int(column);
      tile[(row * heads + head) * problem.loss.pitch + column - head * classes] = sums[i];
    }
  }
}

// Columns of the weights' gradient that a thread sums up at a time; they divide kColumns.
template <typename T, int kColumns>
constexpr int kSumColumns = kWide<T> == 8 ? 4 : kColumns;

// Adds a tile's share to one chunk of kSumColumns rows of the weights' gradient. `rows` is a
// multiple of kGroup.
template <int kColumns, typename T>
__device__ inline void add_weight_gradient(const LinearProblem<T>& problem,
                                           const LinearMemory<T>& memory, int rows, int chunk,
                                           int first) {
  using A = Accumulation<T>;
  constexpr int kCount = kSumColumns<T, kColumns>;
  A sums[kCount][kWide<T>] = {};
  const A* factors = memory.head_factors + first * problem.rows;
  for (int row = 0; row < rows; row += kGroup) {
    A x[kGroup][kWide<T>];
    load_features(problem, memory.features + row * problem.chunks * kWide<T>, chunk, x);
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      A factor[kGroup];
      load_four(factors + m * problem.rows + row, factor);
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
#pragma unroll
        for (int i = 0; i < kWide<T>; ++i) sums[m][i] += factor[r] * x[r][i];
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
    if (first + m >= problem.columns) break;
    A* to = memory.weight_gradient + (first + m) * problem.pitch + place_of_chunk<T>(chunk);
    A before[kWide<T>];
    load_chunk<T>(to, before);
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) before[i] += sums[m][i];
    store_chunk<T>(to, before);
  }
}

// Writes one chunk of the features' gradient of a group of rows, of which `rows` are there.
template <typename T>
__device__ inline void write_features_gradient(const LinearProblem<T>& problem,
                                               const LinearMemory<T>& memory,
                                               std::int64_t first_row, int rows, int group,
                                               int chunk) {
  using A = Accumulation<T>;
  A sums[kGroup][kWide<T>] = {};
  const A* weight = memory.weight + place_of_chunk<T>(chunk);
  const A* factors = memory.features_factors + group * kGroup;
  const auto add_column = [&] {
    A w[kWide<T>], factor[kGroup];
    load_chunk<T>(weight, w);
    load_four(factors, factor);
    weight += problem.pitch;
    factors += problem.rows;
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
#pragma unroll
      for (int i = 0; i < kWide<T>; ++i) sums[r][i] += factor[r] * w[i];
    }
  };
  int m = 0;
#pragma unroll 1
  for (; m + 4 <= problem.columns; m += 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) add_column();
  }
#pragma unroll 1
  for (; m < problem.columns; ++m) add_column();
#pragma unroll
  for (int r = 0; r < kGroup; ++r) {
    if (r >= rows) break;
    T* row = problem.features_gradient + (first_row + r) * problem.width;
    store_window(row, chunk * kWide<T>, problem.width, problem.wide_gradient, sums[r]);
  }
}

// How a tile's gradients are shared out among warps. The weights' gradient is a few large units
// (kWarp chunks times kSumColumns), which go round the warps; the features' gradient is many small
// ones (kWarp chunks of a group), of which each warp gets as many as make up for its large ones.
struct LinearShares {
  int chunk_groups;  // of kWarp chunks each
  int head_units;
  int units = 0;        // this warp's among the features' units: how many, and the first one's ...
  int group = 0;        // ... group of rows
  int chunk_group = 0;  // ... and of chunks

  __device__ LinearShares(int warp, int warps, int chunks, int columns, int sum_columns, int groups,
                          bool features_gradient, bool head_gradient) {
    chunk_groups = (chunks + kWarp - 1) / kWarp;
    head_units = head_gradient ? chunk_groups * ((columns + sum_columns - 1) / sum_columns) : 0;
    const int all = features_gradient ? chunk_groups * groups : 0;
    if (all == 0) return;
    const int large = groups * sum_columns;  // multiply-adds, but for a common factor
    const int quota = (head_units * large + all * columns + warps - 1) / warps;
    int first = 0, end = 0;
#pragma unroll 1
    for (int w = 0; w <= warp; ++w) {
      const int own = (head_units - w + warps - 1) / warps * large;
      first = end;
      if (quota > own) end += (quota - own + columns - 1) / columns;
    }
    first = first < all ? first : all;
    units = (end < all ? end : all) - first;
    group = first / chunk_groups;
    chunk_group = first - group * chunk_groups;
  }
};

}  // namespace lnl::cuda
