// Between the four storage types and the type the kernels compute in, and between rows and tiles.
//
// A tile holds a block of sites, [classes][B lanes]: one class of B sites side by side.
// Included like simd.h: inside each instruction set's namespace.

template <DType D>
struct Storage {
  using type = uint16_t;  // the halves are moved as bits
  using compute = float;
};
template <>
struct Storage<DType::kFloat32> {
  using type = float;
  using compute = float;
};
template <>
struct Storage<DType::kFloat64> {
  using type = double;
  using compute = double;
};

LNL_INLINE float bfloat16_to_float(uint16_t x) {
  return bit_cast_lanes<float>(static_cast<uint32_t>(x) << 16);
}

LNL_INLINE uint16_t float_to_bfloat16(float x) {  // to nearest, ties to even
  const uint32_t bits = bit_cast_lanes<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7FC0);
}

LNL_INLINE float float16_to_float(uint16_t x) {
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7FFF) << 13;
  uint32_t bits = bit_cast_lanes<uint32_t>(bit_cast_lanes<float>(magnitude) * 0x1p112f);
  bits = magnitude >= 0x0F800000 ? (magnitude | 0x7F800000) : bits;  // infinities and NaN
  return bit_cast_lanes<float>(bits | (static_cast<uint32_t>(x & 0x8000) << 16));
}

LNL_INLINE uint16_t float_to_float16(float x) {  // to nearest, ties to even
  const uint32_t bits = bit_cast_lanes<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  const uint32_t normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Below 2^-14 the spacing is that of floats near 0.5, so the addition itself rounds.
  const uint32_t subnormal =
      bit_cast_lanes<uint32_t>(bit_cast_lanes<float>(magnitude) + 0.5f) - 0x3F000000;
  uint32_t result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x477FF000 ? 0x7C00 : result;  // 65520 and above round to infinity
  result = magnitude > 0x7F800000 ? 0x7E00 : result;
  return static_cast<uint16_t>(result | ((bits >> 16) & 0x8000));
}

template <DType D>
void read_values(const typename Storage<D>::type* from, int64_t count,
                 typename Storage<D>::compute* to) {
  int64_t i = 0;
#ifdef LNL_HAS_F16C
  if constexpr (D == DType::kFloat16) {
    for (; i + 8 <= count; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (; i < count; ++i) {
    if constexpr (D == DType::kFloat16) {
      to[i] = float16_to_float(from[i]);
    } else if constexpr (D == DType::kBFloat16) {
      to[i] = bfloat16_to_float(from[i]);
    } else {
      to[i] = from[i];
    }
  }
}

template <DType D>
void write_values(const typename Storage<D>::compute* from, int64_t count,
                  typename Storage<D>::type* to) {
  int64_t i = 0;
#ifdef LNL_HAS_F16C
  if constexpr (D == DType::kFloat16) {
    for (; i + 8 <= count; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
    }
  }
#endif
  for (; i < count; ++i) {
    if constexpr (D == DType::kFloat16) {
      to[i] = float_to_float16(from[i]);
    } else if constexpr (D == DType::kBFloat16) {
      to[i] = float_to_bfloat16(from[i]);
    } else {
      to[i] = from[i];
    }
  }
}

// ---- transposing N x N values in registers
// -------------------------------------------------------------

#if defined(__GNUC__) || defined(__clang__)

// Swaps the off-diagonal K x K blocks of every 2K x 2K block; K = 1, 2, .. N/2 in turn transposes.
template <typename T, int N, int K, size_t... Lane>
LNL_INLINE void exchange(Vec<T, N>& a, Vec<T, N>& b, index_sequence<Lane...>) {
  const auto upper = __builtin_shufflevector(
      a.v, b.v,
      (static_cast<int>(Lane) & K ? N + static_cast<int>(Lane) - K : static_cast<int>(Lane))...);
  const auto lower = __builtin_shufflevector(
      a.v, b.v,
      (static_cast<int>(Lane) & K ? N + static_cast<int>(Lane) : static_cast<int>(Lane) + K)...);
  a.v = upper;
  b.v = lower;
}

template <typename T, int N, int K>
LNL_INLINE void transpose_stages(Vec<T, N> (&row)[N]) {
  if constexpr (K < N) {
    for (int i = 0; i < N; ++i) {
      if ((i & K) == 0) {
        exchange<T, N, K>(row[i], row[i + K], make_index_sequence<N>{});
      }
    }
    transpose_stages<T, N, 2 * K>(row);
  }
}

template <typename T, int N>
LNL_INLINE void transpose(Vec<T, N> (&row)[N]) {
  transpose_stages<T, N, 1>(row);
}

#else

template <typename T, int N>
LNL_INLINE void transpose(Vec<T, N> (&)[N]) {
  static_assert(N == 1, "one lane where the compiler has no vector extension");
}

#endif

// B contiguous rows of `classes` values -> tile. Needs classes >= N; the last N columns may overlap
// others.
template <typename T, int N, int B>
void rows_to_tile(const T* rows, int64_t classes, T* tile) {
  for (int r = 0; r < B; r += N) {
    for (int64_t c = 0; c < classes;) {
      Vec<T, N> block[N];
      for (int i = 0; i < N; ++i) {
        block[i] = Vec<T, N>::load(rows + (r + i) * classes + c);
      }
      transpose<T, N>(block);
      for (int i = 0; i < N; ++i) {
        block[i].store(tile + (c + i) * B + r);
      }
      c = c + N < classes && c + 2 * N > classes ? classes - N : c + N;
    }
  }
}

template <typename T, int N, int B>
void tile_to_rows(const T* tile, int64_t classes, T* rows) {
  for (int r = 0; r < B; r += N) {
    for (int64_t c = 0; c < classes;) {
      Vec<T, N> block[N];
      for (int i = 0; i < N; ++i) {
        block[i] = Vec<T, N>::load(tile + (c + i) * B + r);
      }
      transpose<T, N>(block);
      for (int i = 0; i < N; ++i) {
        block[i].store(rows + (r + i) * classes + c);
      }
      c = c + N < classes && c + 2 * N > classes ? classes - N : c + N;
    }
  }
}

// The widest squares of up to N x N that `classes` has room for: 8 x 8 for 12 classes. False, and
// nothing done, where even 4 x 4 is too wide (2 x 2 for two lanes): there moving single values is
// as fast.
template <typename T, int N, int B>
LNL_INLINE bool all_rows_to_tile(const T* rows, int64_t classes, T* tile) {
  if (classes >= N) {
    rows_to_tile<T, N, B>(rows, classes, tile);
    return true;
  }
  if constexpr (N > 4) {
    return all_rows_to_tile<T, N / 2, B>(rows, classes, tile);
  }
  return false;
}

template <typename T, int N, int B>
LNL_INLINE bool tile_to_all_rows(const T* tile, int64_t classes, T* rows) {
  if (classes >= N) {
    tile_to_rows<T, N, B>(tile, classes, rows);
    return true;
  }
  if constexpr (N > 4) {
    return tile_to_all_rows<T, N / 2, B>(tile, classes, rows);
  }
  return false;
}

// The same for few classes or a last, partly filled block, whose other lanes keep what they held.
template <typename T, int B>
void some_rows_to_tile(const T* rows, int64_t classes, int count, T* tile) {
  for (int r = 0; r < count; ++r) {
    for (int64_t c = 0; c < classes; ++c) {
      tile[c * B + r] = rows[r * classes + c];
    }
  }
}

template <typename T, int B>
void tile_to_some_rows(const T* tile, int64_t classes, int count, T* rows) {
  for (int r = 0; r < count; ++r) {
    for (int64_t c = 0; c < classes; ++c) {
      rows[r * classes + c] = tile[c * B + r];
    }
  }
}
