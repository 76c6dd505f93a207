// A linear layer with few outputs, block of rows by block: the logits, the loss's own site kernel
// and both products of its gradients while the features are in cache, so that the features are read
// once and their gradient is written once. Included like simd.h: inside each instruction set's
// namespace.

constexpr int64_t kLinearBlockValues = 65536;  // of the features
constexpr int64_t kLinearBlockRows = 64;

// Whole blocks of the site kernel.
template <typename T>
int64_t linear_block_rows(int64_t width) {
  constexpr int64_t B = block_sites<T>();
  const int64_t most = kLinearBlockRows / B > 0 ? kLinearBlockRows / B : 1;
  const int64_t fitting = kLinearBlockValues / (B * (width > 0 ? width : 1));
  return B * (fitting < 1 ? 1 : fitting < most ? fitting : most);
}

template <DType D, bool Dense, int Gradients>
struct LinearRunner {
  using T = typename Storage<D>::compute;
  using S = typename Storage<D>::type;
  static constexpr int N = lanes<T>();
  static constexpr DType kCompute = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

  const LinearProblem& problem;
  const int64_t outputs = problem.loss.heads * problem.loss.classes;
  const int64_t width = problem.width;
  const int64_t stride = problem.padded_width;
  const bool direct = sizeof(S) == sizeof(T) && width == stride;  // X and dX as they are in memory
  const int64_t block_rows = linear_block_rows<T>(width);
  std::vector<T> values = std::vector<T>(direct ? 0 : block_rows * stride);
  std::vector<T> row = std::vector<T>(direct ? 0 : kTileRows * stride);
  std::vector<T> logits = std::vector<T>(block_rows * outputs);
  std::vector<T> gradient = std::vector<T>(Gradients > 0 ? block_rows * outputs : 0);
  std::vector<T> head_gradient = std::vector<T>(Gradients > 1 ? block_rows * outputs : 0);
  Problem loss = problem.loss;  // of one block
  SiteRunner<kCompute, Dense, Gradients> sites{loss};

  explicit LinearRunner(const LinearProblem& p) : problem(p) {
    loss.dtype = kCompute;
    loss.logits = logits.data();
    loss.gradient = gradient.data();
    loss.head_gradient = head_gradient.data();
  }

  void run(int64_t begin, int64_t end, Sums* sums, T* weight_gradient, T* bias_gradient) {
    for (int64_t first = begin; first < end; first += block_rows) {
      run_block(first, first + block_rows < end ? block_rows : end - first, sums, weight_gradient,
                bias_gradient);
    }
  }

  void run_block(int64_t first, int64_t rows, Sums* sums, T* weight_gradient, T* bias_gradient) {
    const T* x;
    if (direct) {
      x = static_cast<const T*>(problem.features) + first * width;
    } else {
      const S* const from = static_cast<const S*>(problem.features) + first * width;
      for (int64_t r = 0; r < rows; ++r) {  // what is beyond the width stays 0
        read_values<D>(from + r * width, width, values.data() + r * stride);
      }
      x = values.data();
    }
    block_logits<T, N>(x, stride, rows, static_cast<const T*>(problem.head_weight), stride,
                       static_cast<const T*>(problem.head_bias), outputs, logits.data());
    place_rows(problem.loss, first, rows, sizeof(T), loss);
    sites.run(0, count_units(loss), sums);
    if constexpr (Gradients > 0) {
      if (problem.features_gradient != nullptr) {
        write_features_gradient(first, rows);
      }
      if (problem.head_gradient) {
        const T* const g = Gradients > 1 ? head_gradient.data() : gradient.data();
        block_weight_gradient<T, N>(g, outputs, x, stride, rows, weight_gradient, stride);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < outputs; ++c) {
            bias_gradient[c] += g[r * outputs + c];
          }
        }
      }
    }
  }

  void write_features_gradient(int64_t first, int64_t rows) {
    const T* const w = static_cast<const T*>(problem.head_weight);
    S* const out = static_cast<S*>(problem.features_gradient) + first * width;
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) {
      write_rows<kTileRows>(gradient.data() + r * outputs, w, out + r * width);
    }
    for (; r < rows; ++r) {
      write_rows<1>(gradient.data() + r * outputs, w, out + r * width);
    }
  }

  template <int R>
  void write_rows(const T* g, const T* w, S* out) {
    if constexpr (sizeof(S) == sizeof(T)) {
      if (direct) {
        return features_rows<T, N, R>(g, outputs, w, stride, out, width);
      }
    }
    features_rows<T, N, R>(g, outputs, w, stride, row.data(), stride);
    for (int r = 0; r < R; ++r) {
      write_values<D>(row.data() + r * stride, width, out + r * width);
    }
  }
};

template <DType D, bool Dense, int Gradients>
void run_linear_rows(const LinearProblem& problem, int64_t begin, int64_t end, Sums* sums,
                     void* weight_gradient, void* bias_gradient) {
  using T = typename Storage<D>::compute;
  LinearRunner<D, Dense, Gradients> runner(problem);
  runner.run(begin, end, sums, static_cast<T*>(weight_gradient), static_cast<T*>(bias_gradient));
}

template <DType D, bool Dense>
void run_linear_gradients(const LinearProblem& problem, int64_t begin, int64_t end, Sums* sums,
                          void* weight_gradient, void* bias_gradient) {
  if (problem.two_gradients) {
    run_linear_rows<D, Dense, 2>(problem, begin, end, sums, weight_gradient, bias_gradient);
  } else if (problem.features_gradient != nullptr || problem.head_gradient) {
    run_linear_rows<D, Dense, 1>(problem, begin, end, sums, weight_gradient, bias_gradient);
  } else {
    run_linear_rows<D, Dense, 0>(problem, begin, end, sums, weight_gradient, bias_gradient);
  }
}

template <DType D>
void run_linear_dtype(const LinearProblem& problem, int64_t begin, int64_t end, Sums* sums,
                      void* weight_gradient, void* bias_gradient) {
  if (problem.loss.probabilities != nullptr || problem.loss.label_smoothing > 0.0) {
    run_linear_gradients<D, true>(problem, begin, end, sums, weight_gradient, bias_gradient);
  } else {
    run_linear_gradients<D, false>(problem, begin, end, sums, weight_gradient, bias_gradient);
  }
}

void run_linear(const LinearProblem& problem, int64_t begin, int64_t end, Sums* sums,
                void* weight_gradient, void* bias_gradient) {
  switch (problem.dtype) {
    case DType::kFloat32:
      return run_linear_dtype<DType::kFloat32>(problem, begin, end, sums, weight_gradient,
                                               bias_gradient);
    case DType::kFloat64:
      return run_linear_dtype<DType::kFloat64>(problem, begin, end, sums, weight_gradient,
                                               bias_gradient);
    case DType::kFloat16:
      return run_linear_dtype<DType::kFloat16>(problem, begin, end, sums, weight_gradient,
                                               bias_gradient);
    case DType::kBFloat16:
      return run_linear_dtype<DType::kBFloat16>(problem, begin, end, sums, weight_gradient,
                                                bias_gradient);
  }
}
