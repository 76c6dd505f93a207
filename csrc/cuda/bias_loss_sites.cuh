// Sites with few classes, many positions: memory [N, K, C, S]. A thread works on several sites at a
// time, adjacent ones where they can be read as one vector, so that every access of a warp is
// coalesced and the per-site work is shared out. It keeps its classes in its own column of shared
// memory; no other thread reads them.
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

// Sites of a thread and the place of their class 0 in logits.
template <typename T, int kSites, bool kVector>
struct ThreadSites {
  std::int64_t begin[kVector ? 1 : kSites];
  std::int64_t target[kVector ? 1 : kSites];
  std::int64_t output[kVector ? 1 : kSites];
  bool here[kVector ? 1 : kSites];

  __device__ ThreadSites(const Problem<T>& problem, std::int64_t first, int head) {
#pragma unroll
    for (int v = 0; v < (kVector ? 1 : kSites); ++v) {
      // Without vectors the lanes of a warp take adjacent sites, 32 apart for one thread.
      const std::int64_t site =
          first + (kVector ? threadIdx.x % kWarp * kSites : threadIdx.x % kWarp + v * kWarp);
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

  template <typename Element>
  __device__ void load(const Element* from, std::int64_t offset, Accumulation<T> fill,
                       Accumulation<T> (&values)[kSites]) const {
    if constexpr (kVector) {
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

template <typename T, bool kDense, int kSites, bool kVector>
__global__ void __launch_bounds__(128, sizeof(T) == 8 || kSites == 8 ? 2 : (kDense ? 3 : 4))
    sites_small(Problem<T> problem) {
  using A = Accumulation<T>;
  constexpr int kBatch = 4;
  LNL_SHARED(shared);
  const int step = blockDim.x * kSites;  // from class to class
  // The thread's column of distances; those of powers and, when dense, of targets follow.
  A* distances = reinterpret_cast<A*>(shared) + threadIdx.x * kSites;
  const int head = blockIdx.y;
  const auto scales = head_scales(problem, head);
  const bool one_hot = problem.labels != nullptr && problem.floor == A(0);
  Totals<A> totals;
  const std::int64_t warp_sites = kWarp * kSites;
  for (std::int64_t first = std::int64_t(blockIdx.x) * step + threadIdx.x / kWarp * warp_sites;
       first < problem.sites; first += std::int64_t(gridDim.x) * step) {
    const ThreadSites<T, kSites, kVector> sites(problem, first, head);
    if (!sites.is_here(0)) continue;  // its later sites lie further on
    A maximum[kSites];
#pragma unroll
    for (int v = 0; v < kSites; ++v) maximum[v] = -kInfinity<A>;
    std::int64_t offset = 0;  // of class c from class 0; here and below
    A* column = distances;
    for (int c = 0; c < problem.classes; c += kBatch) {
      A logits[kBatch][kSites];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (c + k < problem.classes) sites.load(problem.logits, offset, A(0), logits[k]);
        offset += problem.positions;
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (c + k >= problem.classes) break;
#pragma unroll
        for (int v = 0; v < kSites; ++v) maximum[v] = larger(maximum[v], logits[k][v]);
        store_column(column, logits[k]);
        column += step;
      }
    }

    Label label[kSites];
    A label_logit[kSites];
    SiteSums<A, kDense> sums[kSites];
#pragma unroll
    for (int v = 0; v < kSites; ++v) {
      label_logit[v] = A(0);
      if (!sites.is_here(v)) continue;
      label[v] = read_label(problem, sites.target_of(v));
      if (!kDense && label[v].is_class()) label_logit[v] = distances[label[v].value * step + v];
    }
    offset = 0;
    column = distances;
    const int to_powers = problem.classes * step;
    for (int c = 0; c < problem.classes; ++c) {
      A logits[kSites], y[kSites] = {}, power[kSites];
      load_column(column, logits);
      if constexpr (kDense) {
        if (problem.labels == nullptr) {
          if (problem.wide_probabilities) {
            sites.load(static_cast<const A*>(problem.probabilities), offset, A(0), y);
          } else {
            sites.load(static_cast<const T*>(problem.probabilities), offset, A(0), y);
          }
        }
#pragma unroll
        for (int v = 0; v < kSites; ++v) {
          if (problem.labels != nullptr) y[v] = A(c == label[v].class_or_none());
          y[v] = target_of_class(problem, c, y[v]);
        }
        store_column(column + 2 * to_powers, y);
      }
#pragma unroll
      for (int v = 0; v < kSites; ++v) {
        add_class<T>(sums[v], logits[v], maximum[v], y[v], one_hot, logits[v], power[v]);
      }
      store_column(column, logits);
      store_column(column + to_powers, power);
      offset += problem.positions;
      column += step;
    }

    Site<A, kDense> site[kSites];
#pragma unroll
    for (int v = 0; v < kSites; ++v) {
      if (!sites.is_here(v)) continue;
      site[v] = finish_site(problem, scales, label[v], sites.output_of(v), sums[v], maximum[v],
                            label_logit[v]);
      totals.add(site[v]);
      write_site(problem, scales, sites.target_of(v), site[v]);
    }
    if (!problem.wants_gradient()) continue;
    offset = 0;
    column = distances;
    for (int c = 0; c < problem.classes; ++c) {
      A distance[kSites], power[kSites], y[kSites] = {}, gradient[kSites];
      load_column(column, distance);
      load_column(column + to_powers, power);
      if constexpr (kDense) load_column(column + 2 * to_powers, y);
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
      offset += problem.positions;
      column += step;
    }
  }
  write_partials(problem.partials, reinterpret_cast<A*>(shared), blockDim.x, threadIdx.x, true,
                 std::int64_t(0), 1, problem.heads, head, totals);
}

}  // namespace lnl::cuda
