// Many classes: a first pass adds them up online, each thread against its own running maximum; the
// threads' sums are merged; a second pass makes the gradient.
//
// rows_large: a block per row. sites_large: a block per 32 adjacent vectors of sites, the classes
// shared out among its warps, so that each request of a warp is one whole 128-byte line.
//
// With Problem::stage the first pass keeps the logits in shared memory and they are read from
// global memory once. The launcher sets it wherever they fit into what a block may have: rows (or,
// for sites_large, classes times 128 bytes) of up to 227 KiB less the scratch on sm_90 and sm_100,
// 163 on sm_80, 99 on sm_86, sm_89 and sm_120, 64 on sm_75. Beyond that they are read twice, the
// second time mostly from L2; so are probabilities always.
#pragma once

#include "bias_loss_reduce.cuh"

namespace lnl::cuda {

// A thread's sums with the maximum they are taken against.
template <typename A, bool kDense>
struct OnlineSums {
  A maximum = -kInfinity<A>;
  SiteSums<A, kDense> sums;
};

// Adds classes; those not `inside` have logits of -inf and do not count.
template <typename T, bool kDense, int kCount>
__device__ inline void add_online(OnlineSums<Accumulation<T>, kDense>& online,
                                  const Accumulation<T> (&logits)[kCount],
                                  const Accumulation<T> (&y)[kCount], const bool (&inside)[kCount],
                                  bool one_hot) {
  using A = Accumulation<T>;
  A top = online.maximum;
#pragma unroll
  for (int i = 0; i < kCount; ++i) top = larger(top, logits[i]);
  if (top > online.maximum) {
    rescale<T>(online.sums, online.maximum, top);
    online.maximum = top;
  }
  // While all are -inf, their distances are taken from 0: -inf, and not NaN.
  const A reference = top == -kInfinity<A> ? A(0) : top;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    A distance, power;
    if constexpr (kDense) {
      if (!inside[i]) continue;
    }
    add_class<T>(online.sums, logits[i], reference, y[i], one_hot, distance, power);
  }
}

// The merged sums of all lanes of a group; every lane gets them.
template <typename T, bool kDense>
__device__ inline void merge_lanes(OnlineSums<Accumulation<T>, kDense>& online) {
  const auto maximum = largest_of_lanes(online.maximum, kWarp);
  rescale<T>(online.sums, online.maximum, maximum);
  online.maximum = maximum;
  sum_sites_of_lanes(online.sums, kWarp);
}

// Logits of a window, from memory or from the stage.
template <typename T>
__device__ inline void load_staged(const T* stage, int window,
                                   Accumulation<T> (&logits)[kWide<T>]) {
  const auto pack = Pack<T, kWide<T>>::load(stage + window * kWide<T>);
#pragma unroll
  for (int i = 0; i < kWide<T>; ++i) logits[i] = widen(pack.values[i]);
}

constexpr int kLargeThreads = 512;

template <typename T, bool kDense>
__global__ void __launch_bounds__(kLargeThreads, 1) rows_large(Problem<T> problem) {
  using A = Accumulation<T>;
  using Online = OnlineSums<A, kDense>;
  constexpr int kBatch = 2;
  LNL_SHARED(shared);
  Online* by_warp = reinterpret_cast<Online*>(shared);  // 32 of them
  T* stage = reinterpret_cast<T*>(shared + kWarp * sizeof(Online));
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int threads = blockDim.x;
  const std::int64_t rows = problem.sites * problem.heads;
  const auto scales = head_scales(problem, static_cast<int>(blockIdx.x % problem.heads));
  const bool one_hot = problem.labels != nullptr && problem.floor == A(0);
  Totals<A> totals;
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const std::int64_t begin = row * problem.classes;
    const T* logits = problem.logits + begin;
    const int before = static_cast<int>(reinterpret_cast<std::uintptr_t>(logits) % 32 / sizeof(T));
    const int windows = (problem.classes + before + kWide<T> - 1) / kWide<T>;
    const SitePlace place = place_of_row(problem, row);
    const Label label = read_label(problem, place.target);
    const int label_class = label.class_or_none();

    Online online;
    for (int first = threadIdx.x; first < windows; first += kBatch * threads) {
      A values[kBatch][kWide<T>];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int c = (first + k * threads) * kWide<T> - before;
        load_window(logits, c, problem.classes, true, -kInfinity<A>, values[k]);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int window = first + k * threads;
        const int c = window * kWide<T> - before;
        if (window >= windows) break;
        A y[kWide<T>] = {};
        bool inside[kWide<T>] = {};
        if constexpr (kDense) {
          targets_of_window(problem, begin, c, problem.classes, label_class, y);
#pragma unroll
          for (int i = 0; i < kWide<T>; ++i) inside[i] = c + i >= 0 && c + i < problem.classes;
        }
        if (problem.stage) {
          Pack<T, kWide<T>> pack;
#pragma unroll
          for (int i = 0; i < kWide<T>; ++i) pack.values[i] = narrow<T>(values[k][i]);
          pack.store(stage + window * kWide<T>);
        }
        add_online<T>(online, values[k], y, inside, one_hot);
      }
    }
    merge_lanes<T>(online);
    if (lane == 0) by_warp[warp] = online;
    __syncthreads();
    if (lane < warps) online = by_warp[lane];
    if (lane >= warps) online = Online();
    merge_lanes<T>(online);
    A label_logit = 0;
    if (!kDense && label_class >= 0) {
      label_logit = problem.stage ? widen(stage[label_class + before]) : widen(logits[label_class]);
    }
    const auto site =
        finish_site(problem, scales, label, place.output, online.sums, online.maximum, label_logit);
    if (threadIdx.x == 0) {
      totals.add(site);
      write_site(problem, scales, place.target, site);
    }
    if (problem.wants_gradient()) {
      for (int window = threadIdx.x; window < windows; window += threads) {
        const int c = window * kWide<T> - before;
        A values[kWide<T>], y[kWide<T>] = {}, gradient[kWide<T>], head_gradient[kWide<T>];
        if (problem.stage) {
          load_staged(stage, window, values);
        } else {
          load_window(logits, c, problem.classes, true, -kInfinity<A>, values);
        }
        if constexpr (kDense) {
          targets_of_window(problem, begin, c, problem.classes, label_class, y);
        }
#pragma unroll
        for (int i = 0; i < kWide<T>; ++i) {
          const A distance = clamp_distance(values[i] - online.maximum);
          const A power = exp_distance<T>(distance);
          gradient[i] = site.gradient(c + i, distance, power, y[i]);
          head_gradient[i] = site.head_gradient(c + i, distance, power, y[i]);
        }
        if (problem.gradient != nullptr) {
          store_window(problem.gradient + begin, c, problem.classes, problem.wide_gradient,
                       gradient);
        }
        if (problem.head_gradient != nullptr) {
          store_window(problem.head_gradient + begin, c, problem.classes,
                       problem.wide_head_gradient, head_gradient);
        }
      }
    }
    __syncthreads();  // the next row overwrites by_warp and the stage
  }
  write_partials(problem.partials, reinterpret_cast<A*>(shared), 1, 0, threadIdx.x == 0,
                 std::int64_t(blockIdx.x), problem.heads, problem.heads, 0, totals);
}

// Sites of a lane: as many as fill 4 bytes, so that a warp's request is a 128-byte line.
template <typename T>
constexpr int kLaneSites = sizeof(T) < 4 ? 4 / static_cast<int>(sizeof(T)) : 1;

template <typename T, bool kDense>
__global__ void __launch_bounds__(256, 2) sites_large(Problem<T> problem) {
  using A = Accumulation<T>;
  using Online = OnlineSums<A, kDense>;
  constexpr int kSites = kLaneSites<T>;
  constexpr int kBatch = 4;
  LNL_SHARED(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  Online* by_warp = reinterpret_cast<Online*>(shared);  // [warps, kSites, 32]
  T* stage = reinterpret_cast<T*>(shared + warps * kSites * kWarp * sizeof(Online));
  const int head = blockIdx.y;
  const auto scales = head_scales(problem, head);
  const bool one_hot = problem.labels != nullptr && problem.floor == A(0);
  const std::int64_t stride = problem.positions;
  Totals<A> totals;
  for (std::int64_t first = std::int64_t(blockIdx.x) * kWarp * kSites; first < problem.sites;
       first += std::int64_t(gridDim.x) * kWarp * kSites) {
    std::int64_t begin[kSites], target[kSites];
    bool here[kSites];
    Label label[kSites];
    Online online[kSites];
#pragma unroll
    for (int v = 0; v < kSites; ++v) {
      const std::int64_t site = first + lane * kSites + v;
      here[v] = site < problem.sites;
      const std::int64_t sample = here[v] ? problem.by_positions.divide(site) : 0;
      const std::int64_t position = here[v] ? site - sample * stride : 0;
      const std::int64_t row = sample * problem.heads + head;
      target[v] = row * stride + position;
      begin[v] = row * problem.classes * stride + position;
      if (here[v]) label[v] = read_label(problem, target[v]);
    }
    // Vectors are whole and aligned where wide_logits says that positions come in vectors.
    const bool vector = problem.wide_logits && here[kSites - 1];
    for (int c = warp; c < problem.classes; c += kBatch * warps) {
      A logits[kBatch][kSites];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int own = c + k * warps;
#pragma unroll
        for (int v = 0; v < kSites; ++v) logits[k][v] = -kInfinity<A>;
        if (own >= problem.classes) continue;
        if (vector) {
          const auto pack = Pack<T, kSites>::load(problem.logits + begin[0] + own * stride);
#pragma unroll
          for (int v = 0; v < kSites; ++v) logits[k][v] = widen(pack.values[v]);
        } else {
#pragma unroll
          for (int v = 0; v < kSites; ++v) {
            if (here[v]) logits[k][v] = widen(problem.logits[begin[v] + own * stride]);
          }
        }
        if (problem.stage) {
          Pack<T, kSites> pack;
#pragma unroll
          for (int v = 0; v < kSites; ++v) pack.values[v] = narrow<T>(logits[k][v]);
          pack.store(stage + (own * kWarp + lane) * kSites);
        }
      }
#pragma unroll
      for (int v = 0; v < kSites; ++v) {
        A column[kBatch], y[kBatch] = {};
        bool inside[kBatch] = {};
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int own = c + k * warps;
          column[k] = logits[k][v];
          if constexpr (kDense) {
            inside[k] = here[v] && own < problem.classes;
            if (inside[k]) {
              const A q = problem.labels == nullptr ? problem.probability(begin[v] + own * stride)
                                                    : A(own == label[v].class_or_none());
              y[k] = target_of_class(problem, own, q);
            }
          }
        }
        add_online<T>(online[v], column, y, inside, one_hot);
      }
    }
#pragma unroll
    for (int v = 0; v < kSites; ++v) by_warp[(warp * kSites + v) * kWarp + lane] = online[v];
    __syncthreads();
    Site<A, kDense> site[kSites];
    A maximum[kSites];
#pragma unroll
    for (int v = 0; v < kSites; ++v) {
      maximum[v] = -kInfinity<A>;
      for (int w = 0; w < warps; ++w) {
        maximum[v] = larger(maximum[v], by_warp[(w * kSites + v) * kWarp + lane].maximum);
      }
      SiteSums<A, kDense> sums;
      for (int w = 0; w < warps; ++w) {
        Online part = by_warp[(w * kSites + v) * kWarp + lane];
        rescale<T>(part.sums, part.maximum, maximum[v]);
        merge(sums, part.sums);
      }
      if (!here[v]) continue;
      A label_logit = 0;
      const int label_class = label[v].class_or_none();
      if (!kDense && label_class >= 0) {
        label_logit = problem.stage ? widen(stage[(label_class * kWarp + lane) * kSites + v])
                                    : widen(problem.logits[begin[v] + label_class * stride]);
      }
      site[v] = finish_site(problem, scales, label[v], first + lane * kSites + v, sums, maximum[v],
                            label_logit);
      if (warp == 0) {
        totals.add(site[v]);
        write_site(problem, scales, target[v], site[v]);
      }
    }
    if (problem.wants_gradient()) {
      for (int c = warp; c < problem.classes; c += warps) {
        Pack<T, kSites> gradient, head_gradient, logits;
        if (problem.stage) {
          logits = Pack<T, kSites>::load(stage + (c * kWarp + lane) * kSites);
        } else if (vector) {
          logits = Pack<T, kSites>::load(problem.logits + begin[0] + c * stride);
        } else {
#pragma unroll
          for (int v = 0; v < kSites; ++v) {
            if (here[v]) logits.values[v] = problem.logits[begin[v] + c * stride];
          }
        }
#pragma unroll
        for (int v = 0; v < kSites; ++v) {
          if (!here[v]) continue;
          A y = 0;
          if constexpr (kDense) {
            const A q = problem.labels == nullptr ? problem.probability(begin[v] + c * stride)
                                                  : A(c == label[v].class_or_none());
            y = target_of_class(problem, c, q);
          }
          const A distance = clamp_distance(widen(logits.values[v]) - maximum[v]);
          const A power = exp_distance<T>(distance);
          gradient.values[v] = narrow<T>(site[v].gradient(c, distance, power, y));
          head_gradient.values[v] = narrow<T>(site[v].head_gradient(c, distance, power, y));
        }
        if (vector && problem.wide_gradient) {
          if (problem.gradient != nullptr) {
            gradient.store_global(problem.gradient + begin[0] + c * stride);
          }
          if (problem.head_gradient != nullptr) {
            head_gradient.store_global(problem.head_gradient + begin[0] + c * stride);
          }
        } else {
#pragma unroll
          for (int v = 0; v < kSites; ++v) {
            if (!here[v]) continue;
            const std::int64_t element = begin[v] + c * stride;
            if (problem.gradient != nullptr) problem.gradient[element] = gradient.values[v];
            if (problem.head_gradient != nullptr) {
              problem.head_gradient[element] = head_gradient.values[v];
            }
          }
        }
      }
    }
    __syncthreads();  // the next tile overwrites by_warp and the stage
  }
  write_partials(problem.partials, reinterpret_cast<A*>(shared), blockDim.x, threadIdx.x, true,
                 std::int64_t(0), 1, problem.heads, head, totals);
}

}  // namespace lnl::cuda
