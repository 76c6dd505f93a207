// N lanes of T and the few operations the kernels need, on the compiler's vector extension (GCC,
// Clang) or, with one lane, on plain scalars (any compiler).
//
// Every instruction set's unit includes this inside its own namespace and after its target pragma,
// so that code made for one instruction set is never merged with another's. Therefore it includes
// nothing itself.

#if defined(_MSC_VER) && !defined(__clang__)
#define LNL_INLINE __forceinline
#define LNL_PREFETCH(address) ((void)(address))
#else
#define LNL_INLINE inline __attribute__((always_inline))
#define LNL_PREFETCH(address) __builtin_prefetch(address)
#endif

template <typename T>
struct Float;
template <>
struct Float<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Int kExponentBias = 127;
  static constexpr Int kSqrtHalfBits = 0x3F3504F3;
  static constexpr float kRoundToInt =
      12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  static constexpr float kIntToFloat = 8388608.0f;  // 2^23
  // -127 log 2: its power of two has an exponent field of zero, which makes exp exactly 0.
  static constexpr float kLowestExp = -88.02969194f;
};
template <>
struct Float<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Int kExponentBias = 1023;
  static constexpr Int kSqrtHalfBits = 0x3FE6A09E667F3BCD;
  static constexpr double kRoundToInt = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kIntToFloat = 4503599627370496.0;  // 2^52
  static constexpr double kLowestExp = -709.0895657128241;   // -1023 log 2
};

template <typename T, int N>
struct Lanes {
#if defined(__GNUC__) || defined(__clang__)
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
#endif
};
template <typename T>
struct Lanes<T, 1> {
  using type = T;
};

// A wrapper so that overloads are found and masks keep the width of what they select.
template <typename T, int N>
struct Vec {
  using Native = typename Lanes<T, N>::type;
  using Bits = typename Lanes<typename Float<T>::Int, N>::type;
  using Mask = decltype(Native{} > Native{});

  Native v;

  static LNL_INLINE Vec fill(T x) { return {x - Native{}}; }  // x - 0 keeps the sign of a zero
  static LNL_INLINE Vec load(const T* p) {
    Vec r;
    memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  LNL_INLINE void store(T* p) const { memcpy(p, &v, sizeof(v)); }

  friend LNL_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend LNL_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend LNL_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend LNL_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend LNL_INLINE Mask operator==(Vec a, Vec b) { return a.v == b.v; }
};

template <typename T, int N>
LNL_INLINE Vec<T, N> select(typename Vec<T, N>::Mask mask, Vec<T, N> yes, Vec<T, N> no) {
  return {mask ? yes.v : no.v};
}

// Whether a lane of the mask is true.
template <typename T, int N>
LNL_INLINE bool any_lane(typename Vec<T, N>::Mask mask) {
  if constexpr (N == 1) {
    return mask;
  } else {
    int64_t words[sizeof(mask) / 8];
    memcpy(words, &mask, sizeof(mask));
    int64_t all = 0;
    for (const int64_t word : words) {
      all |= word;
    }
    return all != 0;
  }
}

// The lines that hold B values.
template <typename T, int B>
LNL_INLINE void prefetch(const T* values) {
  constexpr int kLine = 64 / sizeof(T);
#pragma GCC unroll 64
  for (int i = 0; i < B; i += kLine) {
    LNL_PREFETCH(values + i);
  }
}

// A NaN in b wins; one in a is dropped. That is what x86's instruction does, but no compiler makes
// it of the comparison.
template <typename T, int N>
LNL_INLINE Vec<T, N> max_keeping_nan_of_second(Vec<T, N> a, Vec<T, N> b) {
#ifdef LNL_CPU_X86
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  if constexpr (bytes == 16 && sizeof(T) == 4) {
    return {(typename Vec<T, N>::Native)_mm_max_ps((__m128)a.v, (__m128)b.v)};
  } else if constexpr (bytes == 16 && N > 1) {
    return {(typename Vec<T, N>::Native)_mm_max_pd((__m128d)a.v, (__m128d)b.v)};
  }
#ifdef LNL_HAS_AVX2
  else if constexpr (bytes == 32 && sizeof(T) == 4) {
    return {(typename Vec<T, N>::Native)_mm256_max_ps((__m256)a.v, (__m256)b.v)};
  } else if constexpr (bytes == 32) {
    return {(typename Vec<T, N>::Native)_mm256_max_pd((__m256d)a.v, (__m256d)b.v)};
  }
#endif
#ifdef LNL_HAS_AVX512
  else if constexpr (bytes == 64 && sizeof(T) == 4) {
    return {(typename Vec<T, N>::Native)_mm512_max_ps((__m512)a.v, (__m512)b.v)};
  } else if constexpr (bytes == 64) {
    return {(typename Vec<T, N>::Native)_mm512_max_pd((__m512d)a.v, (__m512d)b.v)};
  }
#endif
  else
#endif
    return {a.v > b.v ? a.v : b.v};
}

// Counts how often each lane's mask was true.
template <typename T, int N>
struct Counter {
  typename Vec<T, N>::Bits count{};

  LNL_INLINE void add(typename Vec<T, N>::Mask mask) {
    if constexpr (N > 1) {
      count = count - (typename Vec<T, N>::Bits)mask;  // true is -1
    } else {
      count += mask ? 1 : 0;
    }
  }
  LNL_INLINE void add(const Counter& other) { count = count + other.count; }
  LNL_INLINE Vec<T, N> value() const {
    if constexpr (N > 1) {
      return {__builtin_convertvector(count, typename Vec<T, N>::Native)};
    } else {
      return {static_cast<T>(count)};
    }
  }
};

template <typename To, typename From>
LNL_INLINE To bit_cast_lanes(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T, int N>
struct Halves {
  Vec<T, N / 2> low, high;
  explicit LNL_INLINE Halves(const Vec<T, N>& x) {
    memcpy(&low, &x, sizeof(low));
    memcpy(&high, reinterpret_cast<const unsigned char*>(&x) + sizeof(low), sizeof(high));
  }
};

// Sums in a fixed order, halving, so that the result does not depend on the instruction set's own
// way.
template <typename T, int N>
LNL_INLINE T horizontal_sum(Vec<T, N> x) {
  if constexpr (N == 1) {
    return x.v;
  } else {
    const Halves<T, N> half(x);
    return horizontal_sum<T, N / 2>(half.low + half.high);
  }
}

template <typename T, int N>
LNL_INLINE T horizontal_max(Vec<T, N> x) {  // it may pass over a NaN
  if constexpr (N == 1) {
    return x.v;
  } else {
    const Halves<T, N> half(x);
    return horizontal_max<T, N / 2>(max_keeping_nan_of_second<T, N / 2>(half.low, half.high));
  }
}

template <typename T, int N>
LNL_INLINE Vec<T, N> polynomial(Vec<T, N> x, const T* coefficients, int count) {
  Vec<T, N> result = Vec<T, N>::fill(coefficients[count - 1]);
  for (int i = count - 2; i >= 0; --i) {
    result = result * x + Vec<T, N>::fill(coefficients[i]);
  }
  return result;
}

// exp(r) on |r| <= log(2)/2. float: fit for the smallest relative error (3e-9 before rounding),
// with the first two coefficients held at 1; double: the Taylor series, whose first term left out
// is below 5e-18.
template <int N>
LNL_INLINE Vec<float, N> exp_reduced(Vec<float, N> r) {
  constexpr float c[] = {1.0f,           1.0f,           0.49999993447f, 0.16666520608f,
                         0.04166838810f, 0.00836871971f, 0.00138146100f};
  return polynomial<float, N>(r, c, 7);
}
template <int N>
LNL_INLINE Vec<double, N> exp_reduced(Vec<double, N> r) {
  constexpr double c[] = {1.0,
                          1.0,
                          1.0 / 2,
                          1.0 / 6,
                          1.0 / 24,
                          1.0 / 120,
                          1.0 / 720,
                          1.0 / 5040,
                          1.0 / 40320,
                          1.0 / 362880,
                          1.0 / 3628800,
                          1.0 / 39916800,
                          1.0 / 479001600,
                          1.0 / 6227020800};
  return polynomial<double, N>(r, c, 14);
}

// x, but no lower than where exp is exactly 0: what makes p (log p) and p d of a class with z =
// -inf 0 rather than NaN. NaN stays.
template <typename T, int N>
LNL_INLINE Vec<T, N> clamp_exponent(Vec<T, N> x) {
  return max_keeping_nan_of_second<T, N>(Vec<T, N>::fill(Float<T>::kLowestExp), x);
}

// exp(x) for kLowestExp <= x <= 0 and NaN.
template <typename T, int N>
LNL_INLINE Vec<T, N> exp_nonpositive(Vec<T, N> x) {
  using V = Vec<T, N>;
  using F = Float<T>;
  // log(2) in two parts, the first short enough that n times it is exact. In float the
  // multiplication is fused or the values are small enough: one part is off by 2e-9 n, below
  // rounding where e^x matters.
  constexpr T log2_high = sizeof(T) == 4 ? T(0.693147180559945309) : T(0.693147180369123816490);
  constexpr T log2_low = sizeof(T) == 4 ? T(0) : T(1.90821492927058770002e-10);
  const V shifted = x * V::fill(T(1.44269504088896340736)) + V::fill(F::kRoundToInt);
  const V n = shifted - V::fill(F::kRoundToInt);
  V r = x - n * V::fill(log2_high);
  if constexpr (sizeof(T) == 8) {
    r = r - n * V::fill(log2_low);
  }
  const auto power = (bit_cast_lanes<typename V::Bits>(shifted.v) << F::kMantissaBits) +
                     (F::kExponentBias << F::kMantissaBits);
  return exp_reduced<N>(r) * V{bit_cast_lanes<typename V::Native>(power)};
}

// log1p(t) for t >= 0 and NaN: log of s = 1 + t as exponent and 2 atanh(f / (2 + f)), then what
// rounding t into s lost. `inverse` is 1 / s.
template <typename T, int N>
LNL_INLINE Vec<T, N> log1p_nonnegative(Vec<T, N> t, Vec<T, N> inverse) {
  using V = Vec<T, N>;
  using F = Float<T>;
  const V one = V::fill(T(1));
  const V s = one + t;
  const auto bits = bit_cast_lanes<typename V::Bits>(s.v);
  const auto exponent = (bits - F::kSqrtHalfBits) >> F::kMantissaBits;  // s >= 1: never negative
  const V mantissa{bit_cast_lanes<typename V::Native>(bits - (exponent << F::kMantissaBits))};
  const auto as_float_bits = exponent + bit_cast_lanes<typename Float<T>::Int>(T(F::kIntToFloat));
  const V e = V{bit_cast_lanes<typename V::Native>(as_float_bits)} - V::fill(F::kIntToFloat);
  const V f = mantissa - one;
  const V w = f / (V::fill(T(2)) + f);
  // 2 (1 + w^2/3 + w^4/5 + ...), |w| <= 0.172
  constexpr T c[] = {T(2),      T(2) / 3,  T(2) / 5,  T(2) / 7,  T(2) / 9, T(2) / 11,
                     T(2) / 13, T(2) / 15, T(2) / 17, T(2) / 19, T(2) / 21};
  const V series = w * polynomial<T, N>(w * w, c, sizeof(T) == 4 ? 5 : 11);
  const V lost = (t - (s - one)) * inverse;
  const V result = e * V::fill(T(0.693147180559945309417)) + (series + lost);
  return select<T, N>(t == t, result, t);  // the exponent of a NaN is no number
}
