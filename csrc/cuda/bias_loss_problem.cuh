// The parameters of every kernel, and where a site's target, output and coefficients lie.
#pragma once

#include "bias_loss_launch.h"
#include "bias_loss_math.cuh"

namespace lnl::cuda {

constexpr int kTerms = 3;  // of the sums that a forward call collects: CE, H, the confusion term

template <typename A>
struct DeviceCoefficient {
  const void* device = nullptr;
  DType dtype = DType::kFloat64;  // of the number on the device
  A host = 0;

  __device__ A read() const {
    if (device == nullptr) return host;
    switch (dtype) {
      case DType::kFloat64:
        return A(*static_cast<const double*>(device));
      case DType::kFloat16:
        return A(widen(*static_cast<const __half*>(device)));
      case DType::kBFloat16:
        return A(widen(*static_cast<const __nv_bfloat16*>(device)));
      case DType::kFloat32:
        break;
    }
    return A(*static_cast<const float*>(device));
  }
};

// The last stage of a reduced loss: the blocks' sums, divided for a mean, and their sum over heads.
template <typename A>
struct FoldProblem {
  const A* partials;  // [blocks, K, kPartials]
  const A* given;     // denominators [K, 2], or null
  A* denominators;    // [K, 2] to be written, or null: the sums are divided by `given`, if at all
  A sites;            // N * S
  bool weighted;      // labels count with weights
  bool mask_entropy;
  A* loss;
  A* cross_entropy;
  A* entropy;
  DeviceCoefficient<A> entropy_weight, confusion_weight;
  int blocks;
  int heads;
};

// A mean over labels divides by what is known only when all labels have been seen. The first turn
// of a forward call takes it that every label counts 1, and notes which blocks have seen another.
// The second turn of the same kernel folds the sums, and makes the gradients again where there is
// such a block; with weights it is the only one that makes them.
template <typename A>
struct Turns {
  bool counting;         // labels are to be counted; there may be no second turn
  std::uint16_t* flags;  // [blocks], or null without a second turn
  A* denominators;       // [blocks, heads of a block, 2], every block's own, in the second turn
  int blocks;
  bool second;
  bool always;  // the second turn need not look at flags
  FoldProblem<A> fold;
};

// BiasLossCall for one dtype. "Target index" is a site's place in labels, [N, K, S]; "output index"
// its place in a loss summed over heads, [N, S].
template <typename T>
struct Problem {
  using A = Accumulation<T>;

  const T* logits;
  const std::int64_t* labels;
  const void* probabilities;  // T, or A with wide_probabilities
  const A* weight;            // [C] or null
  const A* denominators;      // [K, 2], or null: the sums are divided by `count`
  const A* upstream;          // one number, or by output index; null: 1
  T* gradient;
  T* head_gradient;
  A* partials;            // [blocks, K, kPartials], or null
  A* site_loss;           // by target index, or null
  A* site_cross_entropy;  // likewise
  A* site_entropy;        // likewise

  DeviceCoefficient<A> reversal, entropy_weight, confusion_weight;
  std::int64_t sites;      // N * S, of one head
  std::int64_t positions;  // S
  std::int64_t ignore_index;
  int classes;
  int heads;
  int lanes_per_row;  // rows of the register kernel
  int pitch;          // rows of the shared memory kernel: accumulators from row to row
  int ahead;          // tiles, or columns, under way or at work
  int groups;         // rows of many classes: groups of asynchronous copies that a row comes in
  int row_windows;    // the most of a row
  int slot_windows;   // of a group in shared memory
  int slots;          // groups under way or at work
  int warp_bits;      // a block has 2^warp_bits warps
  Divider by_heads, by_positions, by_classes;
  Turns<A> turns;
  A count;  // 1, or of a mean's first turn N * S
  A keep;   // 1 - label_smoothing
  A floor;  // label_smoothing / C
  bool reversed;
  bool confused;
  bool mask_entropy;
  bool upstream_per_site;
  bool wide_probabilities;
  // Rows: whether 128-bit accesses that are aligned for logits are so for the others too.
  bool wide_labels;  // sites: labels are aligned to 16 bytes
  bool wide_logits;
  bool wide_targets;
  bool wide_gradient;
  bool wide_head_gradient;
  bool stage;  // many classes: keep the logits on chip between the two passes

  __device__ bool wants_gradient() const { return gradient != nullptr || head_gradient != nullptr; }
  // Whether probabilities are A where that is not T.
  __device__ bool widens_probabilities() const {
    return !std::is_same_v<T, A> && wide_probabilities;
  }
  __device__ A probability(std::int64_t element) const {
    return widens_probabilities() ? static_cast<const A*>(probabilities)[element]
                                  : A(widen(static_cast<const T*>(probabilities)[element]));
  }
  // A window of a row of probabilities that begins at element `begin`.
  __device__ void load_probabilities(std::int64_t begin, int first, int count,
                                     A (&values)[kWide<T>]) const {
    if (!widens_probabilities()) {
      load_window(static_cast<const T*>(probabilities) + begin, first, count, wide_targets, A(0),
                  values);
      return;
    }
#pragma unroll
    for (int part = 0; part < kWide<T> / kWide<A>; ++part) {
      A four[kWide<A>];
      load_window(static_cast<const A*>(probabilities) + begin, first + part * kWide<A>, count,
                  wide_targets, A(0), four);
#pragma unroll
      for (int i = 0; i < kWide<A>; ++i) values[part * kWide<A> + i] = four[i];
    }
  }
};

// What one head's sites multiply their gradients with.
template <typename A>
struct HeadScales {
  A direction = 1;      // +1, or -reversal
  A cross_entropy = 1;  // 1 / sum of target weights for a mean
  A entropy = 1;        // 1 / number of sites for a mean
  A entropy_weight = 0;
  A confusion_weight = 0;
  A upstream = 1;
};

template <typename T>
__device__ HeadScales<Accumulation<T>> head_scales(const Problem<T>& problem,
                                                   const Accumulation<T>* denominators, int head) {
  using A = Accumulation<T>;
  HeadScales<A> scales;
  if (problem.reversed) scales.direction = -problem.reversal.read();
  scales.entropy_weight = problem.entropy_weight.read();
  scales.confusion_weight = problem.confusion_weight.read();
  const bool known = denominators != nullptr;
  scales.cross_entropy = A(1) / (known ? denominators[2 * head] : problem.count);
  scales.entropy = A(1) / (known ? denominators[2 * head + 1] : problem.count);
  if (problem.upstream != nullptr && !problem.upstream_per_site)
    scales.upstream = *problem.upstream;
  return scales;
}

struct SitePlace {
  std::int64_t target = 0;
  std::int64_t output = 0;
};

// Row r of logits in memory order [N, S, K, C] is head r % K of site r / K.
template <typename T>
__device__ SitePlace place_of_row(const Problem<T>& problem, std::int64_t row) {
  if (problem.heads == 1) return {row, row};
  const std::int64_t output = problem.by_heads.divide(row);
  if (problem.positions == 1) return {row, output};
  const std::int64_t head = row - output * problem.heads;
  const std::int64_t sample = problem.by_positions.divide(output);
  const std::int64_t position = output - sample * problem.positions;
  return {(sample * problem.heads + head) * problem.positions + position, output};
}

// The head of a block's slot, where it works on rows blockIdx.x * slots + slot. As numbers of 32
// bits: heads are fewer than 2^16 and slots fewer than 2^10.
template <typename T>
__device__ inline int head_of_slot(const Problem<T>& problem, unsigned slots, unsigned slot) {
  const unsigned heads = problem.heads;
  return static_cast<int>((blockIdx.x % heads * slots + slot) % heads);
}

// The target of one site as one number: its class, or why it has none.
struct Label {
  static constexpr int kNone = -1;  // targets are probabilities
  static constexpr int kIgnored = -2;
  static constexpr int kOutOfRange = -3;

  int value = kNone;

  __device__ bool counted() const { return value != kIgnored; }
  __device__ bool in_range() const { return value != kOutOfRange; }
  __device__ bool is_class() const { return value >= 0; }
};

template <typename T>
__device__ inline Label label_of(const Problem<T>& problem, std::int64_t number) {
  Label label;
  label.value = number == problem.ignore_index ? Label::kIgnored
                : static_cast<std::uint64_t>(number) < static_cast<std::uint64_t>(problem.classes)
                    ? static_cast<int>(number)
                    : Label::kOutOfRange;
  return label;
}

template <typename T>
__device__ Label read_label(const Problem<T>& problem, std::int64_t target) {
  return problem.labels == nullptr ? Label() : label_of(problem, problem.labels[target]);
}

// Labels of kCount adjacent sites, in 128-bit accesses where `target` is even and labels are
// aligned.
template <int kCount, typename T>
__device__ inline void read_labels(const Problem<T>& problem, std::int64_t target,
                                   Label (&labels)[kCount]) {
  if (problem.labels == nullptr) return;
  std::int64_t numbers[kCount];
  if (problem.wide_labels) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const auto pack = Pack<std::int64_t, 2>::load(problem.labels + target + i);
      numbers[i] = pack.values[0], numbers[i + 1] = pack.values[1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) numbers[i] = problem.labels[target + i];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) labels[i] = label_of(problem, numbers[i]);
}

// y_c = w_c * ((1 - smoothing) * q_c + smoothing / C), q the one-hot label or the probability.
template <typename T>
__device__ inline Accumulation<T> target_of_class(const Problem<T>& problem, int c,
                                                  Accumulation<T> probability) {
  const auto value = problem.keep * probability + problem.floor;
  return problem.weight != nullptr ? problem.weight[c] * value : value;
}

// y of a window of classes; those outside of the row have 0.
template <typename T>
__device__ inline void targets_of_window(const Problem<T>& problem, std::int64_t begin, int first,
                                         int count, int label, Accumulation<T> (&y)[kWide<T>]) {
  using A = Accumulation<T>;
  if (problem.labels == nullptr) problem.load_probabilities(begin, first, count, y);
#pragma unroll
  for (int i = 0; i < kWide<T>; ++i) {
    const int c = first + i;
    const bool inside = c >= 0 && c < count;
    if (problem.labels != nullptr) y[i] = A(c == label);
    y[i] = inside ? target_of_class(problem, c, y[i]) : A(0);
  }
}

}  // namespace lnl::cuda
