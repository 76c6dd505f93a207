// Which kernel a call gets, its grid, its shared memory and its place in the workspace.
#pragma once

#include "bias_loss_large.cuh"
#include "bias_loss_rows.cuh"
#include "bias_loss_sites.cuh"

namespace lnl::cuda {

constexpr int kSmallClasses = 32;        // rows_small and sites_small
constexpr int kSmallShared = 48 * 1024;  // what every device gives a block without asking

enum class Kernel {
  kRowsSmall,
  kRowsMedium16,
  kRowsMedium32,
  kRowsLarge,
  kSitesSmall,
  kSitesLarge
};

struct Plan {
  Kernel kernel = Kernel::kRowsSmall;
  bool dense = false;
  bool vector = false;  // sites: a thread reads its sites of a class at once
  int sites = 1;        // of a thread of sites_*
  int threads = 128;
  unsigned blocks = 0;  // of one head for sites
  std::size_t shared = 0;
  std::int64_t in_flight = 0;
  int most_shared = kSmallShared;  // that a block may have, whatever this call needs
  int lanes_per_row = 32;
  std::int64_t unit = 0;  // rows, or sites of a head, that a block works on at a time
  int pitch = 0;
  int ahead = 1;
  int groups = 0;
  int group_windows = 0;
  int row_windows = 0;
  int slots = 0;
  bool stage = false;
  unsigned denominator_blocks = 0;
  // Byte offsets into the workspace.
  std::size_t partials = 0, flags = 0, denominators = 0, denominator_partials = 0, by_head = 0,
              total = 0;

  std::size_t reserve(std::size_t bytes) {
    const std::size_t begin = total;
    total += (bytes + 255) / 256 * 256;
    return begin;
  }
  bool for_sites() const { return kernel == Kernel::kSitesSmall || kernel == Kernel::kSitesLarge; }
  // Whether a block works on one head only.
  bool one_head() const { return for_sites() || kernel == Kernel::kRowsLarge; }
  std::size_t all_blocks(std::int64_t heads) const {
    return std::size_t(blocks) * (for_sites() ? heads : 1);
  }
};

inline std::int64_t divide_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

inline std::int64_t most_blocks(const Device& device) {
  return std::int64_t(device.multiprocessors) * device.blocks_per_multiprocessor;
}

// Blocks that find room in a multiprocessor's shared memory. The system takes a KiB of each.
inline std::int64_t blocks_by_shared(std::size_t bytes_of_block, const Device& device) {
  constexpr std::size_t kReserved = 1024;
  return (device.shared_memory + kReserved) / (bytes_of_block + kReserved);
}

inline std::int64_t greatest_common_divisor(std::int64_t a, std::int64_t b) {
  return b == 0 ? a : greatest_common_divisor(b, a % b);
}

inline bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// Whether an access to `other` is aligned to 16 bytes wherever one to `logits` is.
inline bool same_phase(const void* logits, const void* other) {
  return (reinterpret_cast<std::uintptr_t>(logits) - reinterpret_cast<std::uintptr_t>(other)) %
             16 ==
         0;
}

// Blocks for `work` units, each block taking `unit` of them at a time: as many as a full device
// holds. Where blocks take several turns, a turn's stride must keep rows with their heads.
inline unsigned blocks_for_rows(std::int64_t work, std::int64_t unit, std::int64_t heads,
                                const Device& device) {
  const std::int64_t needed = divide_up(work, unit);
  const std::int64_t step = heads / greatest_common_divisor(heads, unit);
  const std::int64_t most = divide_up(most_blocks(device), step) * step;
  return static_cast<unsigned>(needed < most ? needed : most);
}

// Threads of a block whose threads need `bytes` each, whole warps that fit kSmallShared.
inline int small_threads(std::size_t bytes) {
  const int warps = static_cast<int>(kSmallShared / (bytes * kWarp));
  return kWarp * (warps < 1 ? 1 : warps > 4 ? 4 : warps);
}

// Bytes of logits that a multiprocessor should have under way, so that the memory is busy.
constexpr std::int64_t kInFlight = 40 * 1024;

// How many tiles of so many bytes to keep under way, for `wanted` bytes of them: at most eight, of
// whose groups of copies a thread can wait for each.
inline int tiles_ahead(std::int64_t wanted, std::int64_t bytes) {
  const std::int64_t tiles = divide_up(wanted, bytes);
  return static_cast<int>(tiles < kSlots ? tiles : kSlots);
}
// Likewise where a block's shared memory holds them, beside `scratch`.
inline int tiles_ahead(std::int64_t wanted, std::int64_t bytes, std::int64_t scratch,
                       const Device& device) {
  const std::int64_t room = (device.shared_memory - scratch) / bytes;
  const int tiles = tiles_ahead(wanted, bytes);
  return tiles < room ? tiles : static_cast<int>(room);
}

// Shared memory of a lane of rows_medium.
template <typename T, int kElements>
constexpr std::size_t staged_of_lane() {
  return kRowsAhead<T, kElements> * kElements * sizeof(T);
}

template <typename T>
void plan_rows(const BiasLossCall& call, const Device& device, Plan& plan) {
  using A = Accumulation<T>;
  const std::int64_t rows = call.rows * call.positions * call.heads;
  // Windows begin on 32-byte sectors: the most elements that a row's lie behind one.
  const std::int64_t step = greatest_common_divisor(32, call.classes * sizeof(T));
  const std::int64_t base = reinterpret_cast<std::uintptr_t>(call.logits) % step;
  const std::int64_t before = (32 - step + base) / sizeof(T);
  const std::int64_t window = before + call.classes;
  const bool medium = window <= kWarp * (sizeof(T) == 8 ? 16 : 32);
  if (call.classes <= kSmallClasses) {
    plan.kernel = Kernel::kRowsSmall;
    plan.pitch = static_cast<int>(divide_up(call.classes, 4) | 1) * 4;  // 128-bit bank conflicts
    // Of sixteen warps, or of those few for which there is room where each class has a target.
    const std::int64_t wanted = plan.dense ? 1280 * sizeof(A) : kInFlight / 16;
    plan.ahead = tiles_ahead(wanted, kWarp * call.classes * sizeof(T));
    const std::size_t bytes =
        plan.pitch * sizeof(A) * (plan.dense ? 3 : 2) + plan.ahead * call.classes * sizeof(T);
    plan.threads = small_threads(bytes);
    plan.shared = bytes * plan.threads;
    plan.unit = plan.threads;
    plan.blocks = blocks_for_rows(rows, plan.unit, call.heads, device);
  } else if (medium) {
    // 16 elements a lane while 4 lanes are enough, then 32; two registers each are too many for
    // float32 and float64, which have them only where 16 do not reach.
    const bool wide = window > (sizeof(T) == 2 ? 4 : kWarp) * 16;
    plan.kernel = wide ? Kernel::kRowsMedium32 : Kernel::kRowsMedium16;
    plan.threads = 128;
    plan.lanes_per_row = 4;
    while (plan.lanes_per_row * (wide ? 32 : 16) < window) plan.lanes_per_row *= 2;
    const int slots = plan.threads / plan.lanes_per_row;
    plan.unit = slots;
    const std::size_t totals = kPartials * slots * sizeof(A);
    plan.shared = plan.threads * (wide ? staged_of_lane<T, 32>() : staged_of_lane<T, 16>());
    if (plan.shared < totals) plan.shared = totals;
    plan.blocks = blocks_for_rows(rows, plan.unit, call.heads, device);
  } else {
    plan.kernel = Kernel::kRowsLarge;
    // Four accesses a thread or more, which share out what a row costs.
    const std::int64_t accesses = divide_up(window, kWide<T>);
    plan.threads = accesses <= 512 ? 128 : accesses <= 1024 ? 256 : kLargeThreads;
    const std::size_t scratch =
        plan.dense ? kRowsLargeScratch<T, true> : kRowsLargeScratch<T, false>;
    const std::int64_t windows = divide_up(accesses, plan.threads);  // of a thread
    const std::int64_t row = accesses * 16;
    plan.stage = scratch + row <= static_cast<std::size_t>(device.shared_memory);
    if (plan.stage) {
      // Short rows whole, several at a time.
      const int blocks = plan.dense ? kRowsLargeBlocks<T, true> : kRowsLargeBlocks<T, false>;
      plan.ahead =
          tiles_ahead(kInFlight / (blocks * kLargeThreads / plan.threads), row, scratch, device);
      plan.groups = plan.ahead > 1 ? 1 : kGroups;
      plan.group_windows = static_cast<int>(divide_up(windows, plan.groups));
      plan.row_windows = static_cast<int>(accesses);
      plan.slots = plan.ahead * plan.groups;
      plan.shared = scratch + plan.ahead * row;
    } else {
      // Two windows of each thread in a group where two such blocks find room, else one.
      const std::size_t group = plan.threads * 16;
      plan.group_windows = blocks_by_shared(scratch + kGroups * 2 * group, device) >= 2 ? 2 : 1;
      plan.groups = static_cast<int>(divide_up(windows, plan.group_windows));
      plan.row_windows = plan.groups * plan.group_windows * plan.threads;
      plan.slots = kGroups;
      plan.shared = scratch + kGroups * plan.group_windows * group;
    }
    plan.unit = 1;
    plan.blocks = blocks_for_rows(rows, plan.unit, call.heads, device);
  }
}

template <typename T>
void plan_sites(const BiasLossCall& call, const Device& device, Plan& plan) {
  using A = Accumulation<T>;
  const std::int64_t sites = call.rows * call.positions;
  const auto vectors = [&](int count) {
    const std::size_t bytes = count * sizeof(T);
    const void* probabilities = call.probabilities;
    return call.positions % count == 0 && aligned(call.logits, bytes) &&
           aligned(call.gradient, bytes) && aligned(call.head_gradient, bytes) &&
           aligned(probabilities, call.wide_probabilities ? 16 : bytes);
  };
  // 128 bits of sites, or 64 of 16-bit ones where positions are a multiple of no more than four.
  plan.sites = sizeof(T) == 8 ? 2 : 4;
  plan.vector = vectors(plan.sites);
  if (sizeof(T) == 2 && vectors(8)) plan.sites = 8;
  if (call.classes <= kSmallClasses) {
    plan.kernel = Kernel::kSitesSmall;
    const std::size_t column = call.classes * plan.sites * sizeof(T);
    if (plan.vector || kAsync<T, false>)
      plan.ahead = tiles_ahead(kInFlight / (plan.dense ? 256 : 512), column);
    const std::size_t bytes =
        plan.ahead * column + (plan.dense ? call.classes * plan.sites * sizeof(A) : 0);
    plan.threads = small_threads(bytes);
    plan.shared = bytes * plan.threads;
    const std::size_t totals = kPartials * plan.threads * sizeof(A);
    if (plan.shared < totals) plan.shared = totals;
    plan.unit = std::int64_t(plan.threads) * plan.sites;
  } else {
    plan.kernel = Kernel::kSitesLarge;
    if (!plan.vector) plan.sites = kScalarSites<T>;
    plan.threads = call.classes <= 128 ? 128 : 256;
    const int warps = plan.threads / kWarp;
    const std::size_t scratch =
        plan.dense ? large_scratch<T, true>(warps) : large_scratch<T, false>(warps);
    const std::int64_t staged = call.classes * kLine<T> * sizeof(T);
    plan.stage = scratch + staged <= static_cast<std::size_t>(device.shared_memory);
    if (plan.stage && (plan.vector || kAsync<T, false>)) {
      const int blocks =
          plan.dense ? kSitesLargeBlocks<T, true, 8> : kSitesLargeBlocks<T, false, 8>;
      plan.ahead = tiles_ahead(kInFlight / (blocks * 256 / plan.threads), staged, scratch, device);
    }
    plan.shared = scratch + (plan.stage ? plan.ahead * staged : 0);
    plan.unit = kLine<T>;
  }
  const std::int64_t most = divide_up(most_blocks(device), call.heads);
  const std::int64_t needed = divide_up(sites, plan.unit);
  plan.blocks = static_cast<unsigned>(needed < most ? needed : most);
}

// Whether a call has to find out what its mean divides by.
inline bool counts_labels(const BiasLossCall& call) {
  return call.loss != nullptr && call.partials == nullptr && call.reduction == Reduction::kMean &&
         call.labels != nullptr && !call.denominators_given;
}

// Whether it makes gradients as well, which may have to be made again: see Turns.
inline bool has_two_turns(const BiasLossCall& call) {
  return counts_labels(call) && (call.gradient != nullptr || call.head_gradient != nullptr);
}

// The call's place in the workspace.
template <typename T>
void plan_workspace(const BiasLossCall& call, Plan& plan) {
  using A = Accumulation<T>;
  if (call.loss == nullptr || call.partials != nullptr) return;
  if (call.reduction == Reduction::kNone) {
    const std::int64_t sites = call.rows * call.positions;
    if (call.heads > 1) plan.by_head = plan.reserve(3 * sites * call.heads * sizeof(A));
    return;
  }
  plan.partials = plan.reserve(plan.blocks * call.heads * kPartials * sizeof(A));
  if (has_two_turns(call)) {
    const std::size_t blocks = plan.all_blocks(call.heads);
    plan.flags = plan.reserve(blocks * sizeof(std::uint16_t));
    plan.denominators = plan.reserve(blocks * (plan.one_head() ? 1 : call.heads) * 2 * sizeof(A));
  }
}

// That of a linear head's labels, which are counted before its kernels run.
template <typename A>
void plan_denominators(const BiasLossCall& call, const Device& device, Plan& plan) {
  if (!counts_labels(call)) return;
  const std::int64_t blocks = divide_up(call.rows * call.positions, 256 * 4);
  const std::int64_t most = divide_up(most_blocks(device), 4);
  plan.denominator_blocks = static_cast<unsigned>(blocks < most ? blocks : most);
  plan.denominator_partials = plan.reserve(plan.denominator_blocks * call.heads * 2 * sizeof(A));
}

// Whether every class has a target, or the confusion term is wanted.
inline bool is_dense(const BiasLossCall& call) {
  return call.labels == nullptr || call.label_smoothing > 0 || call.confusion_weight.present;
}

// Bytes of logits that a block asks for before it has got the first of them: enough of them on a
// multiprocessor keep the memory busy.
template <typename T>
std::int64_t bytes_in_flight(const BiasLossCall& call, const Plan& plan) {
  const std::int64_t row = call.classes * sizeof(T);
  switch (plan.kernel) {
    case Kernel::kRowsSmall:
      return plan.unit * plan.ahead * row;
    case Kernel::kRowsMedium16:
      return plan.unit * kRowsAhead<T, 16> * row;
    case Kernel::kRowsMedium32:
      return plan.unit * kRowsAhead<T, 32> * row;
    case Kernel::kRowsLarge:
      return plan.stage ? plan.ahead * row
                        : std::int64_t(kGroups) * plan.group_windows * plan.threads * 16;
    case Kernel::kSitesSmall: {
      const bool all = plan.vector || kAsync<T, false> || call.classes < kSmallBatch;
      return plan.unit * plan.ahead * (all ? row : kSmallBatch * sizeof(T));
    }
    case Kernel::kSitesLarge: {
      const std::int64_t batch = !plan.vector ? kLargeBatch<true, false>
                                 : plan.dense ? kLargeBatch<true, true>
                                              : kLargeBatch<false, true>;
      const std::int64_t batches = batch * (plan.threads / (kLine<T> / plan.sites));
      const bool all = plan.stage && (plan.vector || kAsync<T, false>);
      return plan.unit * (all                      ? plan.ahead * row
                          : call.classes < batches ? row
                                                   : batches * sizeof(T));
    }
  }
  return 0;
}

template <typename T>
Plan make_plan(const BiasLossCall& call, const Device& device) {
  Plan plan;
  plan.dense = is_dense(call);
  plan.most_shared = device.shared_memory;
  if (call.channels_last || call.positions == 1) {
    plan_rows<T>(call, device, plan);
  } else {
    plan_sites<T>(call, device, plan);
  }
  plan_workspace<T>(call, plan);
  plan.in_flight = bytes_in_flight<T>(call, plan);
  return plan;
}

inline LaunchFacts facts_of(const Plan& plan) {
  static const char* const names[] = {"rows_small", "rows_medium", "rows_medium",
                                      "rows_large", "sites_small", "sites_large"};
  const bool large = plan.kernel == Kernel::kRowsLarge || plan.kernel == Kernel::kSitesLarge;
  LaunchFacts facts;
  facts.kernel = names[static_cast<int>(plan.kernel)];
  facts.threads = plan.threads;
  facts.blocks = plan.blocks;
  facts.unit = plan.unit;
  facts.shared_memory = plan.shared;
  facts.in_flight = plan.in_flight;
  facts.dense = plan.dense;
  facts.reads_logits_once = !large || plan.stage;
  facts.workspace = plan.total;
  return facts;
}

}  // namespace lnl::cuda
