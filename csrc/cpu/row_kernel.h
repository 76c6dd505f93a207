// Many classes: one site at a time, N classes at once. Three passes over a row that stays in cache:
// the maximum, the sums, the gradient. Formulas: reference.py. Included like simd.h: inside each
// instruction set's namespace.

template <typename T>
struct Row {
  const T* logits;         // [classes]
  const T* next_logits;    // of the next row, fetched early
  const T* probabilities;  // [classes] or null
  T* gradient;             // [classes] or null
  T* head_gradient;        // [classes] or null
  int64_t target;          // -1 where ignored or where probabilities are given
  T counted;               // 0: the site is ignored
  T entropy_counted;       // likewise for the entropy and the confusion term
  T scale;                 // of dCE: upstream / denominator, 0 where not counted
  T entropy_scale;
};

struct RowResult {
  double cross_entropy;
  double entropy;
  double confusion;
};

template <typename T>
struct RowSums {
  T maximum;
  double tail = 0;          // sum of e^d without the maxima
  double maxima = 0;        // how many there are
  double entropy = 0;       // sum of e^d d
  double logit = 0;         // sum of d
  double target = 0;        // sum of y
  double target_logit = 0;  // sum of y d
};

constexpr int64_t kRowChunk = 512;  // summed in T, then added in double

// y_c for classes c .. c + N - 1, without what belongs to a class target's own class.
template <typename T, int N>
LNL_INLINE Vec<T, N> row_target(const Row<T>& row, const ClassTerms<T>& terms, int64_t c) {
  using V = Vec<T, N>;
  V y = V::fill(terms.spread);
  if (row.probabilities != nullptr) {
    y = y + V::load(row.probabilities + c) * V::fill(terms.keep);
  }
  return terms.weight != nullptr ? y * V::load(terms.weight + c) : y;
}

// Sums of one chunk of a row, N lanes of them.
template <typename T, int N, bool Dense, int Gradients>
struct RowParts {
  using V = Vec<T, N>;
  V tail, entropy, logit, target, target_logit;
  Counter<T, N> maxima;

  LNL_INLINE RowParts() { tail = entropy = logit = target = target_logit = V::fill(T(0)); }

  // Classes c .. c + N - 1.
  LNL_INLINE void add(const Row<T>& row, const ClassTerms<T>& terms, V maximum, int64_t c) {
    const V zero = V::fill(T(0));
    const V d = V::load(row.logits + c) - maximum;
    const V clamped = clamp_exponent<T, N>(d);
    const V e = exp_nonpositive<T, N>(clamped);
    const auto top = d == zero;
    tail = tail + select<T, N>(top, zero, e);
    maxima.add(top);
    entropy = entropy + e * clamped;
    if constexpr (Gradients > 0) {
      e.store(row.gradient + c);
    }
    if constexpr (Dense) {
      const V y = row_target<T, N>(row, terms, c);
      target = target + y;
      target_logit = target_logit + y * d;
    }
    if (terms.has_confusion) {
      logit = logit + d;
    }
  }

  LNL_INLINE void add(const RowParts& other) {
    tail = tail + other.tail;
    entropy = entropy + other.entropy;
    logit = logit + other.logit;
    target = target + other.target;
    target_logit = target_logit + other.target_logit;
    maxima.add(other.maxima);
  }
};

template <typename T, int N, bool Dense, int Gradients>
void row_sums(const Row<T>& given_row, const ClassTerms<T>& given_terms, int64_t begin, int64_t end,
              RowSums<T>& sums) {
  // Copies, because what is stored below might otherwise have changed them.
  const Row<T> row = given_row;
  const ClassTerms<T> terms = given_terms;
  const Vec<T, N> maximum = Vec<T, N>::fill(sums.maximum);
  while (begin < end) {
    const int64_t stop = begin + kRowChunk < end ? begin + kRowChunk : end;
    RowParts<T, N, Dense, Gradients> even, odd;
    for (; begin + N < stop; begin += 2 * N) {
      LNL_PREFETCH(row.next_logits + begin);
      LNL_PREFETCH(row.next_logits + begin + N);
      even.add(row, terms, maximum, begin);
      odd.add(row, terms, maximum, begin + N);
    }
    if (begin < stop) {
      even.add(row, terms, maximum, begin);
      begin += N;
    }
    even.add(odd);
    sums.tail += horizontal_sum<T, N>(even.tail);
    sums.maxima += horizontal_sum<T, N>(even.maxima.value());
    sums.entropy += horizontal_sum<T, N>(even.entropy);
    if (terms.has_confusion) {
      sums.logit += horizontal_sum<T, N>(even.logit);
    }
    if constexpr (Dense) {
      sums.target += horizontal_sum<T, N>(even.target);
      sums.target_logit += horizontal_sum<T, N>(even.target_logit);
    }
  }
}

// Coefficients of one row's gradients: p (slope d + level) + constant, and what a dense target
// adds.
template <typename T>
struct RowGradient {
  T maximum, inverse, slope, level, constant, ce_scale, head_scale, one_minus_top, target_sum;
};

template <typename T, int N, bool Dense, int Gradients>
void row_gradient(const Row<T>& row, const ClassTerms<T>& terms, const RowGradient<T>& k,
                  int64_t begin, int64_t end) {
  using V = Vec<T, N>;
  [[maybe_unused]] const V zero = V::fill(T(0));
  [[maybe_unused]] const V one = V::fill(T(1));
  for (int64_t c = begin; c < end; c += N) {
    const V d = clamp_exponent<T, N>(V::load(row.logits + c) - V::fill(k.maximum));
    const V p = V::load(row.gradient + c) * V::fill(k.inverse);
    V g = p * (V::fill(k.slope) * d + V::fill(k.level)) + V::fill(k.constant);
    V head = V::fill(k.head_scale);
    if constexpr (Dense) {
      const V y = row_target<T, N>(row, terms, c);
      const V others = select<T, N>(d == zero, V::fill(k.one_minus_top), one - p);
      const V ce = p * (V::fill(k.target_sum) - y) - y * others;
      g = g + V::fill(k.ce_scale) * ce;
      head = head * ce;
    } else {
      head = head * p;
    }
    g.store(row.gradient + c);
    if constexpr (Gradients > 1) {
      head.store(row.head_gradient + c);
    }
  }
}

template <typename T, int N>
LNL_INLINE T row_maximum(const T* logits, int64_t classes) {
  using V = Vec<T, N>;
  // Any NaN makes every result NaN through its own d, so the maximum may pass over it.
  constexpr int kChains = 4;
  V maximum[kChains];
#pragma GCC unroll 64
  for (int i = 0; i < kChains; ++i) {
    maximum[i] = V::fill(logits[0]);
  }
  int64_t c = 0;
  for (; c + kChains * N <= classes; c += kChains * N) {
#pragma GCC unroll 64
    for (int i = 0; i < kChains; ++i) {
      maximum[i] = max_keeping_nan_of_second<T, N>(V::load(logits + c + i * N), maximum[i]);
    }
  }
  for (; c + N <= classes; c += N) {
    maximum[0] = max_keeping_nan_of_second<T, N>(V::load(logits + c), maximum[0]);
  }
  T result = horizontal_max<T, N>(
      max_keeping_nan_of_second<T, N>(max_keeping_nan_of_second<T, N>(maximum[0], maximum[1]),
                                      max_keeping_nan_of_second<T, N>(maximum[2], maximum[3])));
  for (; c < classes; ++c) {
    result = logits[c] > result ? logits[c] : result;
  }
  return result;
}

template <typename T, int N, bool Dense, int Gradients>
RowResult row_block(const Row<T>& row, const ClassTerms<T>& terms) {
  const int64_t classes = terms.classes;
  const int64_t whole = classes - classes % N;
  RowSums<T> sums;
  sums.maximum = row_maximum<T, N>(row.logits, classes);
  row_sums<T, N, Dense, Gradients>(row, terms, 0, whole, sums);
  row_sums<T, 1, Dense, Gradients>(row, terms, whole, classes, sums);

  const bool has_class = row.target >= 0;
  double target_logit = 0.0;  // d of the target's class
  double class_weight = 0.0;  // what a class target adds to y of its own class
  if (has_class) {
    target_logit = static_cast<double>(row.logits[row.target] - sums.maximum);
    class_weight = terms.weight != nullptr ? static_cast<double>(terms.weight[row.target]) : 1.0;
    class_weight *= static_cast<double>(terms.keep);
  }
  const double tail = sums.tail + (sums.maxima - 1.0);  // one maximum is left out of the sum
  const double log_sum = std::log1p(tail);
  const double inverse = 1.0 / (1.0 + tail);
  const double ratio = sums.entropy * inverse;
  RowResult result;
  result.entropy = log_sum - ratio;
  result.confusion = log_sum - sums.logit / static_cast<double>(classes);
  double target_sum = sums.target;
  if constexpr (Dense) {
    if (row.probabilities == nullptr) {
      target_sum = static_cast<double>(terms.spread_sum) + class_weight;
    }
    result.cross_entropy = log_sum * target_sum - sums.target_logit;
    if (has_class && class_weight != 0.0) {
      result.cross_entropy -= class_weight * target_logit;
    }
  } else {
    target_sum = class_weight;
    result.cross_entropy = class_weight * (log_sum - target_logit);
  }
  if (row.counted == T(0)) {
    result.cross_entropy = 0.0;
  }

  if constexpr (Gradients > 0) {
    const double entropy_scale = static_cast<double>(row.entropy_scale);
    const double confusion_scale = entropy_scale * static_cast<double>(terms.confusion);
    const double slope = entropy_scale * static_cast<double>(terms.entropy);
    const double constant = -confusion_scale / static_cast<double>(classes);
    const double rest = confusion_scale - slope * ratio;
    const double head_scale = static_cast<double>(row.scale);
    const double ce_scale = head_scale * static_cast<double>(terms.sign);
    const double one_minus_top = tail * inverse;
    RowGradient<T> k;
    k.maximum = sums.maximum;
    k.inverse = static_cast<T>(inverse);
    k.slope = static_cast<T>(slope);
    k.constant = static_cast<T>(constant);
    k.one_minus_top = static_cast<T>(one_minus_top);
    k.target_sum = static_cast<T>(target_sum);
    k.ce_scale = static_cast<T>(ce_scale);
    k.head_scale = static_cast<T>(Dense ? head_scale : head_scale * target_sum);
    k.level = static_cast<T>(Dense ? rest : ce_scale * target_sum + rest);

    // The target's own class, before its e^d is overwritten.
    double hit = 0.0, head_hit = 0.0;
    if (has_class) {
      const double lowest = static_cast<double>(Float<T>::kLowestExp);
      const double d = target_logit < lowest ? lowest : target_logit;
      const double p = static_cast<double>(row.gradient[row.target]) * inverse;
      const double others = d == 0.0 ? one_minus_top : 1.0 - p;
      double y = class_weight;
      if constexpr (Dense) {
        y += static_cast<double>((row_target<T, 1>(row, terms, row.target)).v);
      }
      const double ce = p * (target_sum - y) - y * others;
      hit = p * (slope * d + rest) + constant + ce_scale * ce;
      head_hit = head_scale * ce;
    }
    row_gradient<T, N, Dense, Gradients>(row, terms, k, 0, whole);
    row_gradient<T, 1, Dense, Gradients>(row, terms, k, whole, classes);
    if (has_class) {
      row.gradient[row.target] = static_cast<T>(hit);
      if constexpr (Gradients > 1) {
        row.head_gradient[row.target] = static_cast<T>(head_hit);
      }
    }
    // No term gives this site a gradient, also where NaN logits made it NaN.
    if (row.counted == T(0)) {
      if (!terms.regularised || row.entropy_counted == T(0)) {
        memset(row.gradient, 0, classes * sizeof(T));
      }
      if constexpr (Gradients > 1) {
        memset(row.head_gradient, 0, classes * sizeof(T));
      }
    }
  }
  return result;
}
