// Few classes: B = U * N sites at once, one site a lane, looping over the classes.
// Formulas: reference.py. Included like simd.h: inside each instruction set's namespace.

// What every site of a call shares.
template <typename T>
struct ClassTerms {
  int64_t classes;
  const T* weight;  // [classes] or null
  T keep;           // 1 - label_smoothing
  T spread;         // label_smoothing / classes
  T spread_sum;     // spread times the sum of the weights
  T sign;           // of dCE in the gradient: +1, or -reversal
  T entropy;        // entropy_weight
  T confusion;      // confusion_weight
  bool has_confusion;
  bool regularised;  // whether entropy or confusion have a gradient
};

// One block of sites. Class strides are in elements.
template <typename T, int B>
struct SiteBlock {
  using Int = typename Float<T>::Int;
  const T* logits;
  int64_t logits_stride;
  const T* probabilities;  // or null
  int64_t probabilities_stride;
  T* exponentials;  // [classes][B], scratch; null without gradients
  T* gradient;      // or null
  int64_t gradient_stride;
  T* head_gradient;  // or null
  int64_t head_gradient_stride;
  const T* next_logits;       // of the next block, with the same stride: fetched early
  alignas(64) Int target[B];  // -1 where ignored
  T weight[B];                // of the target's class, 0 where ignored
  T counted[B];               // 1: the site's CE counts
  T entropy_counted[B];
  T scale[B];  // of dCE: upstream / denominator, 0 where not counted
  T entropy_scale[B];
  // results
  T cross_entropy[B];
  T entropy[B];
  T confusion[B];
};

constexpr int64_t kClassChunk =
    64;  // partial sums of this many classes: rounding grows with the chunk, not with C

// y_c, the weighted and smoothed target of class c in lanes u * N ...
template <typename T, int N, int B>
LNL_INLINE Vec<T, N> dense_target(const SiteBlock<T, B>& block, const ClassTerms<T>& terms,
                                  int64_t c, int u) {
  using V = Vec<T, N>;
  V share;
  if (block.probabilities != nullptr) {
    share = V::load(block.probabilities + c * block.probabilities_stride + u * N);
  } else {
    typename V::Bits target;
    memcpy(&target, block.target + u * N, sizeof(target));
    const auto hit = (typename V::Mask)(target == static_cast<typename Float<T>::Int>(c));
    share = select<T, N>(hit, V::fill(T(1)), V::fill(T(0)));
  }
  const V smoothed = share * V::fill(terms.keep) + V::fill(terms.spread);
  return terms.weight != nullptr ? smoothed * V::fill(terms.weight[c]) : smoothed;
}

// Zeros in the gradient of sites to which no term gives one, where NaN logits made it NaN.
template <typename T, int N, int U>
void clear_sites(const typename Vec<T, N>::Mask (&mask)[U], int64_t classes, T* gradient,
                 int64_t stride) {
  using V = Vec<T, N>;
  for (int64_t c = 0; c < classes; ++c) {
#pragma GCC unroll 64
    for (int u = 0; u < U; ++u) {
      T* const at = gradient + c * stride + u * N;
      select<T, N>(mask[u], V::fill(T(0)), V::load(at)).store(at);
    }
  }
}

template <typename T, int N, int U, bool Dense, int Gradients>
void site_block(SiteBlock<T, N * U>& block, const ClassTerms<T>& terms) {
  using V = Vec<T, N>;
  using Int = typename Float<T>::Int;
  constexpr int B = N * U;
  const V zero = V::fill(T(0));
  const V one = V::fill(T(1));
  // Copies, because what is stored below might otherwise have changed them.
  const T* const logits = block.logits;
  T* const exponentials = block.exponentials;
  T* const gradient = block.gradient;
  T* const head_gradient = block.head_gradient;
  const int64_t stride = block.logits_stride;
  const int64_t gradient_stride = block.gradient_stride;
  const int64_t head_gradient_stride = block.head_gradient_stride;
  const int64_t classes = terms.classes;
  const bool has_confusion = terms.has_confusion;

  V maximum[U];
  typename V::Bits target[U];
#pragma GCC unroll 64
  for (int u = 0; u < U; ++u) {
    maximum[u] = V::load(logits + u * N);
    memcpy(&target[u], block.target + u * N, sizeof(target[u]));
  }
  prefetch<T, B>(block.next_logits);
  for (int64_t c = 1; c < classes; ++c) {
    prefetch<T, B>(block.next_logits + c * stride);
#pragma GCC unroll 64
    for (int u = 0; u < U; ++u) {
      maximum[u] =
          max_keeping_nan_of_second<T, N>(V::load(logits + c * stride + u * N), maximum[u]);
    }
  }

  V tail_sum[U], entropy_sum[U], logit_sum[U], target_logit[U], target_sum[U];
  Counter<T, N> maxima[U];
#pragma GCC unroll 64
  for (int u = 0; u < U; ++u) {
    tail_sum[u] = entropy_sum[u] = logit_sum[u] = target_logit[u] = target_sum[u] = zero;
  }
  for (int64_t begin = 0; begin < classes; begin += kClassChunk) {
    const int64_t end = begin + kClassChunk < classes ? begin + kClassChunk : classes;
    V part_tail[U], part_entropy[U], part_logit[U], part_target[U], part_target_logit[U];
#pragma GCC unroll 64
    for (int u = 0; u < U; ++u) {
      part_tail[u] = part_entropy[u] = part_logit[u] = zero;
      part_target[u] = part_target_logit[u] = zero;
    }
    for (int64_t c = begin; c < end; ++c) {
#pragma GCC unroll 64
      for (int u = 0; u < U; ++u) {
        const V d = V::load(logits + c * stride + u * N) - maximum[u];
        const V clamped = clamp_exponent<T, N>(d);
        const V e = exp_nonpositive<T, N>(clamped);
        const auto top = d == zero;
        part_tail[u] = part_tail[u] + select<T, N>(top, zero, e);
        maxima[u].add(top);
        part_entropy[u] = part_entropy[u] + e * clamped;
        if constexpr (Gradients > 0) {
          e.store(exponentials + c * B + u * N);
        }
        if constexpr (Dense) {
          const V y = dense_target<T, N>(block, terms, c, u);
          part_target_logit[u] = part_target_logit[u] + y * d;
          part_target[u] = part_target[u] + y;
        } else {
          const auto hit = (typename V::Mask)(target[u] == static_cast<Int>(c));
          target_logit[u] = select<T, N>(hit, d, target_logit[u]);
        }
        if (has_confusion) {
          part_logit[u] = part_logit[u] + d;
        }
      }
    }
#pragma GCC unroll 64
    for (int u = 0; u < U; ++u) {
      tail_sum[u] = tail_sum[u] + part_tail[u];
      entropy_sum[u] = entropy_sum[u] + part_entropy[u];
      logit_sum[u] = logit_sum[u] + part_logit[u];
      if constexpr (Dense) {
        target_sum[u] = target_sum[u] + part_target[u];
        target_logit[u] = target_logit[u] + part_target_logit[u];
      }
    }
  }

  const V classes_reciprocal = V::fill(T(1) / static_cast<T>(classes));
  V inverse[U], ratio[U], slope[U], level[U], constant[U], ce_scale[U], head_scale[U], hit_value[U],
      head_hit_value[U], one_minus_top[U];
#pragma GCC unroll 64
  for (int u = 0; u < U; ++u) {
    const V counted = V::load(block.counted + u * N);
    const V entropy_counted = V::load(block.entropy_counted + u * N);
    const V weight = V::load(block.weight + u * N);
    if (Dense && block.probabilities == nullptr) {  // known without the rounding of a long sum
      target_sum[u] = weight * V::fill(terms.keep) + V::fill(terms.spread_sum);
    }
    tail_sum[u] = tail_sum[u] + (maxima[u].value() - one);  // one maximum is left out of the sum
    inverse[u] = one / (one + tail_sum[u]);
    const V log_sum = log1p_nonnegative<T, N>(tail_sum[u], inverse[u]);
    ratio[u] = entropy_sum[u] * inverse[u];
    V ce = Dense ? log_sum * target_sum[u] - target_logit[u] : weight * (log_sum - target_logit[u]);
    ce = select<T, N>(counted == zero, zero, ce);
    ce.store(block.cross_entropy + u * N);
    const auto skipped = entropy_counted == zero;
    select<T, N>(skipped, zero, log_sum - ratio[u]).store(block.entropy + u * N);
    const V confusion = log_sum - logit_sum[u] * classes_reciprocal;
    select<T, N>(skipped, zero, confusion).store(block.confusion + u * N);

    if constexpr (Gradients > 0) {
      const V entropy_scale = V::load(block.entropy_scale + u * N);
      const V confusion_scale = entropy_scale * V::fill(terms.confusion);
      slope[u] = entropy_scale * V::fill(terms.entropy);
      constant[u] = zero - confusion_scale * classes_reciprocal;
      head_scale[u] = V::load(block.scale + u * N);
      ce_scale[u] = head_scale[u] * V::fill(terms.sign);
      const V rest = confusion_scale - slope[u] * ratio[u];
      one_minus_top[u] = tail_sum[u] * inverse[u];
      if constexpr (Dense) {
        level[u] = rest;
      } else {
        ce_scale[u] = ce_scale[u] * weight;
        head_scale[u] = head_scale[u] * weight;
        level[u] = ce_scale[u] + rest;
        const V d = clamp_exponent<T, N>(target_logit[u]);
        const V p = exp_nonpositive<T, N>(d) * inverse[u];
        const V others = select<T, N>(d == zero, one_minus_top[u], one - p);
        hit_value[u] = p * (slope[u] * d + rest) + constant[u] - ce_scale[u] * others;
        head_hit_value[u] = zero - head_scale[u] * others;
      }
    }
  }

  if constexpr (Gradients > 0) {
    if constexpr (!Dense) {  // e instead of p below: the division goes into the coefficients
#pragma GCC unroll 64
      for (int u = 0; u < U; ++u) {
        slope[u] = slope[u] * inverse[u];
        level[u] = level[u] * inverse[u];
        head_scale[u] = head_scale[u] * inverse[u];
      }
    }
    for (int64_t c = 0; c < classes; ++c) {
#pragma GCC unroll 64
      for (int u = 0; u < U; ++u) {
        const V d = clamp_exponent<T, N>(V::load(logits + c * stride + u * N) - maximum[u]);
        const V e = V::load(exponentials + c * B + u * N);
        V g, head;
        if constexpr (Dense) {
          const V p = e * inverse[u];
          const V y = dense_target<T, N>(block, terms, c, u);
          const V others = select<T, N>(d == zero, one_minus_top[u], one - p);
          const V ce = p * (target_sum[u] - y) - y * others;
          g = p * (slope[u] * d + level[u]) + constant[u] + ce_scale[u] * ce;
          head = head_scale[u] * ce;
        } else {
          const auto hit = (typename V::Mask)(target[u] == static_cast<Int>(c));
          g = e * (slope[u] * d + level[u]) + constant[u];
          g = select<T, N>(hit, hit_value[u], g);
          head = select<T, N>(hit, head_hit_value[u], head_scale[u] * e);
        }
        g.store(gradient + c * gradient_stride + u * N);
        if constexpr (Gradients > 1) {
          head.store(head_gradient + c * head_gradient_stride + u * N);
        }
      }
    }
    bool some_nan = false;
#pragma GCC unroll 64
    for (int u = 0; u < U; ++u) {
      some_nan |= any_lane<T, N>(inverse[u].v != inverse[u].v);
    }
    if (some_nan) {
      typename V::Mask silent[U], head_silent[U];
      for (int u = 0; u < U; ++u) {
        const V is_nan = select<T, N>(inverse[u] == inverse[u], zero, one);
        const V counted = V::load(block.counted + u * N);
        const V others = terms.regularised ? V::load(block.entropy_counted + u * N) : zero;
        silent[u] = select<T, N>(counted + others == zero, is_nan, zero) == one;
        head_silent[u] = select<T, N>(counted == zero, is_nan, zero) == one;
      }
      clear_sites<T, N, U>(silent, classes, gradient, gradient_stride);
      if constexpr (Gradients > 1) {
        clear_sites<T, N, U>(head_silent, classes, head_gradient, head_gradient_stride);
      }
    }
  }
}
