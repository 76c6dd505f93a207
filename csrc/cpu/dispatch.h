// From a problem's dtype, target and gradients to the instance of the kernels that is made for
// them. Included like simd.h: inside each instruction set's namespace.

// Chunks [begin, end) of `size` units; the runner's scratch serves them all.
struct Chunks {
  int64_t begin, end, size;
};

template <typename Runner>
void run_chunks(const Problem& problem, const Chunks& chunks, Sums* sums) {
  Runner runner(problem);
  const int64_t units = count_units(problem);
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const int64_t first = chunk * chunks.size;
    const int64_t last = first + chunks.size < units ? first + chunks.size : units;
    runner.run(first, last, sums + chunk * problem.heads);
  }
}

template <DType D, bool Dense, int Gradients>
void run_gradients(const Problem& problem, const Chunks& chunks, Sums* sums) {
  if (long_rows(problem)) {
    run_chunks<RowRunner<D, Dense, Gradients>>(problem, chunks, sums);
  } else {
    run_chunks<SiteRunner<D, Dense, Gradients>>(problem, chunks, sums);
  }
}

template <DType D, bool Dense>
void run_target(const Problem& problem, const Chunks& chunks, Sums* sums) {
  if (problem.gradient == nullptr) {
    run_gradients<D, Dense, 0>(problem, chunks, sums);
  } else if (problem.head_gradient == nullptr) {
    run_gradients<D, Dense, 1>(problem, chunks, sums);
  } else {
    run_gradients<D, Dense, 2>(problem, chunks, sums);
  }
}

template <DType D>
void run_dtype(const Problem& problem, const Chunks& chunks, Sums* sums) {
  if (problem.probabilities != nullptr || problem.label_smoothing > 0.0) {
    run_target<D, true>(problem, chunks, sums);
  } else {
    run_target<D, false>(problem, chunks, sums);
  }
}

void run_problem(const Problem& problem, int64_t begin, int64_t end, int64_t chunk, Sums* sums) {
  const Chunks chunks{begin, end, chunk};
  switch (problem.dtype) {
    case DType::kFloat32:
      return run_dtype<DType::kFloat32>(problem, chunks, sums);
    case DType::kFloat64:
      return run_dtype<DType::kFloat64>(problem, chunks, sums);
    case DType::kFloat16:
      return run_dtype<DType::kFloat16>(problem, chunks, sums);
    case DType::kBFloat16:
      return run_dtype<DType::kBFloat16>(problem, chunks, sums);
  }
}
