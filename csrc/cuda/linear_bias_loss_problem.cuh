// The linear head on chip: parameters of the kernel and where a block keeps what in shared memory.
#pragma once

#include "bias_loss_rows.cuh"
#include "linear_bias_loss_launch.h"

namespace lnl::cuda {

constexpr int kMostColumns = 64;     // K * C
constexpr int kGroup = 4;            // rows that a thread works on at a time
constexpr int kLinearThreads = 512;  // most of a block

// How many of `columns` columns of logits a thread works on at a time, as far as it has registers
// for them: the fewest that take as few passes over the features as the most would.
template <typename T>
__host__ constexpr int tile_columns(int columns) {
  constexpr int kMost = sizeof(T) == 8 ? 6 : 12;
  const int passes = (columns + kMost - 1) / kMost;
  const int wanted = (columns + passes - 1) / passes;
  return wanted > 4 && kMost == 6 ? 6 : (wanted + 3) / 4 * 4;
}

// Accumulators between the halves of a chunk, see place_of_chunk.
constexpr int kHalfChunk = 32;

// A chunk is what one 128-bit access of features holds. Where in a row of accumulators in shared
// memory it begins: with 16-bit features it is eight of them, and its two halves lie 32 apart, so
// that adjacent lanes read adjacent 128 bits.
template <typename T>
__host__ __device__ constexpr int place_of_chunk(int chunk) {
  return kWide<T> == 8 ? chunk / 8 * (2 * kHalfChunk) + chunk % 8 * 4 : chunk * kWide<T>;
}

// Byte offsets into shared memory, each a multiple of 16.
struct LinearLayout {
  std::size_t weight = 0;           // A [padded columns][pitch]
  std::size_t weight_gradient = 0;  // A [columns][pitch]; nothing where it is not wanted
  std::size_t tiles = 0;            // A [tiles][slots][tile_pitch]: logits, then what replaces them
  std::size_t features_factors =
      0;                          // A [columns][rows]: what the rows of head_weight are times ...
  std::size_t head_factors = 0;   // A [padded columns][rows]: ... and the rows of features
  std::size_t bias = 0;           // A [columns]
  std::size_t scales = 0;         // HeadScales<A> [heads]
  std::size_t totals = 0;         // Totals<A> [slots]: in registers the products need the room
  std::size_t bias_gradient = 0;  // RunningSum<A> [columns]
  std::size_t features = 0;       // T [rows][chunks * kWide<T>]
  std::size_t total = 0;
};

template <typename T>
struct LinearProblem {
  using A = Accumulation<T>;

  // Its logits are in shared memory. Its gradients only say that gradients are wanted.
  Problem<T> loss;
  const T* features;
  const T* head_weight;
  const T* head_bias;     // or null
  T* features_gradient;   // or null
  A* head_partials;       // [blocks, columns * (D + 1)]: by weight, then by bias; or null
  std::int64_t all_rows;  // N
  int width;              // D
  int columns;            // K * C
  int padded_columns;     // the next multiple of the kernel's tile of columns
  int chunks;             // of a row of features
  int pitch;              // accumulators from row to row of head_weight and its gradient
  int rows;               // of a tile
  int slices;             // warps that share a group of rows, each with a part of the chunks
  // 128-bit accesses are aligned.
  bool wide_features;
  bool wide_weight;
  bool wide_gradient;
  LinearLayout layout;

  __device__ int slots() const { return rows * loss.heads; }
  __device__ int tile() const { return slots() * loss.pitch; }
};

// A block's shared memory.
template <typename T>
struct LinearMemory {
  using A = Accumulation<T>;

  A* weight;
  A* weight_gradient;
  A* tiles;
  A* features_factors;
  A* head_factors;
  A* bias;
  HeadScales<A>* scales;
  Totals<A>* totals;
  RunningSum<A>* bias_gradient;
  T* features;

  __device__ LinearMemory(unsigned char* shared, const LinearLayout& layout)
      : weight(reinterpret_cast<A*>(shared + layout.weight)),
        weight_gradient(reinterpret_cast<A*>(shared + layout.weight_gradient)),
        tiles(reinterpret_cast<A*>(shared + layout.tiles)),
        features_factors(reinterpret_cast<A*>(shared + layout.features_factors)),
        head_factors(reinterpret_cast<A*>(shared + layout.head_factors)),
        bias(reinterpret_cast<A*>(shared + layout.bias)),
        scales(reinterpret_cast<HeadScales<A>*>(shared + layout.scales)),
        totals(reinterpret_cast<Totals<A>*>(shared + layout.totals)),
        bias_gradient(reinterpret_cast<RunningSum<A>*>(shared + layout.bias_gradient)),
        features(reinterpret_cast<T*>(shared + layout.features)) {}
};

// A chunk of accumulators in shared memory, at place_of_chunk.
template <typename T>
__device__ inline void load_chunk(const Accumulation<T>* from,
                                  Accumulation<T> (&values)[kWide<T>]) {
  using A = Accumulation<T>;
#pragma unroll
  for (int part = 0; part < kWide<T> / kWide<A>; ++part) {
    const auto pack = Pack<A, kWide<A>>::load(from + part * kHalfChunk);
#pragma unroll
    for (int i = 0; i < kWide<A>; ++i) values[part * kWide<A> + i] = pack.values[i];
  }
}

template <typename T>
__device__ inline void store_chunk(Accumulation<T>* to, const Accumulation<T> (&values)[kWide<T>]) {
  using A = Accumulation<T>;
#pragma unroll
  for (int part = 0; part < kWide<T> / kWide<A>; ++part) {
    Pack<A, kWide<A>> pack;
#pragma unroll
    for (int i = 0; i < kWide<A>; ++i) pack.values[i] = values[part * kWide<A> + i];
    pack.store(to + part * kHalfChunk);
  }
}

}  // namespace lnl::cuda
