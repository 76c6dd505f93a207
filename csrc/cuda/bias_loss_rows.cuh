// Rows of adjacent classes (one position, or channels_last), up to a thousand classes.
//
// rows_small: a warp copies 32 rows to shared memory in whole 128-bit accesses, each lane works on
// one row there, and the warp copies the gradient out again.
// rows_medium: a group of lanes holds a row in registers.
#pragma once

#include "bias_loss_reduce.cuh"

namespace lnl::cuda {

// Shared memory of rows_small and sites_small: distances, powers and, when dense, targets.
template <bool kDense>
constexpr int kTiles = kDense ? 3 : 2;

// Copies `count` adjacent elements to rows of `pitch` in shared memory, from global memory or from
// where TileStream has put them, in whole windows. With kWholeFours a row is a multiple of four
// elements, so that four never lie in two rows.
template <bool kWholeFours, bool kStaged, typename T, typename Element>
__device__ inline void copy_tile_in_as(const Problem<T>& problem, const Element* from, int count,
                                       bool wide, Accumulation<T>* tile) {
  constexpr int kBatch = !kStaged ? 4 : sizeof(T) == 8 ? 1 : 2;  // double has no registers left
  const int lane = threadIdx.x % kWarp;
  const int windows = (count + kWide<Element> - 1) / kWide<Element>;
#pragma unroll 1
  for (int first = lane; first < windows; first += kBatch * kWarp) {
    Accumulation<T> values[kBatch][kWide<Element>];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int element = (first + k * kWarp) * kWide<Element>;
      if constexpr (!kStaged) {
        load_window(from, element, count, wide, Accumulation<T>(0), values[k]);
      } else if (element < count) {
        load_staged(from + element, values[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int element = (first + k * kWarp) * kWide<Element>;
      if (element >= count) break;
      int row = problem.by_classes.divide_int(element);
      int c = element - row * problem.classes;
      Accumulation<T>* to = tile + row * problem.pitch + c;
      if constexpr (kWholeFours) {
#pragma unroll
        for (int part = 0; part < kWide<Element>; part += 4) {
          const Accumulation<T> four[4] = {values[k][part], values[k][part + 1],
                                           values[k][part + 2], values[k][part + 3]};
          if (element + part < count) store_four(to, four);
          to += 4, c += 4;
          if (c == problem.classes) c = 0, to += problem.pitch - problem.classes;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWide<Element>; ++i) {
          if (element + i < count) *to = values[k][i];
          ++to, ++c;
          if (c == problem.classes) c = 0, to += problem.pitch - problem.classes;
        }
      }
    }
  }
}

template <bool kWholeFours, typename T>
__device__ inline void copy_tile_out_as(const Problem<T>& problem, const Accumulation<T>* tile,
                                        int count, bool wide, T* to) {
  const int lane = threadIdx.x % kWarp;
  const int windows = (count + kWide<T> - 1) / kWide<T>;
#pragma unroll 1
  for (int window = lane; window < windows; window += kWarp) {
    const int element = window * kWide<T>;
    const int row = problem.by_classes.divide_int(element);
    int c = element - row * problem.classes;
    const Accumulation<T>* from = tile + row * problem.pitch + c;
    Accumulation<T> values[kWide<T>] = {};
    if constexpr (kWholeFours) {
#pragma unroll
      for (int part = 0; part < kWide<T>; part += 4) {
        Accumulation<T> four[4] = {};
        if (element + part < count) load_four(from, four);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[part + i] = four[i];
        from += 4, c += 4;
        if (c == problem.classes) c = 0, from += problem.pitch - problem.classes;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWide<T>; ++i) {
        if (element + i < count) values[i] = *from;
        ++from, ++c;
        if (c == problem.classes) c = 0, from += problem.pitch - problem.classes;
      }
    }
    store_window(to, element, count, wide, values);
  }
}

// Whether rows begin at whole fours of elements, and an access holds no less.
template <typename Element, typename T>
__device__ inline bool in_fours(const Problem<T>& problem) {
  return kWide<Element> >= 4 && problem.classes % 4 == 0;
}
template <bool kStaged, typename T, typename Element>
__device__ inline void copy_tile_in(const Problem<T>& problem, const Element* from, int count,
                                    bool wide, Accumulation<T>* tile) {
  if (in_fours<Element>(problem)) {
    copy_tile_in_as<kWide<Element> >= 4, kStaged>(problem, from, count, wide, tile);
  } else {
    copy_tile_in_as<false, kStaged>(problem, from, count, wide, tile);
  }
}
template <typename T>
__device__ inline void copy_tile_out(const Problem<T>& problem, const Accumulation<T>* tile,
                                     int count, bool wide, T* to) {
  if (in_fours<T>(problem)) {
    copy_tile_out_as<kWide<T> >= 4>(problem, tile, count, wide, to);
  } else {
    copy_tile_out_as<false>(problem, tile, count, wide, to);
  }
}

// One lane's row: sums, values, gradients; the tiles end up holding both gradients.
template <typename T, bool kDense>
__device__ inline void work_on_row(const Problem<T>& problem,
                                   const HeadScales<Accumulation<T>>& scales, std::int64_t row,
                                   Accumulation<T>* distances, Accumulation<T>* powers,
                                   Accumulation<T>* targets, Totals<Accumulation<T>>& totals,
                                   LabelCounts<Accumulation<T>>& counts) {
  using A = Accumulation<T>;
  const SitePlace place = place_of_row(problem, row);
  const Label label = read_label(problem, place.target);
  const bool one_hot = problem.labels != nullptr && problem.floor == A(0);
  const int label_class = label.value;
  A maximum = -kInfinity<A>;
  for (int c = problem.classes; c % 4 != 0; ++c) distances[c] = -kInfinity<A>;
#pragma unroll 1
  for (int c = 0; c < problem.classes; c += 4) {
    A logits[4];
    load_four(distances + c, logits);
#pragma unroll
    for (int i = 0; i < 4; ++i) maximum = larger(maximum, logits[i]);
  }
  const A label_logit = !kDense && label_class >= 0 ? distances[label_class] : A(0);
  SiteSums<A, kDense> sums;
#pragma unroll 1
  for (int c = 0; c < problem.classes; c += 4) {
    A logits[4], y[4] = {}, distance[4], power[4];
    load_four(distances + c, logits);
    if constexpr (kDense) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c + i < problem.classes) {
          const A q = problem.labels == nullptr ? targets[c + i] : A(c + i == label_class);
          y[i] = target_of_class(problem, c + i, q);
        }
      }
      store_four(targets + c, y);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kDense && c + i >= problem.classes) {
        distance[i] = lowest_distance<A>();
        power[i] = 0;
      } else {
        add_class<T>(sums, logits[i], maximum, y[i], one_hot, distance[i], power[i]);
      }
    }
    store_four(distances + c, distance);
    store_four(powers + c, power);
  }
  const auto site = finish_site(problem, scales, label, place.output, sums, maximum, label_logit);
  totals.add(site);
  counts.add(problem, label);
  write_site(problem, scales, place.target, site);
  if (!problem.wants_gradient()) return;
#pragma unroll 1
  for (int c = 0; c < problem.classes; c += 4) {
    A distance[4], power[4], y[4] = {}, gradient[4];
    load_four(distances + c, distance);
    load_four(powers + c, power);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      distance[i] = finite_distance(distance[i]);
      power[i] = larger(power[i], A(0));
    }
    if constexpr (kDense) load_four(targets + c, y);
    if (problem.gradient != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) gradient[i] = site.gradient(distance[i], power[i], y[i]);
      store_four(powers + c, gradient);
    }
    if (problem.head_gradient != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) gradient[i] = site.head_gradient(distance[i], power[i], y[i]);
      store_four(distances + c, gradient);
    }
  }
  if (!kDense && label.is_class()) {
    powers[label.value] = site.at_label;
    distances[label.value] = site.head_at_label;
  }
}

// A warp's tiles of 32 rows on their way into shared memory, as they lie in global memory:
// `Problem::ahead` of them, the next ones while the warp works on one. A lane copies the windows
// that copy_tile_in has it read, so that none waits for another's copies.
template <typename T>
class TileStream {
 public:
  __device__ TileStream(const Problem<T>& problem, T* stage, std::int64_t first)
      : problem_(problem), stage_(stage), first_(first) {
    for (int i = 0; i < problem.ahead; ++i) copy();
  }

  // Starts to copy the next tile to where the oldest one was.
  __device__ void copy() {
    const std::int64_t rows = problem_.sites * problem_.heads - first_;
    if (rows > 0) {
      const int count = static_cast<int>(rows < kWarp ? rows : kWarp) * problem_.classes;
      const T* from = problem_.logits + first_ * problem_.classes;
#pragma unroll 1
      for (int c = threadIdx.x % kWarp * kWide<T>; c < count; c += kWarp * kWide<T>) {
        copy_window(from, c, count, problem_.wide_logits, place() + c);
      }
    }
    __pipeline_commit();
    first_ += std::int64_t(gridDim.x) * blockDim.x;
    slot_ = slot_ + 1 == problem_.ahead ? 0 : slot_ + 1;
  }
  // The oldest tile, once this lane's copies have arrived.
  __device__ const T* wait() const {
    __pipeline_wait_prior(problem_.ahead - 1);
    return place();
  }

 private:
  __device__ T* place() const { return stage_ + slot_ * kWarp * problem_.classes; }

  const Problem<T>& problem_;
  T* stage_;
  std::int64_t first_;
  int slot_ = 0;
};

// One warp's tiles: 32 rows in, work, and their gradients out.
template <typename T, bool kDense>
__device__ inline void work_on_tile(const Problem<T>& problem,
                                    const HeadScales<Accumulation<T>>& scales,
                                    TileStream<T>& stream, std::int64_t first, int rows,
                                    Accumulation<T>* distances, Accumulation<T>* powers,
                                    Accumulation<T>* targets, Totals<Accumulation<T>>& totals,
                                    LabelCounts<Accumulation<T>>& counts) {
  using A = Accumulation<T>;
  const int lane = threadIdx.x % kWarp;
  const int count = rows * problem.classes;
  const std::int64_t begin = first * problem.classes;
  copy_tile_in<true>(problem, stream.wait(), count, true, distances);
  if (kDense && problem.labels == nullptr) {
    if (problem.widens_probabilities()) {
      copy_tile_in<false>(problem, static_cast<const A*>(problem.probabilities) + begin, count,
                          problem.wide_targets, targets);
    } else {
      copy_tile_in<false>(problem, static_cast<const T*>(problem.probabilities) + begin, count,
                          problem.wide_targets, targets);
    }
  }
  __syncwarp();
  stream.copy();
  if (lane < rows) {
    const int own = lane * problem.pitch;
    work_on_row<T, kDense>(problem, scales, first + lane, distances + own, powers + own,
                           targets + own, totals, counts);
  }
  __syncwarp();
  if (problem.gradient != nullptr) {
    copy_tile_out(problem, powers, count, problem.wide_gradient, problem.gradient + begin);
  }
  if (problem.head_gradient != nullptr) {
    copy_tile_out(problem, distances, count, problem.wide_head_gradient,
                  problem.head_gradient + begin);
  }
  // No barrier before the next rows: a lane copies in over what it has itself copied out.
}

template <typename T, bool kDense>
__global__ void __launch_bounds__(128, 4) rows_small(Problem<T> problem) {
  using A = Accumulation<T>;
  LNL_SHARED(shared);
  const int warp = threadIdx.x / kWarp;
  const int tile = kWarp * problem.pitch;
  const int staged = problem.ahead * kWarp * problem.classes;
  unsigned char* own = shared + warp * (kTiles<kDense> * tile * sizeof(A) + staged * sizeof(T));
  A* distances = reinterpret_cast<A*>(own);
  A* powers = distances + tile;
  A* targets = powers + tile;
  const std::int64_t first_row = std::int64_t(blockIdx.x) * blockDim.x;
  const std::int64_t rows = problem.sites * problem.heads;
  const A* denominators;
  if (!begin_turn(problem, shared, 0, problem.heads, denominators)) return;
  // The launcher makes the grid's stride a multiple of the heads: a thread stays with one.
  const auto scales =
      head_scales(problem, denominators, head_of_slot(problem, blockDim.x, threadIdx.x));
  Totals<A> totals;
  LabelCounts<A> counts;
  TileStream<T> stream(problem, reinterpret_cast<T*>(own + kTiles<kDense> * tile * sizeof(A)),
                       first_row + warp * kWarp);
  for (std::int64_t first = first_row + warp * kWarp; first < rows;
       first += std::int64_t(gridDim.x) * blockDim.x) {
    const int here = static_cast<int>(rows - first < kWarp ? rows - first : kWarp);
    work_on_tile<T, kDense>(problem, scales, stream, first, here, distances, powers, targets,
                            totals, counts);
  }
  write_partials(problem, reinterpret_cast<A*>(shared), blockDim.x, threadIdx.x, true,
                 head_of_slot(problem, blockDim.x, 0), problem.heads, 0, totals, counts);
}

// Blocks of rows_medium on a multiprocessor that leave its threads registers enough not to spill.
template <typename T, bool kDense, int kElements>
constexpr int kMediumBlocks = sizeof(T) == 8 || (kDense && kElements == 32) ? 2
                              : kDense                                      ? 3
                                                                            : 4;

// Rows of a lane that are under way while it works on one: enough for 40 KiB a multiprocessor where
// half of its windows are beyond the row.
template <typename T, int kElements>
constexpr int kRowsAhead = sizeof(T) == 2    ? (kElements == 16 ? 6 : 5)
                           : sizeof(T) == 8  ? 3
                           : kElements == 16 ? 4
                                             : 2;

// A lane holds kElements of a row: 16, or 32 for wide rows, whose per-row work fewer lanes then
// share. Where keeping 32 e^d would take too many registers, they are computed again.
template <typename T, bool kDense, int kElements>
__global__ void __launch_bounds__(128, kMediumBlocks<T, kDense, kElements>)
    rows_medium(Problem<T> problem) {
  using A = Accumulation<T>;
  constexpr int kWindows = kElements / kWide<T>;
  constexpr bool kKeepPowers = kElements <= 16 || (sizeof(T) == 2 && !kDense);
  LNL_SHARED(shared);
  const int lanes = problem.lanes_per_row;
  const int slots = blockDim.x / lanes;
  const int slot = threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  const std::int64_t first_row = std::int64_t(blockIdx.x) * slots;
  const std::int64_t rows = problem.sites * problem.heads;
  const A* denominators;
  if (!begin_turn(problem, shared, 0, problem.heads, denominators)) return;
  const int first_head = head_of_slot(problem, slots, 0);
  const auto scales = head_scales(problem, denominators, head_of_slot(problem, slots, slot));
  const bool one_hot = problem.labels != nullptr && problem.floor == A(0);
  // A lane copies the windows that it will itself read.
  constexpr int kAhead = kRowsAhead<T, kElements>;
  const auto place = [&](int stage, int w) {
    return reinterpret_cast<T*>(shared) +
           ((stage * kWindows + w) * static_cast<int>(blockDim.x) + threadIdx.x) * kWide<T>;
  };
  const std::int64_t stride = std::int64_t(gridDim.x) * slots;
  const auto copy = [&](std::int64_t row, int stage) {
    if (row < rows) {
      const T* logits = problem.logits + row * problem.classes;
      const int before = elements_before(logits);
#pragma unroll
      for (int w = 0; w < kWindows; ++w) {
        const int c = (w * lanes + lane) * kWide<T> - before;
        copy_window(logits, c, problem.classes, true, place(stage, w));
      }
    }
    __pipeline_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) copy(first_row + slot + i * stride, i);
  int stage = 0;
  Totals<A> totals;
  LabelCounts<A> counts;
  for (std::int64_t first = first_row; first < rows; first += stride) {
    const std::int64_t row = first + slot;
    const bool here = row < rows;
    const int classes = here ? problem.classes : 0;
    const int before = elements_before(problem.logits + (here ? row : 0) * problem.classes);
    A values[kWindows][kWide<T>], powers[kKeepPowers ? kWindows : 1][kWide<T>];
    A y[kDense ? kWindows : 1][kWide<T>];
    A maximum = -kInfinity<A>;
    __pipeline_wait_prior(kAhead - 1);
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
#pragma unroll
      for (int i = 0; i < kWide<T>; ++i) values[w][i] = -kInfinity<A>;
      if (here) load_staged(place(stage, w), values[w]);
    }
    copy(row + kAhead * stride, stage);
    stage = stage + 1 == kAhead ? 0 : stage + 1;
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
#pragma unroll
      for (int i = 0; i < kWide<T>; ++i) maximum = larger(maximum, values[w][i]);
    }
    maximum = largest_of_lanes(maximum, lanes);
    const SitePlace place = place_of_row(problem, here ? row : 0);
    const Label label = read_label(problem, place.target);
    const int label_class = label.value;
    A label_logit = -kInfinity<A>;
    SiteSums<A, kDense> sums;
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
      const int c = (w * lanes + lane) * kWide<T> - before;
      if constexpr (kDense) {
        targets_of_window(problem, row * problem.classes, c, classes, label_class, y[w]);
      } else {
        const int at = label_class - c;
        if (at >= 0 && at < kWide<T>) {
#pragma unroll
          for (int i = 0; i < kWide<T>; ++i) label_logit = i == at ? values[w][i] : label_logit;
        }
      }
#pragma unroll
      for (int i = 0; i < kWide<T>; ++i) {
        A power = 0;
        if constexpr (kDense) {
          if (c + i >= 0 && c + i < classes) {
            add_class<T>(sums, values[w][i], maximum, y[w][i], one_hot, values[w][i], power);
          } else {
            values[w][i] = lowest_distance<A>();
          }
        } else {
          add_class<T>(sums, values[w][i], maximum, A(0), one_hot, values[w][i], power);
        }
        if constexpr (kKeepPowers) powers[w][i] = power;
      }
    }
    sum_sites_of_lanes(sums, lanes);
    if constexpr (!kDense) label_logit = largest_of_lanes(label_logit, lanes);
    if (!here) continue;
    const auto site = finish_site(problem, scales, label, place.output, sums, maximum, label_logit);
    if (lane == 0) {
      totals.add(site);
      counts.add(problem, label);
      write_site(problem, scales, place.target, site);
    }
    if (!problem.wants_gradient()) continue;
    if (sums.t != sums.t) {  // distances and powers are finite in Site::gradient
#pragma unroll
      for (int w = 0; w < kWindows; ++w) {
#pragma unroll
        for (int i = 0; i < kWide<T>; ++i) {
          values[w][i] = lowest_distance<A>();
          if constexpr (kKeepPowers) powers[w][i] = 0;
        }
      }
    }
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
      const int c = (w * lanes + lane) * kWide<T> - before;
      A power[kWide<T>], target[kWide<T>] = {}, gradient[kWide<T>];
#pragma unroll
      for (int i = 0; i < kWide<T>; ++i) {
        if constexpr (kKeepPowers) {
          power[i] = powers[w][i];
        } else {
          power[i] = exp_distance<T>(values[w][i]);
        }
        if constexpr (kDense) target[i] = y[w][i];
      }
      const std::int64_t begin = row * problem.classes;
      if (problem.gradient != nullptr) {
        gradient_of_classes(site, c, values[w], power, target, gradient);
        store_window(problem.gradient + begin, c, classes, problem.wide_gradient, gradient);
      }
      if (problem.head_gradient != nullptr) {
        head_gradient_of_classes(site, c, values[w], power, target, gradient);
        store_window(problem.head_gradient + begin, c, classes, problem.wide_head_gradient,
                     gradient);
      }
    }
  }
  write_partials(problem, reinterpret_cast<A*>(shared), slots, slot, lane == 0, first_head,
                 problem.heads, 0, totals, counts);
}

}  // namespace lnl::cuda
