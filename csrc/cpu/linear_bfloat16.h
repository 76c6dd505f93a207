// A bfloat16 linear layer with few outputs on the processor's own products of bfloat16 pairs: as
// linear_runner.h, at twice its rate. Logits are sums in float32 of exact products; the loss is
// computed in float32; for the two products of the gradients the logits' gradient is rounded to
// bfloat16, as every matrix product of that dtype does. Included inside the instruction set's
// namespace.
//
// Widths are padded to kPairMultiple values. A pair is two neighbours of the dimension that is
// summed over: of the width, of the classes, of the rows.

constexpr int kPairWidth = static_cast<int>(kPairMultiple);
constexpr int kPairTileRows = 4;
constexpr int kPairTileClasses = 4;
constexpr int64_t kPairWidthChunk = 1024;
constexpr int64_t kPairBlockRows = 64;
constexpr int64_t kPairBlockValues = 65536;  // of the features

LNL_INLINE __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
LNL_INLINE __m512i load_pairs(const void* from) { return _mm512_loadu_si512(from); }
LNL_INLINE __m512i repeat_pair(const uint16_t* from) {
  int pair;
  memcpy(&pair, from, sizeof(pair));
  return _mm512_set1_epi32(pair);
}

// logits[r][c] += sum over d of x[r][d] w[c][d].
template <int R, int C>
void pair_logits_tile(const uint16_t* x, const uint16_t* w, int64_t stride, int64_t width,
                      float* logits, int64_t outputs) {
  constexpr int kGroups = (R * C + 15) / 16;
  __m512 sum[kGroups * 16];
  for (int i = 0; i < kGroups * 16; ++i) {
    sum[i] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < width; d += kPairWidth) {
    __m512i weight[C];
    for (int c = 0; c < C; ++c) {
      weight[c] = load_pairs(w + c * stride + d);
    }
    for (int r = 0; r < R; ++r) {
      const __m512i value = load_pairs(x + r * stride + d);
      for (int c = 0; c < C; ++c) {
        sum[r * C + c] = add_products(sum[r * C + c], value, weight[c]);
      }
    }
  }
  float total[kGroups * 16];
  for (int group = 0; group < kGroups; ++group) {
    Vec<float, 16> part[16];
    for (int i = 0; i < 16; ++i) {
      part[i] = {bit_cast_lanes<Vec<float, 16>::Native>(sum[group * 16 + i])};
    }
    lane_sums<float, 16>(part).store(total + group * 16);
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      logits[r * outputs + c] += total[r * C + c];
    }
  }
}

template <int R>
LNL_INLINE void pair_logits_rows(const uint16_t* x, const uint16_t* w, int64_t stride,
                                 int64_t width, float* logits, int64_t outputs) {
  int64_t c = 0;
  for (; c + kPairTileClasses <= outputs; c += kPairTileClasses) {
    pair_logits_tile<R, kPairTileClasses>(x, w + c * stride, stride, width, logits + c, outputs);
  }
  const uint16_t* const rest = w + c * stride;
  if (outputs - c == 1) {
    pair_logits_tile<R, 1>(x, rest, stride, width, logits + c, outputs);
  } else if (outputs - c == 2) {
    pair_logits_tile<R, 2>(x, rest, stride, width, logits + c, outputs);
  } else if (outputs - c == 3) {
    pair_logits_tile<R, 3>(x, rest, stride, width, logits + c, outputs);
  }
}

// dx[r][...] = sum over c of g[r][c] w[c][...]: `g` holds an even number of classes a row, `w` is
// [class pairs][stride][2].
template <int R, int V>
void pair_features_tile(const uint16_t* g, int64_t classes, const uint16_t* w, int64_t stride,
                        uint16_t* dx, int64_t dx_stride) {
  __m512 sum[R * V];
  for (int i = 0; i < R * V; ++i) {
    sum[i] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < classes; c += 2) {
    __m512i weight[V];
    for (int v = 0; v < V; ++v) {
      weight[v] = load_pairs(w + c * stride + v * 32);
    }
    for (int r = 0; r < R; ++r) {
      const __m512i factor = repeat_pair(g + r * classes + c);
      for (int v = 0; v < V; ++v) {
        sum[r * V + v] = add_products(sum[r * V + v], factor, weight[v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; v += 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh(sum[r * V + v + 1], sum[r * V + v]);
      memcpy(dx + r * dx_stride + v * 16, &both, sizeof(both));
    }
  }
}

template <int R>
void pair_features_rows(const uint16_t* g, int64_t classes, const uint16_t* w, int64_t stride,
                        uint16_t* dx, int64_t dx_stride) {
  int64_t d = 0;
  for (; d + 64 <= stride; d += 64) {
    pair_features_tile<R, 4>(g, classes, w + 2 * d, stride, dx + d, dx_stride);
  }
  for (; d < stride; d += 32) {
    pair_features_tile<R, 2>(g, classes, w + 2 * d, stride, dx + d, dx_stride);
  }
}

// dw[c][d .. d + 31] += sum over r of g[r][c] x[r][...]; `g` is [row pairs][outputs][2].
template <int C>
void pair_weight_tile(const uint16_t* g, int64_t outputs, const uint16_t* x, int64_t x_stride,
                      int64_t rows, float* dw, int64_t stride) {
  alignas(64) static constexpr int16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = load_pairs(kLow);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  __m512 sum[C * 2];
  for (int c = 0; c < C; ++c) {
    sum[2 * c] = _mm512_loadu_ps(dw + c * stride);
    sum[2 * c + 1] = _mm512_loadu_ps(dw + c * stride + 16);
  }
  for (int64_t r = 0; r < rows; r += 2) {
    const __m512i above = load_pairs(x + r * x_stride);
    const __m512i below =
        r + 1 < rows ? load_pairs(x + (r + 1) * x_stride) : _mm512_setzero_si512();
    const __m512i low = _mm512_permutex2var_epi16(above, first, below);
    const __m512i high = _mm512_permutex2var_epi16(above, second, below);
    for (int c = 0; c < C; ++c) {
      const __m512i factor = repeat_pair(g + r * outputs + 2 * c);
      sum[2 * c] = add_products(sum[2 * c], factor, low);
      sum[2 * c + 1] = add_products(sum[2 * c + 1], factor, high);
    }
  }
  for (int c = 0; c < C; ++c) {
    _mm512_storeu_ps(dw + c * stride, sum[2 * c]);
    _mm512_storeu_ps(dw + c * stride + 16, sum[2 * c + 1]);
  }
}

template <int C = kSumClasses>
LNL_INLINE void pair_weight_classes(int64_t classes, const uint16_t* g, int64_t outputs,
                                    const uint16_t* x, int64_t x_stride, int64_t rows, float* dw,
                                    int64_t stride) {
  if constexpr (C > 1) {
    if (classes < C) {
      return pair_weight_classes<C - 1>(classes, g, outputs, x, x_stride, rows, dw, stride);
    }
  }
  pair_weight_tile<C>(g, outputs, x, x_stride, rows, dw, stride);
}

template <bool Dense, int Gradients>
struct PairRunner {
  const LinearProblem& problem;
  const int64_t outputs = problem.loss.heads * problem.loss.classes;
  const int64_t even = outputs + outputs % 2;
  const int64_t width = problem.width;
  const int64_t stride = problem.padded_width;
  const bool direct = width == stride;
  const int64_t block_rows = rows_of_a_block();
  const uint16_t* const weight = static_cast<const uint16_t*>(problem.pair_weight);
  const uint16_t* const class_pairs = static_cast<const uint16_t*>(problem.pair_classes);
  std::vector<uint16_t> values = std::vector<uint16_t>(direct ? 0 : block_rows * stride);
  std::vector<uint16_t> row = std::vector<uint16_t>(direct ? 0 : kPairTileRows * stride);
  std::vector<float> logits = std::vector<float>(block_rows * outputs);
  std::vector<float> gradient = std::vector<float>(Gradients > 0 ? block_rows * outputs : 0);
  std::vector<float> head_gradient = std::vector<float>(Gradients > 1 ? block_rows * outputs : 0);
  std::vector<uint16_t> rounded = std::vector<uint16_t>(Gradients > 0 ? block_rows * even : 0);
  std::vector<uint16_t> row_pairs =
      std::vector<uint16_t>(Gradients > 0 ? (block_rows + 1) * outputs : 0);
  Problem loss = problem.loss;  // of one block
  SiteRunner<DType::kFloat32, Dense, Gradients> sites{loss};

  explicit PairRunner(const LinearProblem& p) : problem(p) {
    loss.dtype = DType::kFloat32;
    loss.logits = logits.data();
    loss.gradient = gradient.data();
    loss.head_gradient = head_gradient.data();
  }

  int64_t rows_of_a_block() const {
    constexpr int64_t B = block_sites<float>();
    const int64_t fitting = kPairBlockValues / (B * (width > 0 ? width : 1));
    const int64_t most = kPairBlockRows / B;
    return B * (fitting < 1 ? 1 : fitting < most ? fitting : most);
  }

  void run(int64_t begin, int64_t end, Sums* sums, float* weight_gradient, float* bias_gradient) {
    for (int64_t first = begin; first < end; first += block_rows) {
      run_block(first, first + block_rows < end ? block_rows : end - first, sums, weight_gradient,
                bias_gradient);
    }
  }

  void run_block(int64_t first, int64_t rows, Sums* sums, float* weight_gradient,
                 float* bias_gradient) {
    const uint16_t* x = static_cast<const uint16_t*>(problem.features) + first * width;
    if (!direct) {
      for (int64_t r = 0; r < rows; ++r) {  // what is beyond the width stays 0
        memcpy(values.data() + r * stride, x + r * width, width * sizeof(uint16_t));
      }
      x = values.data();
    }
    make_logits(x, rows);
    place_rows(problem.loss, first, rows, sizeof(float), loss);
    sites.run(0, count_units(loss), sums);
    if constexpr (Gradients > 0) {
      if (problem.features_gradient != nullptr) {
        write_features_gradient(first, rows);
      }
      if (problem.head_gradient) {
        const float* const g = Gradients > 1 ? head_gradient.data() : gradient.data();
        add_weight_gradient(g, x, rows, weight_gradient);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < outputs; ++c) {
            bias_gradient[c] += g[r * outputs + c];
          }
        }
      }
    }
  }

  void make_logits(const uint16_t* x, int64_t rows) {
    const float* const bias = static_cast<const float*>(problem.head_bias);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < outputs; ++c) {
        logits[r * outputs + c] = bias != nullptr ? bias[c] : 0.0f;
      }
    }
    for (int64_t d = 0; d < stride; d += kPairWidthChunk) {
      const int64_t part = d + kPairWidthChunk < stride ? kPairWidthChunk : stride - d;
      int64_t r = 0;
      for (; r + kPairTileRows <= rows; r += kPairTileRows) {
        pair_logits_rows<kPairTileRows>(x + r * stride + d, weight + d, stride, part,
                                        logits.data() + r * outputs, outputs);
      }
      for (; r < rows; ++r) {
        pair_logits_rows<1>(x + r * stride + d, weight + d, stride, part,
                            logits.data() + r * outputs, outputs);
      }
    }
  }

  void write_features_gradient(int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {  // an odd last class keeps a zero beside it
      write_values<DType::kBFloat16>(gradient.data() + r * outputs, outputs,
                                     rounded.data() + r * even);
    }
    uint16_t* const out = static_cast<uint16_t*>(problem.features_gradient) + first * width;
    int64_t r = 0;
    for (; r + kPairTileRows <= rows; r += kPairTileRows) {
      write_rows<kPairTileRows>(rounded.data() + r * even, out + r * width);
    }
    for (; r < rows; ++r) {
      write_rows<1>(rounded.data() + r * even, out + r * width);
    }
  }

  template <int R>
  void write_rows(const uint16_t* g, uint16_t* out) {
    if (direct) {
      return pair_features_rows<R>(g, even, class_pairs, stride, out, width);
    }
    pair_features_rows<R>(g, even, class_pairs, stride, row.data(), stride);
    for (int r = 0; r < R; ++r) {
      memcpy(out + r * width, row.data() + r * stride, width * sizeof(uint16_t));
    }
  }

  void add_weight_gradient(const float* g, const uint16_t* x, int64_t rows, float* dw) {
    for (int64_t r = 0; r < rows; r += 2) {
      uint16_t* const to = row_pairs.data() + r * outputs;
      for (int64_t c = 0; c < outputs; ++c) {
        to[2 * c] = float_to_bfloat16(g[r * outputs + c]);
        to[2 * c + 1] = r + 1 < rows ? float_to_bfloat16(g[(r + 1) * outputs + c]) : 0;
      }
    }
    const int64_t parts = divide_up(outputs, kSumClasses);  // of nearly the same number of classes
    for (int64_t d = 0; d < stride; d += kPairWidth) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * outputs / parts;
        const int64_t classes = (part + 1) * outputs / parts - first;
        pair_weight_classes(classes, row_pairs.data() + 2 * first, outputs, x + d, stride, rows,
                            dw + first * stride + d, stride);
      }
    }
  }
};

template <bool Dense, int Gradients>
void run_pairs(const LinearProblem& problem, int64_t begin, int64_t end, Sums* sums,
               void* weight_gradient, void* bias_gradient) {
  PairRunner<Dense, Gradients> runner(problem);
  runner.run(begin, end, sums, static_cast<float*>(weight_gradient),
             static_cast<float*>(bias_gradient));
}

template <bool Dense>
void run_pair_gradients(const LinearProblem& problem, int64_t begin, int64_t end, Sums* sums,
                        void* weight_gradient, void* bias_gradient) {
  if (problem.two_gradients) {
    run_pairs<Dense, 2>(problem, begin, end, sums, weight_gradient, bias_gradient);
  } else if (problem.features_gradient != nullptr || problem.head_gradient) {
    run_pairs<Dense, 1>(problem, begin, end, sums, weight_gradient, bias_gradient);
  } else {
    run_pairs<Dense, 0>(problem, begin, end, sums, weight_gradient, bias_gradient);
  }
}

void run_linear_bfloat16(const LinearProblem& problem, int64_t begin, int64_t end, Sums* sums,
                         void* weight_gradient, void* bias_gradient) {
  if (problem.loss.probabilities != nullptr || problem.loss.label_smoothing > 0.0) {
    run_pair_gradients<true>(problem, begin, end, sums, weight_gradient, bias_gradient);
  } else {
    run_pair_gradients<false>(problem, begin, end, sums, weight_gradient, bias_gradient);
  }
}
