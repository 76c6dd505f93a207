// One instruction set's kernels: walks the units of a problem, brings each to the site or the row kernel.
// Included inside each instruction set's namespace, after simd.h, storage.h, site_kernel.h, row_kernel.h.

constexpr int64_t kLargestSiteClasses = 64;  // above, contiguous classes go row by row

template <typename T>
constexpr int lanes() {
  return kVectorBytes > 0 ? kVectorBytes / static_cast<int>(sizeof(T)) : 1;
}
constexpr int kUnrolledVectors = 2;  // two independent chains of exp keep the pipelines full

template <typename T>
constexpr int block_sites() {
  return kUnrolledVectors * lanes<T>();
}

inline bool long_rows(const Problem& problem) {
  return problem.channels_last && problem.classes > kLargestSiteClasses;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t count_units(const Problem& problem) {
  const int64_t block =
      problem.dtype == DType::kFloat64 ? block_sites<double>() : block_sites<float>();
  const int64_t sites = problem.rows * problem.heads * problem.positions;
  if (long_rows(problem)) {
    return sites;
  }
  if (problem.channels_last) {
    return divide_up(sites, block);
  }
  return problem.rows * problem.heads * divide_up(problem.positions, block);
}

// Where one site stands: the head it belongs to, its places in target and upstream.
struct SitePlace {
  int64_t head;
  int64_t target;    // in [rows, heads, positions]
  int64_t upstream;  // in [rows, positions]
};

// Sites in the order of channels_last memory, [rows, positions, heads].
LNL_INLINE SitePlace place_of_row(const Problem& problem, int64_t row) {
  if (problem.heads == 1) {
    return {0, row, row};
  }
  const int64_t head = row % problem.heads;
  const int64_t site = row / problem.heads;
  const int64_t n = site / problem.positions;
  const int64_t s = site % problem.positions;
  return {head, (n * problem.heads + head) * problem.positions + s, site};
}

template <typename T>
ClassTerms<T> class_terms(const Problem& problem) {
  ClassTerms<T> terms;
  terms.classes = problem.classes;
  terms.weight = static_cast<const T*>(problem.weight);
  terms.keep = static_cast<T>(1.0 - problem.label_smoothing);
  terms.spread = static_cast<T>(problem.label_smoothing / static_cast<double>(problem.classes));
  terms.sign = static_cast<T>(problem.coefficients.cross_entropy);
  terms.entropy = static_cast<T>(problem.coefficients.entropy);
  terms.confusion = static_cast<T>(problem.coefficients.confusion);
  terms.has_confusion = problem.coefficients.has_confusion;
  return terms;
}

// What one site brings to the kernels besides its logits.
template <typename T>
struct SiteTerms {
  int64_t target;
  T weight, counted, entropy_counted, scale, entropy_scale;
};

template <typename T>
LNL_INLINE SiteTerms<T> site_terms(const Problem& problem, const SitePlace& place) {
  SiteTerms<T> site;
  site.target = -1;
  bool counted = true;
  site.weight = T(1);
  if (problem.target != nullptr) {
    const int64_t target = problem.target[place.target];
    counted = target != problem.ignore_index;
    if (counted) {
      site.target = target;
      site.weight = problem.weight != nullptr ? static_cast<const T*>(problem.weight)[target] : T(1);
    } else {
      site.weight = T(0);
    }
  }
  const bool entropy_counted = counted || !problem.mask_entropy;
  site.counted = counted ? T(1) : T(0);
  site.entropy_counted = entropy_counted ? T(1) : T(0);
  double upstream = 1.0;
  if (problem.upstream != nullptr) {
    upstream = static_cast<double>(
        static_cast<const T*>(problem.upstream)[problem.upstream_per_site ? place.upstream : 0]);
  }
  const double* const inverse = problem.inverse_denominators + 2 * place.head;
  site.scale = counted ? static_cast<T>(upstream * inverse[0]) : T(0);
  site.entropy_scale = entropy_counted ? static_cast<T>(upstream * inverse[1]) : T(0);
  return site;
}

template <typename T>
void write_site(const Problem& problem, int64_t place, double cross_entropy, double entropy,
                double confusion) {
  if (problem.site_cross_entropy == nullptr) {
    return;
  }
  static_cast<T*>(problem.site_cross_entropy)[place] = static_cast<T>(cross_entropy);
  static_cast<T*>(problem.site_entropy)[place] = static_cast<T>(entropy);
  if (problem.site_confusion != nullptr) {
    static_cast<T*>(problem.site_confusion)[place] = static_cast<T>(confusion);
  }
}

// Scratch of one thread, grown once per call.
template <typename T>
struct Scratch {
  explicit Scratch(int64_t values) : logits(values), probabilities(values), gradient(values),
                                     head_gradient(values), rows(values) {}
  std::vector<T> logits, probabilities, gradient, head_gradient, rows;
};

// ---- few classes ---------------------------------------------------------------------------------------

template <DType D, bool Dense, int Gradients>
struct SiteRunner {
  using T = typename Storage<D>::compute;
  using S = typename Storage<D>::type;
  static constexpr int N = lanes<T>();
  static constexpr int B = block_sites<T>();
  static constexpr bool kDirect = sizeof(S) == sizeof(T);  // memory holds what the kernel computes in

  const Problem& problem;
  const ClassTerms<T> terms = class_terms<T>(problem);
  Scratch<T> scratch{problem.classes * B};
  SiteBlock<T, B> block{};
  Vec<T, N> pending[3] = {};
  int pending_blocks = 0;
  static constexpr int kPendingBlocks = 16;

  explicit SiteRunner(const Problem& p) : problem(p) {
    for (int lane = 0; lane < B; ++lane) {
      block.target[lane] = -1;  // no class is hit where probabilities are given
    }
  }

  void set_lane(int lane, const SiteTerms<T>& site) {
    block.target[lane] = static_cast<typename Float<T>::Int>(site.target);
    block.weight[lane] = site.weight;
    block.counted[lane] = site.counted;
    block.entropy_counted[lane] = site.entropy_counted;
    block.scale[lane] = site.scale;
    block.entropy_scale[lane] = site.entropy_scale;
  }

  // `count` neighbouring sites of one head, whose targets and upstream factors are neighbours too.
  void set_lanes(int64_t head, int64_t target_index, int64_t upstream_index, int count) {
    using V = Vec<T, N>;
    const bool has_classes = problem.target != nullptr;
    if (has_classes) {
      const int64_t* const target = problem.target + target_index;
      if (count == B) {  // a constant, so that the loop becomes vector instructions
        read_targets(target, B);
      } else {
        read_targets(target, count);
      }
    }
    const double* const inverse = problem.inverse_denominators + 2 * head;
    const bool per_site = problem.upstream != nullptr && problem.upstream_per_site;
    const T* const upstream = static_cast<const T*>(problem.upstream) + (per_site ? upstream_index : 0);
    const double common = problem.upstream == nullptr || per_site ? 1.0 : static_cast<double>(*upstream);
    const V scale = V::fill(static_cast<T>(common * inverse[0]));
    const V entropy_scale = V::fill(static_cast<T>(common * inverse[1]));
    const V zero = V::fill(T(0));
    const V one = V::fill(T(1));
    for (int first = 0; first < B; first += N) {
      typename V::Bits target;
      memcpy(&target, block.target + first, sizeof(target));
      const auto ignored =
          (typename V::Mask)(target == static_cast<typename Float<T>::Int>(has_classes ? -1 : -2));
      const auto entropy_ignored =
          (typename V::Mask)(target == static_cast<typename Float<T>::Int>(
                                           has_classes && problem.mask_entropy ? -1 : -2));
      const V counted = select<T, N>(ignored, zero, one);
      counted.store(block.counted + first);
      counted.store(block.weight + first);
      select<T, N>(entropy_ignored, zero, one).store(block.entropy_counted + first);
      select<T, N>(ignored, zero, scale).store(block.scale + first);
      select<T, N>(entropy_ignored, zero, entropy_scale).store(block.entropy_scale + first);
    }
    if (problem.weight != nullptr && has_classes) {
      for (int lane = 0; lane < count; ++lane) {
        block.weight[lane] = block.target[lane] >= 0 ? terms.weight[block.target[lane]] : T(0);
      }
    }
    if (per_site) {
      for (int lane = 0; lane < count; ++lane) {
        block.scale[lane] *= upstream[lane];
        block.entropy_scale[lane] *= upstream[lane];
      }
    }
  }

  LNL_INLINE void read_targets(const int64_t* target, int count) {
    const int64_t ignore_index = problem.ignore_index;
    for (int lane = 0; lane < count; ++lane) {
      block.target[lane] =
          static_cast<typename Float<T>::Int>(target[lane] == ignore_index ? -1 : target[lane]);
    }
  }

  void use_scratch() {
    block.logits = scratch.logits.data();
    block.gradient = scratch.gradient.data();
    block.head_gradient = scratch.head_gradient.data();
    block.logits_stride = block.gradient_stride = block.head_gradient_stride = B;
  }

  void add(Sums* sums, const SitePlace* places, int count) {
    for (int lane = 0; lane < count; ++lane) {
      Sums& head = sums[places[lane].head];
      head.cross_entropy += block.cross_entropy[lane];
      head.entropy += block.entropy[lane];
      head.confusion += block.confusion[lane];
    }
  }

  // A whole block of one head goes to the lanes' sums first, and from there to the head's in double before
  // rounding can grow.
  void add_block(Sums& sums) {
    using V = Vec<T, N>;
    for (int u = 0; u < kUnrolledVectors; ++u) {
      pending[0] = pending[0] + V::load(block.cross_entropy + u * N);
      pending[1] = pending[1] + V::load(block.entropy + u * N);
      pending[2] = pending[2] + V::load(block.confusion + u * N);
    }
    if (++pending_blocks == kPendingBlocks) {
      flush(sums);
    }
  }

  void flush(Sums& sums) {
    sums.cross_entropy += horizontal_sum<T, N>(pending[0]);
    sums.entropy += horizontal_sum<T, N>(pending[1]);
    sums.confusion += horizontal_sum<T, N>(pending[2]);
    pending[0] = pending[1] = pending[2] = Vec<T, N>{};
    pending_blocks = 0;
  }

  void compute(int count) {
    for (int lane = count; lane < B; ++lane) {
      set_lane(lane, SiteTerms<T>{-1, T(0), T(0), T(0), T(0), T(0)});
    }
    site_block<T, N, kUnrolledVectors, Dense, Gradients>(block, terms);
  }

  void run(int64_t begin, int64_t end, Sums* sums) {
    if (problem.channels_last) {
      run_rows(begin, end, sums);
    } else {
      run_planes(begin, end, sums);
    }
  }

  // [rows, heads, classes, positions]: lanes are neighbouring positions.
  void run_planes(int64_t begin, int64_t end, Sums* sums) {
    const int64_t positions = problem.positions;
    const int64_t blocks = divide_up(positions, B);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t plane = unit / blocks;
      const int64_t first = (unit % blocks) * B;
      const int count = static_cast<int>(first + B <= positions ? B : positions - first);
      const int64_t head = plane % problem.heads;
      const int64_t row = plane / problem.heads;
      set_lanes(head, plane * positions + first, row * positions + first, count);
      const int64_t offset = plane * problem.classes * positions + first;
      const S* const logits = static_cast<const S*>(problem.logits) + offset;
      S* const gradient = static_cast<S*>(problem.gradient) + (Gradients > 0 ? offset : 0);
      S* const head_gradient = static_cast<S*>(problem.head_gradient) + (Gradients > 1 ? offset : 0);
      use_scratch();
      const bool direct = kDirect && count == B;
      if constexpr (kDirect) {
        if (direct) {
          block.logits = logits;
          block.gradient = gradient;
          block.head_gradient = head_gradient;
          block.logits_stride = block.gradient_stride = block.head_gradient_stride = positions;
        }
      }
      if (!direct) {
        read_plane<D>(logits, positions, count, scratch.logits.data());
      }
      read_probabilities_plane(offset, count);
      compute(count);
      if (!direct) {
        write_plane(block.gradient, gradient, positions, count, Gradients > 0);
        write_plane(block.head_gradient, head_gradient, positions, count, Gradients > 1);
      }
      if (problem.site_cross_entropy != nullptr) {
        for (int lane = 0; lane < count; ++lane) {
          write_site<T>(problem, plane * positions + first + lane, block.cross_entropy[lane],
                        block.entropy[lane], block.confusion[lane]);
        }
      }
      add_block(sums[head]);
      if (problem.heads > 1 && unit % blocks == blocks - 1) {
        flush(sums[head]);  // the next plane is another head's
      }
      if (unit + 1 == end) {
        flush(sums[head]);
      }
    }
  }

  template <DType From>
  void read_plane(const typename Storage<From>::type* from, int64_t stride, int count, T* tile) {
    for (int64_t c = 0; c < problem.classes; ++c) {  // lanes beyond count keep what they held: nobody reads them
      read_values<From>(from + c * stride, count, tile + c * B);
    }
  }

  void write_plane(const T* tile, S* to, int64_t stride, int count, bool wanted) {
    if (wanted) {
      for (int64_t c = 0; c < problem.classes; ++c) {
        write_values<D>(tile + c * B, count, to + c * stride);
      }
    }
  }

  void read_probabilities_plane(int64_t offset, int count) {
    block.probabilities = nullptr;
    if constexpr (Dense) {
      if (problem.probabilities == nullptr) {
        return;
      }
      if (problem.probabilities_accumulate) {
        constexpr DType kCompute = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
        read_plane<kCompute>(static_cast<const T*>(problem.probabilities) + offset, problem.positions,
                             count, scratch.probabilities.data());
      } else {
        read_plane<D>(static_cast<const S*>(problem.probabilities) + offset, problem.positions, count,
                      scratch.probabilities.data());
      }
      block.probabilities = scratch.probabilities.data();
      block.probabilities_stride = B;
    }
  }

  // [sites, classes]: lanes are neighbouring rows, transposed into a tile and back.
  void run_rows(int64_t begin, int64_t end, Sums* sums) {
    const int64_t sites = problem.rows * problem.heads * problem.positions;
    const int64_t classes = problem.classes;
    SitePlace places[B];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * B;
      const int count = static_cast<int>(first + B <= sites ? B : sites - first);
      if (problem.heads == 1) {
        set_lanes(0, first, first, count);
      } else {
        for (int lane = 0; lane < count; ++lane) {
          places[lane] = place_of_row(problem, first + lane);
          set_lane(lane, site_terms<T>(problem, places[lane]));
        }
      }
      const int64_t offset = first * classes;
      use_scratch();
      read_rows<D>(static_cast<const S*>(problem.logits) + offset, count, scratch.logits.data());
      block.probabilities = nullptr;
      if constexpr (Dense) {
        if (problem.probabilities != nullptr) {
          if (problem.probabilities_accumulate) {
            constexpr DType kCompute = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
            read_rows<kCompute>(static_cast<const T*>(problem.probabilities) + offset, count,
                                scratch.probabilities.data());
          } else {
            read_rows<D>(static_cast<const S*>(problem.probabilities) + offset, count,
                         scratch.probabilities.data());
          }
          block.probabilities = scratch.probabilities.data();
          block.probabilities_stride = B;
        }
      }
      compute(count);
      if constexpr (Gradients > 0) {
        write_rows(scratch.gradient.data(), count, static_cast<S*>(problem.gradient) + offset);
      }
      if constexpr (Gradients > 1) {
        write_rows(scratch.head_gradient.data(), count,
                   static_cast<S*>(problem.head_gradient) + offset);
      }
      if (problem.site_cross_entropy != nullptr) {
        for (int lane = 0; lane < count; ++lane) {
          const int64_t place = problem.heads == 1 ? first + lane : places[lane].target;
          write_site<T>(problem, place, block.cross_entropy[lane], block.entropy[lane],
                        block.confusion[lane]);
        }
      }
      if (problem.heads == 1) {
        add_block(sums[0]);
      } else {
        add(sums, places, count);
      }
    }
    flush(sums[0]);
  }

  template <DType From>
  void read_rows(const typename Storage<From>::type* from, int count, T* tile) {
    const int64_t classes = problem.classes;
    const T* rows;
    if constexpr (sizeof(typename Storage<From>::type) == sizeof(T)) {
      rows = from;
    } else {
      read_values<From>(from, count * classes, scratch.rows.data());
      rows = scratch.rows.data();
    }
    if (classes >= N && count == B) {
      rows_to_tile<T, N, B>(rows, classes, tile);
    } else {
      some_rows_to_tile<T, B>(rows, classes, count, tile);
    }
  }

  void write_rows(const T* tile, int count, S* to) {
    const int64_t classes = problem.classes;
    T* rows;
    if constexpr (kDirect) {
      rows = to;
    } else {
      rows = scratch.rows.data();
    }
    if (classes >= N && count == B) {
      tile_to_rows<T, N, B>(tile, classes, rows);
    } else {
      tile_to_some_rows<T, B>(tile, classes, count, rows);
    }
    if constexpr (!kDirect) {
      write_values<D>(rows, count * classes, to);
    }
  }
};

// ---- many classes --------------------------------------------------------------------------------------

template <DType D, bool Dense, int Gradients>
struct RowRunner {
  using T = typename Storage<D>::compute;
  using S = typename Storage<D>::type;
  static constexpr bool kDirect = sizeof(S) == sizeof(T);

  const Problem& problem;
  const ClassTerms<T> terms = class_terms<T>(problem);
  Scratch<T> scratch{kDirect ? 0 : problem.classes};

  explicit RowRunner(const Problem& p) : problem(p) {}

  void run(int64_t begin, int64_t end, Sums* sums) {
    for (int64_t index = begin; index < end; ++index) {
      run_row(index, sums);
    }
  }

  void run_row(int64_t index, Sums* sums) {
    const int64_t classes = problem.classes;
    const int64_t offset = index * classes;
    const SitePlace place = place_of_row(problem, index);
    const SiteTerms<T> site = site_terms<T>(problem, place);
    const S* const logits = static_cast<const S*>(problem.logits) + offset;
    S* const gradient = static_cast<S*>(problem.gradient) + (Gradients > 0 ? offset : 0);
    S* const head_gradient = static_cast<S*>(problem.head_gradient) + (Gradients > 1 ? offset : 0);
    Row<T> row{};
    row.target = site.target;
    row.counted = site.counted;
    row.scale = site.scale;
    row.entropy_scale = site.entropy_scale;
    if constexpr (kDirect) {
      row.logits = logits;
      row.gradient = gradient;
      row.head_gradient = head_gradient;
    } else {
      read_values<D>(logits, classes, scratch.logits.data());
      row.logits = scratch.logits.data();
      row.gradient = scratch.gradient.data();
      row.head_gradient = scratch.head_gradient.data();
    }
    if (Dense && problem.probabilities != nullptr) {
      if (kDirect || problem.probabilities_accumulate) {
        row.probabilities = static_cast<const T*>(problem.probabilities) + offset;
      } else {
        read_values<D>(static_cast<const S*>(problem.probabilities) + offset, classes,
                       scratch.probabilities.data());
        row.probabilities = scratch.probabilities.data();
      }
    }
    RowResult result = row_block<T, lanes<T>(), Dense, Gradients>(row, terms);
    if (site.entropy_counted == T(0)) {
      result.entropy = result.confusion = 0.0;
    }
    if constexpr (!kDirect && Gradients > 0) {
      write_values<D>(row.gradient, classes, gradient);
    }
    if constexpr (!kDirect && Gradients > 1) {
      write_values<D>(row.head_gradient, classes, head_gradient);
    }
    write_site<T>(problem, place.target, result.cross_entropy, result.entropy, result.confusion);
    sums[place.head].cross_entropy += result.cross_entropy;
    sums[place.head].entropy += result.entropy;
    sums[place.head].confusion += result.confusion;
  }
};

// ---- dispatch ------------------------------------------------------------------------------------------

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

TargetCount count_targets(const int64_t* target, int64_t count, int64_t ignore_index, int64_t classes,
                          const void* weight, bool weight_is_double) {
  TargetCount result;
  int64_t outside = 0;
  int64_t counted = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t is_counted = target[i] != ignore_index;
    const int64_t in_range = (target[i] >= 0) & (target[i] < classes);
    counted += is_counted;
    outside |= is_counted & (in_range ^ 1);
  }
  result.counted = counted;
  result.in_range = outside == 0;
  result.weight = static_cast<double>(counted);
  if (weight != nullptr && result.in_range) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      if (target[i] != ignore_index) {
        sum += weight_is_double ? static_cast<const double*>(weight)[target[i]]
                                : static_cast<double>(static_cast<const float*>(weight)[target[i]]);
      }
    }
    result.weight = sum;
  }
  return result;
}

template <DType D>
void scale_values(void* gradient, int64_t begin, int64_t end, double factor) {
  using T = typename Storage<D>::compute;
  constexpr int64_t kChunk = 512;
  T chunk[kChunk];
  auto* const values = static_cast<typename Storage<D>::type*>(gradient);
  const T multiplier = static_cast<T>(factor);
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t count = i + kChunk < end ? kChunk : end - i;
    read_values<D>(values + i, count, chunk);
    for (int64_t j = 0; j < count; ++j) {
      chunk[j] *= multiplier;
    }
    write_values<D>(chunk, count, values + i);
  }
}

void scale_units(void* gradient, int64_t begin, int64_t end, DType dtype, double factor) {
  switch (dtype) {
    case DType::kFloat32:
      return scale_values<DType::kFloat32>(gradient, begin, end, factor);
    case DType::kFloat64:
      return scale_values<DType::kFloat64>(gradient, begin, end, factor);
    case DType::kFloat16:
      return scale_values<DType::kFloat16>(gradient, begin, end, factor);
    case DType::kBFloat16:
      return scale_values<DType::kBFloat16>(gradient, begin, end, factor);
  }
}
