// Sites with few classes, many positions: memory [N, K, C, S]. A thread works on several sites at a
// time, adjacent ones where they can be read as one vector, so that every access of a warp is
// coalesced and the per-site work is shared out. It keeps its logits, as they came, in its own
// column of shared memory, which no other thread reads, and computes their powers twice: so a
// column is short and many threads find room. Logits come by asynchronous copies, and as soon as a
// class's gradient is made, its place takes those of the next sites.
#pragma once

#include "bias_loss_rows.cuh"

namespace lnl::cuda {

// One access of kCount adjacent accumulators of a column.
template <int kCount, typename A>
__device__ inline void load_column(const A* address, A (&values)[kCount]) {
  constexpr int kPart = kCount < kWide<A> ? kCount : kWide<A>;
#pragma unroll
  for (int first = 0; first < kCount; first += kPart) {
    const auto pack = Pack<A, kPart>::load(address + first);
#pragma unroll
    for (int i = 0; i < kPart; ++i) values[first + i] = pack.values[i];
  }
}
template <int kCount, typename A>
__device__ inline void store_column(A* address, const A (&values)[kCount]) {
  constexpr int kPart = kCount < kWide<A> ? kCount : kWide<A>;
#pragma unroll
  for (int first = 0; first < kCount; first += kPart) {
    Pack<A, kPart> pack;
#pragma unroll
    for (int i = 0; i < kPart; ++i) pack.values[i] = values[first + i];
    pack.store(address + first);
  }
}

// Whether a thread's sites come by asynchronous copies, which are of four bytes or more.
template <typename T, bool kVector>
constexpr bool kAsync = kVector || sizeof(T) >= 4;

// Sites of a thread and the place of their class 0 in logits. kLanes adjacent lanes share a run of
// kLanes * kSites sites.
template <typename T, int kSites, bool kVector, int kLanes = kWarp>
struct ThreadSites {
  std::int64_t begin[kVector ? 1 : kSites];
  std::int64_t target[kVector ? 1 : kSites];
  std::int64_t output[kVector ? 1 : kSites];
  bool here[kVector ? 1 : kSites];

  __device__ ThreadSites(const Problem<T>& problem, std::int64_t first, int head) {
#pragma unroll
    for (int v = 0; v < (kVector ? 1 : kSites); ++v) {
      // Without vectors adjacent lanes take adjacent sites, kLanes apart for one thread.
      const int lane = threadIdx.x % kLanes;
      const std::int64_t site = first + (kVector ? lane * kSites : lane + v * kLanes);
      here[v] = site < problem.sites;
      const std::int64_t sample = here[v] ? problem.by_positions.divide(site) : 0;
      const std::int64_t position = here[v] ? site - sample * problem.positions : 0;
      const std::int64_t row = sample * problem.heads + head;
      output[v] = site;
      target[v] = row * problem.positions + position;
      begin[v] = row * problem.classes * problem.positions + position;
    }
  }
  __device__ bool is_here(int v) const { return here[kVector ? 0 : v]; }
  __device__ std::int64_t target_of(int v) const {
    return kVector ? target[0] + v : target[kVector ? 0 : v];
  }
  __device__ std::int64_t output_of(int v) const {
    return kVector ? output[0] + v : output[kVector ? 0 : v];
  }

  __device__ void read_labels_of(const Problem<T>& problem, Label (&labels)[kSites]) const {
    if constexpr (kVector) {
      if (here[0]) read_labels(problem, target[0], labels);
    } else {
#pragma unroll
      for (int v = 0; v < kSites; ++v) {
        if (here[v]) labels[v] = read_label(problem, target[v]);
      }
    }
  }

  // As they are in memory; those that are not here stay what they were.
  __device__ void load(const T* from, std::int64_t offset, Pack<T, kSites>& pack) const {
    if constexpr (kVector) {
      if (here[0]) pack = Pack<T, kSites>::load(from + begin[0] + offset);
    } else {
#pragma unroll
      for (int v = 0; v < kSites; ++v) {
        if (here[v]) pack.values[v] = from[begin[v] + offset];
      }
    }
  }
  // Starts to copy them into shared memory, where they arrive at the wait for their group.
  __device__ void copy(const T* from, std::int64_t offset, T* to) const {
    static_assert(kAsync<T, kVector>);
    if (!here[0]) return;
    if constexpr (kVector) {
      __pipeline_memcpy_async(to, from + begin[0] + offset, kSites * sizeof(T));
    } else {
#pragma unroll
      for (int v = 0; v < kSites; ++v) {
        if (here[v]) {
          __pipeline_memcpy_async(to + v, from + begin[v] + offset, sizeof(T));
        } else {
          to[v] = narrow<T>(-kInfinity<Accumulation<T>>);
        }
      }
    }
  }
  // y of class c.
  __device__ void load_targets(const Problem<T>& problem, int c, std::int64_t offset,
                               const Label (&labels)[kSites], Accumulation<T> (&y)[kSites]) const {
    using A = Accumulation<T>;
    if (problem.labels == nullptr && problem.widens_probabilities()) {
      load(static_cast<const A*>(problem.probabilities), offset, A(0), y);
    } else if (problem.labels == nullptr) {
      load(static_cast<const T*>(problem.probabilities), offset, A(0), y);
    }
#pragma unroll
    for (int v = 0; v < kSites; ++v) {
      if (problem.labels != nullptr) y[v] = A(c == labels[v].value);
      y[v] = target_of_class(problem, c, y[v]);
    }
  }
  template <typename Element>
  __device__ void load(const Element* from, std::int64_t offset, Accumulation<T> fill,
                       Accumulation<T> (&values)[kSites]) const {
    if constexpr (kVector) {
      if (!here[0]) return;
      constexpr int kPart = kSites < kWide<Element> ? kSites : kWide<Element>;
#pragma unroll
      for (int part = 0; part < kSites; part += kPart) {
        const auto pack = Pack<Element, kPart>::load(from + begin[0] + offset + part);
#pragma unroll
        for (int v = 0; v < kPart; ++v) values[part + v] = widen(pack.values[v]);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kSites; ++v) {
        values[v] = here[v] ? Accumulation<T>(widen(from[begin[v] + offset])) : fill;
      }
    }
  }
  __device__ void store(T* to, std::int64_t offset, const Accumulation<T> (&values)[kSites]) const {
    if constexpr (kVector) {
      Pack<T, kSites> pack;
#pragma unroll
      for (int v = 0; v < kSites; ++v) pack.values[v] = narrow<T>(values[v]);
      pack.store_global(to + begin[0] + offset);
    } else {
#pragma unroll
      for (int v = 0; v < kSites; ++v) {
        if (here[v]) to[begin[v] + offset] = narrow<T>(values[v]);
      }
    }
  }
};

// Blocks of sites_small on a multiprocessor that leave its threads registers enough not to spill.
template <typename T, bool kDense, int kSites>
constexpr int kSmallBlocks = sizeof(T) == 8 || (kDense && kSites == 8) ? 2
                             : kDense                                  ? 3
                                                                       : 4;

// Classes that a thread of sites_small asks for at a time without asynchronous copies.
constexpr int kSmallBatch = 8;

template <typename T, bool kDense, int kSites, bool kVector>
__global__ void __launch_bounds__(128, kSmallBlocks<T, kDense, kSites>)
    sites_small(Problem<T> problem) {
  using A = Accumulation<T>;
  constexpr int kBatch = kSmallBatch;
  constexpr bool kCopies = kAsync<T, kVector>;
  LNL_SHARED(shared);
  const int step = blockDim.x * kSites;  // from class to class
  // The thread's columns of logits, those under way too, and, when dense, its column of targets.
  T* const columns = reinterpret_cast<T*>(shared) + threadIdx.x * kSites;
  A* const targets =
      reinterpret_cast<A*>(shared + problem.ahead * problem.classes * step * sizeof(T)) +
      threadIdx.x * kSites;
  const int head = blockIdx.y;
  const A* denominators;
  if (!begin_turn(problem, shared, head, 1, denominators)) return;
  const auto scales = head_scales(problem, denominators, head);
  const bool one_hot = problem.labels != nullptr && problem.floor == A(0);
  Totals<A> totals;
  LabelCounts<A> counts;
  const std::int64_t warp_sites = kWarp * kSites;
  const std::int64_t first_site =
      std::int64_t(blockIdx.x) * step + threadIdx.x / kWarp * warp_sites;
  const std::int64_t stride = std::int64_t(gridDim.x) * step;
  T* stage = columns;
  if constexpr (kCopies) {
#pragma unroll 1
    for (int i = 0; i < problem.ahead; ++i) {
      const ThreadSites<T, kSites, kVector> sites(problem, first_site + i * stride, head);
      for (int c = 0; c < problem.classes; ++c) {
        sites.copy(problem.logits, c * problem.positions,
                   columns + (i * problem.classes + c) * step);
      }
      __pipeline_commit();
    }
  }
  for (std::int64_t first = first_site; first < problem.sites; first += stride) {
    const ThreadSites<T, kSites, kVector> sites(problem, first, head);
    if (!sites.is_here(0)) continue;  // its later sites lie further on
    Label label[kSites];
    sites.read_labels_of(problem, label);
    A maximum[kSites];
#pragma unroll
    for (int v = 0; v < kSites; ++v) maximum[v] = -kInfinity<A>;
    std::int64_t offset = 0;  // of class c from class 0; here and below
    T* column = stage;
    if constexpr (kCopies) {
      __pipeline_wait_prior(problem.ahead - 1);
#pragma unroll 2
      for (int c = 0; c < problem.classes; ++c) {
        const auto logits = Pack<T, kSites>::load(column);
#pragma unroll
        for (int v = 0; v < kSites; ++v) maximum[v] = larger(maximum[v], widen(logits.values[v]));
        column += step;
      }
    }
#pragma unroll 1
    for (int c = 0; !kCopies && c < problem.classes; c += kBatch) {
      Pack<T, kSites> logits[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (c + k < problem.classes) sites.load(problem.logits, offset, logits[k]);
        offset += problem.positions;
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (c + k >= problem.classes) break;
#pragma unroll
        for (int v = 0; v < kSites; ++v)
          maximum[v] = larger(maximum[v], widen(logits[k].values[v]));
        logits[k].store(column);
        column += step;
      }
    }

    SiteSums<A, kDense> sums[kSites];
    offset = 0;
    column = stage;
    A* target_column = targets;
#pragma unroll 1
    for (int c = 0; c < problem.classes; ++c) {
      const auto logits = Pack<T, kSites>::load(column);
      A y[kSites] = {};
      if constexpr (kDense) {
        sites.load_targets(problem, c, offset, label, y);
        store_column(target_column, y);
        offset += problem.positions;
        target_column += step;
      }
#pragma unroll
      for (int v = 0; v < kSites; ++v) {
        A distance, power;
        add_class<T>(sums[v], A(widen(logits.values[v])), maximum[v], y[v], one_hot, distance,
                     power);
      }
      column += step;
    }

    Site<A, kDense> site[kSites];
#pragma unroll
    for (int v = 0; v < kSites; ++v) {
      if (!sites.is_here(v)) continue;
      A label_logit = 0;
      if (!kDense && label[v].is_class()) label_logit = widen(stage[label[v].value * step + v]);
      site[v] = finish_site(problem, scales, label[v], sites.output_of(v), sums[v], maximum[v],
                            label_logit);
      counts.add(problem, label[v]);
      write_site(problem, scales, sites.target_of(v), site[v]);
    }
    totals.add(site);
    const ThreadSites<T, kSites, kVector> next(problem, first + problem.ahead * stride, head);
    offset = 0;
    column = stage;
    target_column = targets;
#pragma unroll 1
    for (int c = 0; c < problem.classes;
         ++c, offset += problem.positions, column += step, target_column += step) {
      const auto logits = Pack<T, kSites>::load(column);
      if constexpr (kCopies) next.copy(problem.logits, offset, column);
      if (!problem.wants_gradient()) continue;
      A distance[kSites], power[kSites], y[kSites] = {}, gradient[kSites];
      if constexpr (kDense) load_column(target_column, y);
#pragma unroll
      for (int v = 0; v < kSites; ++v) {
        distance[v] = finite_distance(A(widen(logits.values[v])) - maximum[v]);
        power[v] = exp_distance<T>(distance[v]);
      }
      if (problem.gradient != nullptr) {
#pragma unroll
        for (int v = 0; v < kSites; ++v) {
          gradient[v] = site[v].gradient(c, distance[v], power[v], y[v]);
        }
        sites.store(problem.gradient, offset, gradient);
      }
      if (problem.head_gradient != nullptr) {
#pragma unroll
        for (int v = 0; v < kSites; ++v) {
          gradient[v] = site[v].head_gradient(c, distance[v], power[v], y[v]);
        }
        sites.store(problem.head_gradient, offset, gradient);
      }
    }
    if constexpr (kCopies) {
      __pipeline_commit();
      stage = column == columns + problem.ahead * problem.classes * step ? columns : column;
    }
  }
  write_partials(problem, reinterpret_cast<A*>(shared), blockDim.x, threadIdx.x, true, 0, 1, head,
                 totals, counts);
}

}  // namespace lnl::cuda
