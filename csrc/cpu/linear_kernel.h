// The three products of a linear layer on a block of rows, for few outputs: logits = X W^T,
// dX = G W and dW += G^T X. Every tile's sums stay in registers. Widths are padded to
// kWidthMultiple values, so that no loop has a remainder. Included like simd.h: inside each
// instruction set's namespace.

// Half of the registers for sums where there are 16, which two operands of a product then fit
// beside.
constexpr bool kManyRegisters = kVectorBytes == 64;
constexpr int kTileRows = kManyRegisters ? 4 : 2;
constexpr int kTileClasses = 4;                       // of the logits
constexpr int kTileVectors = 4;                       // of the features' gradient
constexpr int kSumClasses = kManyRegisters ? 12 : 6;  // of the weight's gradient
constexpr int kSumVectors = 2;
constexpr int64_t kWidthChunk = 512;  // of a dot product: a chunk of all classes stays in L1

// a * b + c in one expression, which every compiler may fuse.
template <typename T, int N>
LNL_INLINE Vec<T, N> multiply_add(Vec<T, N> a, Vec<T, N> b, Vec<T, N> c) {
  return {a.v * b.v + c.v};
}

// The sums over the lanes of N vectors, one a lane of the result.
template <typename T, int N, int K = 1>
LNL_INLINE Vec<T, N> lane_sums(Vec<T, N> (&v)[N]) {
  if constexpr (K < N) {
#pragma GCC unroll 64
    for (int i = 0; i < N; i += 2 * K) {
      exchange<T, N, K>(v[i], v[i + K], make_index_sequence<N>{});
      v[i] = v[i] + v[i + K];
    }
    return lane_sums<T, N, 2 * K>(v);
  } else {
    return v[0];
  }
}

// logits[r][c] += sum over d of x[r][d] w[c][d], for R rows and C classes.
template <typename T, int N, int R, int C>
void logits_tile(const T* x, const T* w, int64_t stride, int64_t x_stride, int64_t width, T* logits,
                 int64_t outputs) {
  using V = Vec<T, N>;
  constexpr int kGroups = (R * C + N - 1) / N;
  V sum[kGroups * N];
#pragma GCC unroll 64
  for (int i = 0; i < kGroups * N; ++i) {
    sum[i] = V::fill(T(0));
  }
  for (int64_t d = 0; d < width; d += N) {
    V weight[C];
#pragma GCC unroll 64
    for (int c = 0; c < C; ++c) {
      weight[c] = V::load(w + c * stride + d);
    }
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) {
      const V value = V::load(x + r * x_stride + d);
#pragma GCC unroll 64
      for (int c = 0; c < C; ++c) {
        sum[r * C + c] = multiply_add<T, N>(value, weight[c], sum[r * C + c]);
      }
    }
  }
  T total[kGroups * N];
#pragma GCC unroll 64
  for (int group = 0; group < kGroups; ++group) {
    V part[N];
#pragma GCC unroll 64
    for (int i = 0; i < N; ++i) {
      part[i] = sum[group * N + i];
    }
    lane_sums<T, N>(part).store(total + group * N);
  }
#pragma GCC unroll 64
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 64
    for (int c = 0; c < C; ++c) {
      logits[r * outputs + c] += total[r * C + c];
    }
  }
}

template <typename T, int N, int R>
LNL_INLINE void logits_rows(const T* x, int64_t x_stride, const T* w, int64_t stride, int64_t width,
                            T* logits, int64_t outputs) {
  int64_t c = 0;
  for (; c + kTileClasses <= outputs; c += kTileClasses) {
    logits_tile<T, N, R, kTileClasses>(x, w + c * stride, stride, x_stride, width, logits + c,
                                       outputs);
  }
  const T* const rest = w + c * stride;
  if (outputs - c == 1) {
    logits_tile<T, N, R, 1>(x, rest, stride, x_stride, width, logits + c, outputs);
  } else if (outputs - c == 2) {
    logits_tile<T, N, R, 2>(x, rest, stride, x_stride, width, logits + c, outputs);
  } else if (outputs - c == 3) {
    logits_tile<T, N, R, 3>(x, rest, stride, x_stride, width, logits + c, outputs);
  }
}

// logits = X W^T + bias for a block of rows.
template <typename T, int N>
void block_logits(const T* x, int64_t x_stride, int64_t rows, const T* w, int64_t stride,
                  const T* bias, int64_t outputs, T* logits) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < outputs; ++c) {
      logits[r * outputs + c] = bias != nullptr ? bias[c] : T(0);
    }
  }
  for (int64_t d = 0; d < stride; d += kWidthChunk) {
    const int64_t width = d + kWidthChunk < stride ? kWidthChunk : stride - d;
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) {
      logits_rows<T, N, kTileRows>(x + r * x_stride + d, x_stride, w + d, stride, width,
                                   logits + r * outputs, outputs);
    }
    for (; r < rows; ++r) {
      logits_rows<T, N, 1>(x + r * x_stride + d, x_stride, w + d, stride, width,
                           logits + r * outputs, outputs);
    }
  }
}

// dx[r][...] = sum over c of g[r][c] w[c][...], for R rows and V vectors.
template <typename T, int N, int R, int V>
LNL_INLINE void features_tile(const T* g, int64_t outputs, const T* w, int64_t stride, T* dx,
                              int64_t dx_stride) {
  using Vector = Vec<T, N>;
  Vector sum[R * V];
#pragma GCC unroll 64
  for (int i = 0; i < R * V; ++i) {
    sum[i] = Vector::fill(T(0));
  }
  for (int64_t c = 0; c < outputs; ++c) {
    Vector weight[V];
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      weight[v] = Vector::load(w + c * stride + v * N);
    }
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) {
      const Vector factor = Vector::fill(g[r * outputs + c]);
#pragma GCC unroll 64
      for (int v = 0; v < V; ++v) {
        sum[r * V + v] = multiply_add<T, N>(factor, weight[v], sum[r * V + v]);
      }
    }
  }
#pragma GCC unroll 64
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      sum[r * V + v].store(dx + r * dx_stride + v * N);
    }
  }
}

// R rows of dX = G W.
template <typename T, int N, int R>
void features_rows(const T* g, int64_t outputs, const T* w, int64_t stride, T* dx,
                   int64_t dx_stride) {
  int64_t d = 0;
  for (; d + kTileVectors * N <= stride; d += kTileVectors * N) {
    features_tile<T, N, R, kTileVectors>(g, outputs, w + d, stride, dx + d, dx_stride);
  }
  for (; d < stride; d += N) {
    features_tile<T, N, R, 1>(g, outputs, w + d, stride, dx + d, dx_stride);
  }
}

// dw[c][...] += sum over r of g[r][c] x[r][...], for C classes and V vectors.
template <typename T, int N, int C, int V>
void weight_tile(const T* g, int64_t outputs, const T* x, int64_t x_stride, int64_t rows, T* dw,
                 int64_t stride) {
  using Vector = Vec<T, N>;
  Vector sum[C * V];
#pragma GCC unroll 64
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      sum[c * V + v] = Vector::load(dw + c * stride + v * N);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    Vector value[V];
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      value[v] = Vector::load(x + r * x_stride + v * N);
    }
#pragma GCC unroll 64
    for (int c = 0; c < C; ++c) {
      const Vector factor = Vector::fill(g[r * outputs + c]);
#pragma GCC unroll 64
      for (int v = 0; v < V; ++v) {
        sum[c * V + v] = multiply_add<T, N>(factor, value[v], sum[c * V + v]);
      }
    }
  }
#pragma GCC unroll 64
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      sum[c * V + v].store(dw + c * stride + v * N);
    }
  }
}

// weight_tile for `classes` in 1 .. kSumClasses.
template <typename T, int N, int V, int C = kSumClasses>
LNL_INLINE void weight_classes(int64_t classes, const T* g, int64_t outputs, const T* x,
                               int64_t x_stride, int64_t rows, T* dw, int64_t stride) {
  if constexpr (C > 1) {
    if (classes < C) {
      return weight_classes<T, N, V, C - 1>(classes, g, outputs, x, x_stride, rows, dw, stride);
    }
  }
  weight_tile<T, N, C, V>(g, outputs, x, x_stride, rows, dw, stride);
}

// dW += G^T X for a block of rows.
template <typename T, int N>
void block_weight_gradient(const T* g, int64_t outputs, const T* x, int64_t x_stride, int64_t rows,
                           T* dw, int64_t stride) {
  const int64_t parts = divide_up(outputs, kSumClasses);  // of nearly the same number of classes
  int64_t d = 0;
  for (; d + kSumVectors * N <= stride; d += kSumVectors * N) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * outputs / parts;
      const int64_t classes = (part + 1) * outputs / parts - first;
      weight_classes<T, N, kSumVectors>(classes, g + first, outputs, x + d, x_stride, rows,
                                        dw + first * stride + d, stride);
    }
  }
  for (; d < stride; d += N) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * outputs / parts;
      const int64_t classes = (part + 1) * outputs / parts - first;
      weight_classes<T, N, 1>(classes, g + first, outputs, x + d, x_stride, rows,
                              dw + first * stride + d, stride);
    }
  }
}
