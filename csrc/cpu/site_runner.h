// Brings blocks of sites from memory to the site kernel and back.
// Included like simd.h: inside each instruction set's namespace.

template <DType D, bool Dense, int Gradients>
struct SiteRunner {
  using T = typename Storage<D>::compute;
  using S = typename Storage<D>::type;
  static constexpr int N = lanes<T>();
  static constexpr int B = block_sites<T>();
  static constexpr bool kDirect =
      sizeof(S) == sizeof(T);  // memory holds what the kernel computes in

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
    const T* const upstream =
        static_cast<const T*>(problem.upstream) + (per_site ? upstream_index : 0);
    const double common =
        problem.upstream == nullptr || per_site ? 1.0 : static_cast<double>(*upstream);
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
    block.logits = block.next_logits = scratch.logits.data();
    block.exponentials = scratch.exponentials.data();
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

  // A whole block of one head goes to the lanes' sums first, and from there to the head's in double
  // before rounding can grow.
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
    const int64_t blocks = divide_up(problem.positions, B);
    for (int64_t unit = begin; unit < end;) {
      const int64_t first = unit % blocks;
      const int64_t last = blocks - first < end - unit ? blocks : first + end - unit;
      run_plane(unit / blocks, first, last, sums);
      unit += last - first;
    }
  }

  // Blocks [begin, end) of one row and head. The last of a plane is whole, too, where it can reach
  // back into the block before, which this thread has computed: the same again, counted once.
  void run_plane(int64_t plane, int64_t begin, int64_t end, Sums* sums) {
    const int64_t positions = problem.positions;
    const int64_t head = plane % problem.heads;
    const int64_t row = plane / problem.heads;
    for (int64_t number = begin; number < end; ++number) {
      const int64_t next = number * B;
      const bool last = next + B >= positions;
      const int64_t first = last && number > begin ? positions - B : next;
      const int count = static_cast<int>(first + B <= positions ? B : positions - first);
      set_lanes(head, plane * positions + first, row * positions + first, count);
      const int64_t offset = plane * problem.classes * positions + first;
      const S* const logits = static_cast<const S*>(problem.logits) + offset;
      S* const gradient = static_cast<S*>(problem.gradient) + (Gradients > 0 ? offset : 0);
      S* const head_gradient =
          static_cast<S*>(problem.head_gradient) + (Gradients > 1 ? offset : 0);
      use_scratch();
      const bool direct = kDirect && count == B;
      if constexpr (kDirect) {
        if (direct) {
          block.logits = logits;
          block.next_logits = last ? logits - first + problem.classes * positions : logits + B;
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
      for (int64_t lane = 0; lane < next - first; ++lane) {
        block.cross_entropy[lane] = block.entropy[lane] = block.confusion[lane] = T(0);
      }
      add_block(sums[head]);
    }
    flush(sums[head]);  // the next plane may be another head's
  }

  template <DType From>
  void read_plane(const typename Storage<From>::type* from, int64_t stride, int count, T* tile) {
    for (int64_t c = 0; c < problem.classes;
         ++c) {  // lanes beyond count keep what they held: nobody reads them
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
        read_plane<kCompute>(static_cast<const T*>(problem.probabilities) + offset,
                             problem.positions, count, scratch.probabilities.data());
      } else {
        read_plane<D>(static_cast<const S*>(problem.probabilities) + offset, problem.positions,
                      count, scratch.probabilities.data());
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
    SiteCursor cursor(problem, begin * B);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * B;
      const int count = static_cast<int>(first + B <= sites ? B : sites - first);
      if (problem.heads == 1) {
        set_lanes(0, first, first, count);
      } else {
        for (int lane = 0; lane < count; ++lane, cursor.advance()) {
          places[lane] = cursor.place();
          set_lane(lane, site_terms<T>(problem, places[lane]));
        }
      }
      const int64_t offset = first * classes;
      use_scratch();
      const S* const logits = static_cast<const S*>(problem.logits) + offset;
      read_rows<D>(logits, count, scratch.logits.data());
      if constexpr (kDirect) {
        block.next_logits = logits + B * classes;
      }
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
    if (count < B || !all_rows_to_tile<T, N, B>(rows, classes, tile)) {
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
    if (count < B || !tile_to_all_rows<T, N, B>(tile, classes, rows)) {
      tile_to_some_rows<T, B>(tile, classes, count, rows);
    }
    if constexpr (!kDirect) {
      write_values<D>(rows, count * classes, to);
    }
  }
};
