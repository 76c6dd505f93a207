// Brings rows of many classes from memory to the row kernel and back.
// Included like simd.h: inside each instruction set's namespace.

template <DType D, bool Dense, int Gradients>
struct RowRunner {
  using T = typename Storage<D>::compute;
  using S = typename Storage<D>::type;
  static constexpr bool kDirect = sizeof(S) == sizeof(T);

  const Problem& problem;
  const ClassTerms<T> terms = class_terms<T>(problem);
  // The kernel reads the logits after it has begun to write the gradient.
  const bool in_place = Gradients > 0 && problem.gradient == problem.logits;
  Scratch<T> scratch{kDirect && !in_place ? 0 : problem.classes};

  explicit RowRunner(const Problem& p) : problem(p) {}

  void run(int64_t begin, int64_t end, Sums* sums) {
    SiteCursor cursor(problem, begin);
    for (int64_t index = begin; index < end; ++index, cursor.advance()) {
      run_row(index, cursor.place(), sums);
    }
  }

  void run_row(int64_t index, const SitePlace& place, Sums* sums) {
    const int64_t classes = problem.classes;
    const int64_t offset = index * classes;
    const SiteTerms<T> site = site_terms<T>(problem, place);
    const S* const logits = static_cast<const S*>(problem.logits) + offset;
    S* const gradient = static_cast<S*>(problem.gradient) + (Gradients > 0 ? offset : 0);
    S* const head_gradient = static_cast<S*>(problem.head_gradient) + (Gradients > 1 ? offset : 0);
    Row<T> row{};
    row.target = site.target;
    row.counted = site.counted;
    row.entropy_counted = site.entropy_counted;
    row.scale = site.scale;
    row.entropy_scale = site.entropy_scale;
    if constexpr (kDirect) {
      row.logits = logits;
      row.next_logits = logits + classes;
      if (in_place) {
        memcpy(scratch.logits.data(), logits, classes * sizeof(T));
        row.logits = scratch.logits.data();
      }
      row.gradient = gradient;
      row.head_gradient = head_gradient;
    } else {
      read_values<D>(logits, classes, scratch.logits.data());
      row.logits = row.next_logits = scratch.logits.data();
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
