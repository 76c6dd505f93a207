// Many classes: a first pass adds them up online, each thread against its own running maximum; the
// threads' sums are merged; a second pass makes the gradient.
//
// rows_large: a block per row, whose logits come into shared memory by asynchronous copies.
// sites_large: a block per 128 bytes of adjacent sites, of which a
// lane has as many as one access holds; the classes are shared out among the groups of lanes.
//
// With Problem::stage the first pass keeps the logits in shared memory and they are read from
// global memory once. The launcher sets it wherever they fit into what a block may have: rows (or,
// for sites_large, classes times 128 bytes) of up to 227 KiB less the scratch on sm_90 and sm_100,
// 163 on sm_80, 99 on sm_86, sm_89 and sm_120, 64 on sm_75. Beyond that they are read twice, the
// second time mostly from L2; so are probabilities always.
#pragma once

#include "bias_loss_row_stream.cuh"
#include "bias_loss_sites.cuh"

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

// The merged sums of the lanes of a warp that lie multiples of `apart` from each other; every lane
// gets them.
template <typename T, bool kDense>
__device__ inline void merge_lanes(OnlineSums<Accumulation<T>, kDense>& online, int apart = 1) {
  const auto maximum = largest_of_lanes(online.maximum, kWarp, apart);
  rescale<T>(online.sums, online.maximum, maximum);
  online.maximum = maximum;
  sum_sites_of_lanes(online.sums, kWarp, apart);
}

constexpr int kLargeThreads = 512;

// Blocks of rows_large on a multiprocessor that leave its threads registers enough not to spill.
template <typename T, bool kDense>
constexpr int kRowsLargeBlocks = sizeof(T) < 8 && !kDense ? 2 : 1;

// Shared memory of rows_large before the stage: the warps' sums, the label's logit, and the
// barriers of each warp's copies.
template <typename T, bool kDense>
constexpr std::size_t kRowsLargeSums =
    kLargeThreads / kWarp * sizeof(OnlineSums<Accumulation<T>, kDense>) + 16;
template <typename T, bool kDense>
constexpr std::size_t kRowsLargeScratch =
    kRowsLargeSums<T, kDense> + kLargeThreads / kWarp * kSlots * sizeof(BulkBarrier);

template <typename T, bool kDense>
__global__ void __launch_bounds__(kLargeThreads, kRowsLargeBlocks<T, kDense>)
    rows_large(Problem<T> problem) {
  using A = Accumulation<T>;
  using Online = OnlineSums<A, kDense>;
  LNL_SHARED(shared);
  Online* by_warp = reinterpret_cast<Online*>(shared);
  A* logit_of_label = reinterpret_cast<A*>(by_warp + kLargeThreads / kWarp);
  auto* barriers = reinterpret_cast<BulkBarrier*>(shared + kRowsLargeSums<T, kDense>);
  T* stage = reinterpret_cast<T*>(shared + kRowsLargeScratch<T, kDense>);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const std::int64_t rows = problem.sites * problem.heads;
  const int head = static_cast<int>(blockIdx.x % problem.heads);
  const A* denominators;
  if (!begin_turn(problem, shared, head, 1, denominators)) return;
  const auto scales = head_scales(problem, denominators, head);
  const bool one_hot = problem.labels != nullptr && problem.floor == A(0);
  const bool wants_gradient = problem.wants_gradient();
  // Whether the first pass leaves the row where it is, for the second one.
  const bool stays = wants_gradient && problem.stage;
  RowStream<T> stream(problem, stage, barriers);
#pragma unroll 1
  for (int i = 0; i < problem.slots; ++i) stream.copy(i);
  constexpr int kApart = kWarp * kWide<T>;  // a lane's windows in the stage
  int slot = 0;
  Totals<A> totals;
  LabelCounts<A> counts;
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const std::int64_t begin = row * problem.classes;
    const int before = elements_before(problem.logits + begin);
    const SitePlace place = place_of_row(problem, row);
    const Label label = read_label(problem, place.target);
    const int label_class = label.value;
    const bool wants_logit = !kDense && label_class >= 0;
    const int label_window = wants_logit ? (label_class + before) / kWide<T> : -1;

    Online online;
#pragma unroll 1
    for (int group = 0; group < problem.groups; ++group) {
      stream.wait(slot, stays ? problem.slots - 1 - group : problem.slots - 1);
      const auto piece = stream.piece(group, before);
      int window = piece.begin + lane;
      const T* staged = stream.place(slot, group, window);
#pragma unroll 1
      for (; window < piece.end; window += kWarp, staged += kApart) {
        const int c = window * kWide<T> - before;
        A values[kWide<T>], y[kWide<T>] = {};
        bool inside[kWide<T>] = {};
        load_staged(staged, values);
        if constexpr (kDense) {
          targets_of_window(problem, begin, c, problem.classes, label_class, y);
#pragma unroll
          for (int k = 0; k < kWide<T>; ++k) inside[k] = c + k >= 0 && c + k < problem.classes;
        }
        if (window == label_window) *logit_of_label = widen(staged[label_class - c]);
        add_online<T>(online, values, y, inside, one_hot);
      }
      if (!stays) stream.copy(slot);
      slot = stream.next_slot(slot);
    }
    merge_lanes<T>(online);
    if (lane == 0) by_warp[warp] = online;
    __syncthreads();  // beyond it other threads write the row's gradient, maybe over its logits
    if (lane < warps) online = by_warp[lane];
    if (lane >= warps) online = Online();
    merge_lanes<T>(online);
    const A label_logit = wants_logit ? *logit_of_label : A(0);
    const auto site =
        finish_site(problem, scales, label, place.output, online.sums, online.maximum, label_logit);
    if (threadIdx.x == 0) {
      totals.add(site);
      counts.add(problem, label);
      write_site(problem, scales, place.target, site);
    }
    if (stays) slot = (slot == 0 ? problem.slots : slot) - problem.groups;  // the row's first
#pragma unroll 1
    for (int group = 0; wants_gradient && group < problem.groups; ++group) {
      if (!stays) stream.wait(slot, problem.slots - 1);
      const auto piece = stream.piece(group, before);
      int window = piece.begin + lane;
      const T* staged = stream.place(slot, group, window);
#pragma unroll 1
      for (; window < piece.end; window += kWarp, staged += kApart) {
        const int c = window * kWide<T> - before;
        A values[kWide<T>], powers[kWide<T>], y[kWide<T>] = {}, gradient[kWide<T>];
        load_staged(staged, values);
        if constexpr (kDense) {
          targets_of_window(problem, begin, c, problem.classes, label_class, y);
        }
#pragma unroll
        for (int k = 0; k < kWide<T>; ++k) {
          values[k] = finite_distance(values[k] - online.maximum);
          powers[k] = exp_distance<T>(values[k]);
        }
        if (problem.gradient != nullptr) {
          gradient_of_classes(site, c, values, powers, y, gradient);
          store_window(problem.gradient + begin, c, problem.classes, problem.wide_gradient,
                       gradient);
        }
        if (problem.head_gradient != nullptr) {
          head_gradient_of_classes(site, c, values, powers, y, gradient);
          store_window(problem.head_gradient + begin, c, problem.classes,
                       problem.wide_head_gradient, gradient);
        }
      }
      stream.copy(slot);
      slot = stream.next_slot(slot);
    }
    __syncthreads();  // the next row overwrites by_warp and the label's logit
  }
  write_partials(problem, reinterpret_cast<A*>(shared), 1, 0, threadIdx.x == 0, head, problem.heads,
                 0, totals, counts);
}

// Sites of a tile: a 128-byte line of each class.
template <typename T>
constexpr int kLine = 128 / static_cast<int>(sizeof(T));

// Shared memory of sites_large before the staged logits [C, kLine]: the warps' sums, then what the
// gradients need of each site, and its label.
template <typename A, bool kDense>
struct SiteFactors {
  A maximum, multiplier, slope, head_multiplier, at_label, head_at_label;

  SiteFactors() = default;
  __device__ SiteFactors(const Site<A, kDense>& site, A maximum_)
      : maximum(maximum_),
        multiplier(site.multiplier),
        slope(site.slope),
        head_multiplier(site.head_multiplier),
        at_label(site.at_label),
        head_at_label(site.head_at_label) {}
  __device__ void unpack(Site<A, kDense>& site) const {
    site.multiplier = multiplier;
    site.slope = slope;
    site.head_multiplier = head_multiplier;
    site.at_label = at_label;
    site.head_at_label = head_at_label;
  }
};
template <typename A>
struct SiteFactors<A, true> {
  A maximum, multiplier, slope, head_multiplier, target_factor, head_target_factor, offset, certain,
      at_maximum, head_at_maximum;

  SiteFactors() = default;
  __device__ SiteFactors(const Site<A, true>& site, A maximum_)
      : maximum(maximum_),
        multiplier(site.multiplier),
        slope(site.slope),
        head_multiplier(site.head_multiplier),
        target_factor(site.target_factor),
        head_target_factor(site.head_target_factor),
        offset(site.offset),
        certain(site.certain ? A(1) : A(0)),
        at_maximum(site.at_maximum),
        head_at_maximum(site.head_at_maximum) {}
  __device__ void unpack(Site<A, true>& site) const {
    site.multiplier = multiplier;
    site.slope = slope;
    site.head_multiplier = head_multiplier;
    site.target_factor = target_factor;
    site.head_target_factor = head_target_factor;
    site.offset = offset;
    site.certain = certain != A(0);
    site.at_maximum = at_maximum;
    site.head_at_maximum = head_at_maximum;
  }
};

template <typename T, bool kDense>
__host__ __device__ constexpr std::size_t large_scratch(int warps) {
  using A = Accumulation<T>;
  return kLine<T> *
         (warps * sizeof(OnlineSums<A, kDense>) + sizeof(SiteFactors<A, kDense>) + sizeof(int));
}

// Sites of a lane of sites_large that cannot be read as vectors: those of 4 bytes, so that a warp's
// requests stay whole lines.
template <typename T>
constexpr int kScalarSites = sizeof(T) < 4 ? 2 : 1;

// Classes that a lane of sites_large asks for at a time without asynchronous copies.
template <bool kDense, bool kVector>
constexpr int kLargeBatch = kDense && kVector ? 2 : 4;

// Blocks of sites_large on a multiprocessor that leave its threads registers enough not to spill.
template <typename T, bool kDense, int kSites>
constexpr int kSitesLargeBlocks = sizeof(T) == 8 || (kDense && kSites == 8) ? 1 : 2;

template <typename T, bool kDense, int kSites, bool kVector>
__global__ void __launch_bounds__(256, kSitesLargeBlocks<T, kDense, kSites>)
    sites_large(Problem<T> problem) {
  using A = Accumulation<T>;
  using Online = OnlineSums<A, kDense>;
  using Factors = SiteFactors<A, kDense>;
  constexpr int kTile = kLine<T>;
  constexpr int kLanes = kTile / kSites;  // that share a class
  constexpr int kCount = sizeof(Factors) / sizeof(A);
  constexpr int kBatch = kLargeBatch<kDense, kVector>;
  LNL_SHARED(shared);
  const int warps = blockDim.x / kWarp, groups = blockDim.x / kLanes;
  const int group = threadIdx.x / kLanes;
  const int column = threadIdx.x % kLanes * kSites;                // of its first site
  Online* by_warp = reinterpret_cast<Online*>(shared);             // [warps, kTile]
  A* factors = reinterpret_cast<A*>(by_warp + warps * kTile);      // [kCount, kTile]
  int* labels = reinterpret_cast<int*>(factors + kCount * kTile);  // [kTile]
  T* const stages = reinterpret_cast<T*>(shared + large_scratch<T, kDense>(warps));
  const int head = blockIdx.y;
  const A* denominators;
  if (!begin_turn(problem, shared, head, 1, denominators)) return;
  const auto scales = head_scales(problem, denominators, head);
  const bool one_hot = problem.labels != nullptr && problem.floor == A(0);
  const std::int64_t stride = problem.positions;
  // Logits that stay on chip come by asynchronous copies, those of the next tile while gradients
  // are made. A thread reads what it has copied itself.
  constexpr bool kCopies = kAsync<T, kVector>;
  const bool copies = kCopies && problem.stage;
  const std::int64_t tiles = std::int64_t(gridDim.x) * kTile;
  const std::int64_t first_tile = std::int64_t(blockIdx.x) * kTile;
  T* stage = stages;
  const auto copy_class = [&](const ThreadSites<T, kSites, kVector, kLanes>& sites, int c, T* to) {
    if constexpr (kCopies) sites.copy(problem.logits, c * stride, to + c * kTile + column);
  };
#pragma unroll 1
  for (int i = 0; copies && i < problem.ahead; ++i) {
    const ThreadSites<T, kSites, kVector, kLanes> sites(problem, first_tile + i * tiles, head);
    for (int c = group; c < problem.classes; c += groups) {
      copy_class(sites, c, stages + i * problem.classes * kTile);
    }
    __pipeline_commit();
  }
  Totals<A> totals;
  LabelCounts<A> counts;
  for (std::int64_t first = first_tile; first < problem.sites; first += tiles) {
    const ThreadSites<T, kSites, kVector, kLanes> sites(problem, first, head);
    Label label[kSites];
    if (kDense) sites.read_labels_of(problem, label);
    Online online[kSites];
    if (copies) __pipeline_wait_prior(problem.ahead - 1);
#pragma unroll 1
    for (int c = group; c < problem.classes; c += kBatch * groups) {
      Pack<T, kSites> logits[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int own = c + k * groups;
#pragma unroll
        for (int v = 0; v < kSites; ++v) logits[k].values[v] = narrow<T>(-kInfinity<A>);
        if (own >= problem.classes) continue;
        if (!copies) {
          sites.load(problem.logits, own * stride, logits[k]);
        } else if (sites.is_here(0)) {
          logits[k] = Pack<T, kSites>::load(stage + own * kTile + column);
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int own = c + k * groups;
        if (!copies && problem.stage && own < problem.classes)
          logits[k].store(stage + own * kTile + column);
      }
      A y[kBatch][kSites] = {};
      bool inside[kBatch] = {};
      if constexpr (kDense) {
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int own = c + k * groups;
          inside[k] = own < problem.classes;
          if (inside[k]) sites.load_targets(problem, own, own * stride, label, y[k]);
        }
      }
#pragma unroll
      for (int v = 0; v < kSites; ++v) {
        A of_site[kBatch], y_of_site[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          of_site[k] = widen(logits[k].values[v]);
          y_of_site[k] = y[k][v];
        }
        add_online<T>(online[v], of_site, y_of_site, inside, one_hot);
      }
    }
#pragma unroll
    for (int v = 0; v < kSites; ++v) {
      merge_lanes<T>(online[v], kLanes);
      if (threadIdx.x % kWarp < kLanes) {
        by_warp[threadIdx.x / kWarp * kTile + column + v] = online[v];
      }
    }
    __syncthreads();
    if (threadIdx.x < kTile) {  // each of these threads finishes the site of its column
      const int own = threadIdx.x;
      const std::int64_t output = first + (kVector ? own : own / kSites + own % kSites * kLanes);
      Factors values{};  // zeros where there is no site
      labels[own] = Label::kNone;
      if (output < problem.sites) {
        const std::int64_t sample = problem.by_positions.divide(output);
        const std::int64_t position = output - sample * stride;
        const std::int64_t row = sample * problem.heads + head;
        const Label own_label = read_label(problem, row * stride + position);
        A maximum = -kInfinity<A>;
#pragma unroll 1
        for (int w = 0; w < warps; ++w) maximum = larger(maximum, by_warp[w * kTile + own].maximum);
        SiteSums<A, kDense> sums;
#pragma unroll 1
        for (int w = 0; w < warps; ++w) {
          Online part = by_warp[w * kTile + own];
          rescale<T>(part.sums, part.maximum, maximum);
          merge(sums, part.sums);
        }
        A label_logit = 0;
        if (!kDense && own_label.is_class()) {
          label_logit =
              problem.stage
                  ? widen(stage[own_label.value * kTile + own])
                  : widen(problem.logits[(row * problem.classes + own_label.value) * stride +
                                         position]);
        }
        const auto site =
            finish_site(problem, scales, own_label, output, sums, maximum, label_logit);
        totals.add(site);
        counts.add(problem, own_label);
        write_site(problem, scales, row * stride + position, site);
        values = Factors(site, maximum);
        labels[own] = own_label.value;
      }
      A numbers[kCount];
      memcpy(numbers, &values, sizeof(Factors));
#pragma unroll
      for (int i = 0; i < kCount; ++i) factors[i * kTile + own] = numbers[i];
    }
    __syncthreads();
    if (!sites.is_here(0)) continue;  // nor will it be
    const ThreadSites<T, kSites, kVector, kLanes> next(problem, first + problem.ahead * tiles,
                                                       head);
    T* const here = stage;  // where the next tile goes
    stage += problem.classes * kTile;
    if (stage == stages + problem.ahead * problem.classes * kTile) stage = stages;
    if (!problem.wants_gradient()) {
      for (int c = group; copies && c < problem.classes; c += groups) copy_class(next, c, here);
      __pipeline_commit();
      continue;
    }
    Site<A, kDense> site[kSites];
    A maximum[kSites];
    {
      A numbers[kCount][kSites];
#pragma unroll
      for (int i = 0; i < kCount; ++i) load_column(factors + i * kTile + column, numbers[i]);
#pragma unroll
      for (int v = 0; v < kSites; ++v) {
        A own[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) own[i] = numbers[i][v];
        Factors values;
        memcpy(&values, own, sizeof(Factors));
        values.unpack(site[v]);
        maximum[v] = values.maximum;
        site[v].label = labels[column + v];
      }
    }
#pragma unroll 1
    for (int c = group; c < problem.classes; c += groups) {
      Pack<T, kSites> logits;
      if (problem.stage) {
        logits = Pack<T, kSites>::load(here + c * kTile + column);
        copy_class(next, c, here);
      } else {
        sites.load(problem.logits, c * stride, logits);
      }
      A distance[kSites], power[kSites], y[kSites] = {}, gradient[kSites];
      if constexpr (kDense) sites.load_targets(problem, c, c * stride, label, y);
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
        sites.store(problem.gradient, c * stride, gradient);
      }
      if (problem.head_gradient != nullptr) {
#pragma unroll
        for (int v = 0; v < kSites; ++v) {
          gradient[v] = site[v].head_gradient(c, distance[v], power[v], y[v]);
        }
        sites.store(problem.head_gradient, c * stride, gradient);
      }
    }
    __pipeline_commit();
  }
  write_partials(problem, reinterpret_cast<A*>(shared), kTile, threadIdx.x, threadIdx.x < kTile, 0,
                 1, head, totals, counts);
}

}  // namespace lnl::cuda
