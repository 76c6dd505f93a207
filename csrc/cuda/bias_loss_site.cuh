// The mathematics of one site: the sums over its classes, and what follows from them.
//
// With m the maximum, d_c = z_c - m and the sums t of e^{d_c} and u of e^{d_c} d_c taken without
// one maximum, s = 1 + t:
//   CE = log1p(t) - d_b     H = log1p(t) - u / s     dH/dz_c = -p_c (d_c - u / s)
// Nothing near 1 is ever subtracted from 1, so that certain sites keep their relative accuracy. The
// maximum is left out by counting the classes that reach it, all but one of which belong to t.
#pragma once

#include "bias_loss_problem.cuh"

namespace lnl::cuda {

// kDense: every class has a target (probabilities or smoothing) or the confusion term is wanted;
// otherwise only the label's class has one.
template <typename A, bool kDense>
struct SiteSums {
  A t = 0;     // sum of e^d over the classes below the maximum
  A u = 0;     // sum of e^d d
  A ties = 0;  // classes at the maximum
};
template <typename A>
struct SiteSums<A, true> {
  A t = 0;
  A u = 0;
  A ties = 0;
  A y_below = 0;   // sum of y over the classes below the maximum
  A y_ties = 0;    // sum of y over the classes at the maximum
  A yd = 0;        // sum of y d
  A distance = 0;  // sum of d
  A count = 0;     // classes seen
};

// Adds a class; returns its clamped distance and its e^d.
template <typename T, bool kDense>
__device__ inline void add_class(SiteSums<Accumulation<T>, kDense>& sums, Accumulation<T> logit,
                                 Accumulation<T> maximum, Accumulation<T> y, bool one_hot,
                                 Accumulation<T>& distance, Accumulation<T>& power) {
  using A = Accumulation<T>;
  const A exact = logit - maximum;
  distance = clamp_distance(exact);
  power = exp_distance<T>(distance);
  const bool tied = exact == A(0);
  sums.t += tied ? A(0) : power;
  sums.ties += tied ? A(1) : A(0);
  sums.u += power * distance;
  if constexpr (kDense) {
    sums.y_below += tied ? A(0) : y;
    sums.y_ties += tied ? y : A(0);
    // Without smoothing a class that is not the label adds nothing, even where its logit is -inf.
    sums.yd += one_hot && y == A(0) ? A(0) : y * exact;
    sums.distance += exact;
    sums.count += A(1);
  }
}

// Moves sums taken against `from` to the larger maximum `to`.
template <typename T, bool kDense>
__device__ inline void rescale(SiteSums<Accumulation<T>, kDense>& sums, Accumulation<T> from,
                               Accumulation<T> to) {
  using A = Accumulation<T>;
  if (!(sums.ties > A(0)) || !(from < to)) return;  // no finite class yet, or nothing to move
  const A shift = from - to;
  const A distance = clamp_distance(shift);
  const A factor = exp_distance<T>(distance);
  const A mass = sums.t + sums.ties;
  sums.u = (sums.u + mass * distance) * factor;
  sums.t = mass * factor;
  sums.ties = A(0);
  if constexpr (kDense) {
    sums.y_below += sums.y_ties;
    sums.y_ties = A(0);
    sums.yd += sums.y_below * shift;
    sums.distance += sums.count * shift;
  }
}

template <typename A, bool kDense>
__device__ inline void merge(SiteSums<A, kDense>& into, const SiteSums<A, kDense>& from) {
  into.t += from.t;
  into.u += from.u;
  into.ties += from.ties;
  if constexpr (kDense) {
    into.y_below += from.y_below;
    into.y_ties += from.y_ties;
    into.yd += from.yd;
    into.distance += from.distance;
    into.count += from.count;
  }
}

// Values of a site, and its gradients as functions of a class's e^d and d.
template <typename A, bool kDense>
struct Site {
  A cross_entropy = 0;
  A entropy = 0;
  A confusion = 0;

  // Distances and powers are finite here: logits that are NaN make the factors NaN, but of a site
  // to which no term gives a gradient, whose factors are 0.
  A multiplier = 0;  // gradient = e^d * (multiplier + slope * d) ...
  A slope = 0;
  A head_multiplier = 0;  // head gradient = e^d * head_multiplier ...
  int label = -1;
  A at_label = 0;  // ... but these for the label's class (not kDense) ...
  A head_at_label = 0;
  A target_factor = 0;  // ... or less y times these (kDense) ...
  A head_target_factor = 0;
  A offset = 0;          // ... and less this (kDense) ...
  bool certain = false;  // ... and, where one class alone is the maximum, these for it (kDense)
  A at_maximum = 0;
  A head_at_maximum = 0;

  // Without labels of their own: kDense, or a class that is not the label's.
  __device__ A gradient(A distance, A power, A y) const {
    const A value = power * (multiplier + slope * distance);
    if constexpr (kDense) {
      return certain && distance == A(0) ? at_maximum : value - target_factor * y - offset;
    } else {
      return value;
    }
  }
  __device__ A head_gradient(A distance, A power, A y) const {
    const A value = power * head_multiplier;
    if constexpr (kDense) {
      return certain && distance == A(0) ? head_at_maximum : value - head_target_factor * y;
    } else {
      return value;
    }
  }
  __device__ A gradient(int c, A distance, A power, A y) const {
    return !kDense && c == label ? at_label : gradient(distance, power, y);
  }
  __device__ A head_gradient(int c, A distance, A power, A y) const {
    return !kDense && c == label ? head_at_label : head_gradient(distance, power, y);
  }
};

// The gradient for classes c .. c + kCount - 1: one look for all of them whether the label is
// there.
template <int kCount, typename A, bool kDense>
__device__ inline void gradient_of_classes(const Site<A, kDense>& site, int c,
                                           const A (&distances)[kCount], const A (&powers)[kCount],
                                           const A (&y)[kCount], A (&gradient)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) gradient[i] = site.gradient(distances[i], powers[i], y[i]);
  const int at = site.label - c;
  if (!kDense && at >= 0 && at < kCount) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) gradient[i] = i == at ? site.at_label : gradient[i];
  }
}
template <int kCount, typename A, bool kDense>
__device__ inline void head_gradient_of_classes(const Site<A, kDense>& site, int c,
                                                const A (&distances)[kCount],
                                                const A (&powers)[kCount], const A (&y)[kCount],
                                                A (&gradient)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) gradient[i] = site.head_gradient(distances[i], powers[i], y[i]);
  const int at = site.label - c;
  if (!kDense && at >= 0 && at < kCount) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) gradient[i] = i == at ? site.head_at_label : gradient[i];
  }
}

// `label_logit` is the logit of the label's class; it is not read where there is none.
template <typename T, bool kDense>
__device__ Site<Accumulation<T>, kDense> finish_site(const Problem<T>& problem,
                                                     const HeadScales<Accumulation<T>>& scales,
                                                     const Label& label, std::int64_t output,
                                                     const SiteSums<Accumulation<T>, kDense>& sums,
                                                     Accumulation<T> maximum,
                                                     Accumulation<T> label_logit) {
  using A = Accumulation<T>;
  Site<A, kDense> site;
  // 0, but NaN for a row of only -inf and for one with +inf.
  const A poison = maximum - maximum;
  const A t = sums.t + (sums.ties - A(1)) + poison;
  const A s = A(1) + t;
  const A inverse = reciprocal(s);
  const A log_sum = log1p_of(t);
  const A mean_distance = sums.u * inverse;

  A upstream = scales.upstream;
  if (problem.upstream_per_site) upstream = problem.upstream[output];
  const bool entropy_counted = label.counted() || !problem.mask_entropy;
  const A cross_entropy_scale = label.counted() ? scales.cross_entropy * upstream : A(0);
  const A entropy_scale = entropy_counted ? scales.entropy * upstream : A(0);
  const A slope = entropy_scale * scales.entropy_weight;
  site.entropy = entropy_counted ? log_sum - mean_distance : A(0);
  site.slope = slope * inverse;

  if constexpr (kDense) {
    // A label outside of [0, C) is no class: the site becomes NaN, and only the site.
    const A y_below = label.in_range() ? sums.y_below : kNaN<A>;
    const A weight = y_below + sums.y_ties;
    const A others = y_below - t * inverse * weight;  // dCE of a class that alone is the maximum
    const A confusion_scale = entropy_scale * scales.confusion_weight;
    const A direct = scales.direction * cross_entropy_scale;
    site.cross_entropy = label.counted() ? weight * log_sum - sums.yd : A(0);
    site.confusion = entropy_counted ? log_sum - sums.distance / A(problem.classes) : A(0);
    const A rest = confusion_scale - slope * mean_distance;
    site.multiplier = (direct * weight + rest) * inverse;
    site.head_multiplier = cross_entropy_scale * weight * inverse;
    site.target_factor = direct;
    site.head_target_factor = cross_entropy_scale;
    site.offset = confusion_scale / A(problem.classes);
    // Where the maximum has less than half of the probability, p is the accurate one, not 1 - p.
    site.certain = sums.ties == A(1) && inverse > A(0.5);
    site.at_maximum = direct * others + rest * inverse - site.offset;
    site.head_at_maximum = cross_entropy_scale * others;
  } else {
    A weight = label.in_range() ? A(1) : kNaN<A>;
    A exact = 0;
    if (label.is_class()) {
      if (problem.weight != nullptr) weight = problem.weight[label.value];
      exact = label_logit - maximum;
      site.label = label.value;
    }
    const A distance = clamp_distance(exact);
    const A power = exp_distance<T>(distance);
    const A others = exact == A(0) ? t : s - power;  // s times the sum of the other classes' p
    const A head = cross_entropy_scale * weight;
    const A direct = scales.direction * head;
    site.cross_entropy = label.counted() ? weight * (log_sum - exact) : A(0);
    site.multiplier = (direct - slope * mean_distance) * inverse;
    site.head_multiplier = head * inverse;
    site.at_label = (power * slope * (distance - mean_distance) - direct * others) * inverse;
    site.head_at_label = -head * others * inverse;
  }
  if (!label.counted()) {
    site.head_multiplier = 0;
    const bool others = scales.entropy_weight != A(0) || scales.confusion_weight != A(0);
    if (!entropy_counted || !others) site.multiplier = site.slope = 0;
  }
  return site;
}

}  // namespace lnl::cuda
