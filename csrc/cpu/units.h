// How a problem is cut into units of work, and what one site brings to the kernels besides its
// logits. Included like simd.h: inside each instruction set's namespace.

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

[[maybe_unused]] int64_t count_units(const Problem& problem) {
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

// Walks the sites in the order of channels_last memory, [rows, positions, heads]: divides once.
class SiteCursor {
 public:
  SiteCursor(const Problem& problem, int64_t site)
      : heads_(problem.heads), positions_(problem.positions) {
    place_.head = site % heads_;
    place_.upstream = site / heads_;
    position_ = place_.upstream % positions_;
    const int64_t row = place_.upstream / positions_;
    place_.target = (row * heads_ + place_.head) * positions_ + position_;
  }

  const SitePlace& place() const { return place_; }

  void advance() {
    place_.target += positions_;
    if (++place_.head < heads_) {
      return;
    }
    // The first head of the next position; past the last one that of the next row.
    place_.head = 0;
    ++place_.upstream;
    place_.target += 1 - heads_ * positions_;
    if (++position_ == positions_) {
      position_ = 0;
      place_.target += (heads_ - 1) * positions_;
    }
  }

 private:
  int64_t heads_;
  int64_t positions_;
  int64_t position_;
  SitePlace place_;
};

template <typename T>
ClassTerms<T> class_terms(const Problem& problem) {
  ClassTerms<T> terms;
  terms.classes = problem.classes;
  terms.weight = static_cast<const T*>(problem.weight);
  terms.keep = static_cast<T>(1.0 - problem.label_smoothing);
  terms.spread = static_cast<T>(problem.label_smoothing / static_cast<double>(problem.classes));
  double weights = static_cast<double>(problem.classes);
  if (terms.weight != nullptr) {
    weights = 0.0;
    for (int64_t c = 0; c < problem.classes; ++c) {
      weights += static_cast<double>(terms.weight[c]);
    }
  }
  terms.spread_sum =
      static_cast<T>(problem.label_smoothing / static_cast<double>(problem.classes) * weights);
  terms.sign = static_cast<T>(problem.coefficients.cross_entropy);
  terms.entropy = static_cast<T>(problem.coefficients.entropy);
  terms.confusion = static_cast<T>(problem.coefficients.confusion);
  terms.has_confusion = problem.coefficients.has_confusion;
  terms.regularised = problem.coefficients.entropy != 0.0 || problem.coefficients.confusion != 0.0;
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
      site.weight =
          problem.weight != nullptr ? static_cast<const T*>(problem.weight)[target] : T(1);
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

// Scratch of one thread, grown once per call. It begins at a cache line.
template <typename T>
class AlignedValues {
 public:
  explicit AlignedValues(int64_t count)
      : lines_((count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line)) {}
  T* data() { return reinterpret_cast<T*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  std::vector<Line> lines_;
};

template <typename T>
struct Scratch {
  explicit Scratch(int64_t values)
      : logits(values),
        probabilities(values),
        gradient(values),
        head_gradient(values),
        exponentials(values),
        rows(values) {}
  AlignedValues<T> logits, probabilities, gradient, head_gradient, exponentials, rows;
};
