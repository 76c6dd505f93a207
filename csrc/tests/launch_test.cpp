// The launchers' arithmetic for any size, without the tensors: grids that CUDA accepts and that
// fill the device, workspaces, divisions beyond 32 bits, and up to how many classes the logits stay
// on chip.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../cuda/bias_loss_math.cuh"
#include "../emulator/emulator.h"
#include "bias_loss_case.h"

namespace {

using namespace lnl;

int failures = 0, checked = 0;

void expect(bool holds, const std::string& where, const std::string& what) {
  ++checked;
  if (holds) return;
  if (++failures <= 25) std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
}

// Memory that nobody touches.
void* nowhere(int which) { return reinterpret_cast<void*>(std::uintptr_t(which + 1) << 40); }

BiasLossCall call_of(const tests::Case& c) {
  BiasLossCall call;
  call.dtype = c.dtype;
  call.rows = c.rows, call.heads = c.heads, call.classes = c.classes, call.positions = c.positions;
  call.channels_last = c.channels_last;
  call.logits = nowhere(0);
  if (c.target == tests::Target::kLabels) {
    call.labels = static_cast<const std::int64_t*>(nowhere(1));
  } else {
    call.probabilities = nowhere(1);
  }
  call.reduction = c.reduction;
  call.loss = nowhere(2), call.cross_entropy = nowhere(3), call.entropy = nowhere(4);
  call.denominators = nowhere(5);
  call.gradient = nowhere(6), call.head_gradient = nowhere(7);
  return call;
}

bool is(const cuda::LaunchFacts& facts, const char* kernel) {
  return std::strcmp(facts.kernel, kernel) == 0;
}

// Rows, or sites, that a block takes at a time.
std::int64_t unit_of(const tests::Case& c, const cuda::LaunchFacts& facts) {
  if (is(facts, "rows_small")) return facts.threads;
  if (is(facts, "rows_medium")) return facts.unit;
  if (is(facts, "rows_large")) return 1;
  if (is(facts, "sites_large")) return 128 / size_of(c.dtype);
  const bool eight = size_of(c.dtype) == 2 && c.positions % 8 == 0;
  return facts.threads * (c.dtype == DType::kFloat64 ? 2 : eight ? 8 : 4);
}

void check_launch(const tests::Case& c, const cuda::Device& device) {
  const std::string where = c.name() + ", " + std::to_string(device.multiprocessors) + " of " +
                            std::to_string(device.shared_memory) + " bytes";
  const BiasLossCall call = call_of(c);
  const cuda::LaunchFacts facts = cuda::launch_facts(call, device);
  std::vector<emulator::Launch> launches;
  emulator::settings().shared_memory = device.shared_memory;
  emulator::settings().instead = [&](const emulator::Launch& launch) {
    launches.push_back(launch);
  };
  try {
    expect(cuda::launch_bias_loss(call, device, nowhere(8), nullptr) == 0, where, "an error");
  } catch (const emulator::Fault& fault) {
    expect(false, where, fault.what());
  }
  emulator::settings().instead = nullptr;

  const bool rows = std::strncmp(facts.kernel, "rows", 4) == 0;
  const std::int64_t sites = c.rows * c.positions;
  const std::int64_t work = rows ? sites * c.heads : sites, unit = unit_of(c, facts);
  const std::int64_t needed = (work + unit - 1) / unit, blocks = facts.blocks;
  const std::int64_t resident =
      std::int64_t(device.multiprocessors) * device.blocks_per_multiprocessor;
  bool found = false;
  for (const emulator::Launch& launch : launches) {
    found = found || (launch.grid.x == facts.blocks &&
                      launch.block.x == static_cast<unsigned>(facts.threads) &&
                      launch.shared_bytes == facts.shared_memory &&
                      launch.grid.y == (rows ? 1 : static_cast<unsigned>(c.heads)));
  }
  expect(found, where, "the main kernel is not launched as launch_facts says");
  expect(launches.size() <= 2, where, std::to_string(launches.size()) + " launches");
  expect(blocks <= needed, where, "blocks without work");
  expect((rows ? blocks : blocks * c.heads) <= resident + c.heads, where,
         "more than a full device");
  if (blocks < needed) {  // its blocks take several turns
    expect((rows ? blocks : blocks * c.heads) >= resident, where, "less than a full device");
    expect(!rows || blocks * unit % c.heads == 0, where, "a turn leads to another head");
  }
  const std::int64_t wide = c.dtype == DType::kFloat64 ? 8 : 4;
  std::int64_t least = blocks * c.heads * cuda::kPartials * wide;
  if (c.reduction == Reduction::kNone) least = c.heads > 1 ? 3 * sites * c.heads * wide : 0;
  const auto workspace = static_cast<std::int64_t>(facts.workspace);
  // Flags of two bytes, and denominators of the heads that a block works on.
  const std::int64_t every = rows ? blocks : blocks * c.heads;
  const bool one_head = !rows || is(facts, "rows_large");
  const std::int64_t turns = c.reduction == Reduction::kMean && c.target == tests::Target::kLabels
                                 ? every * (2 + (one_head ? 1 : c.heads) * 2 * wide) + 512
                                 : 0;
  expect(workspace >= least && workspace <= least + 512 + turns, where,
         "a workspace of " + std::to_string(workspace) + " bytes for " + std::to_string(least));
  if (c.reduction == Reduction::kNone && c.heads > 1) {
    const emulator::Launch& sum = launches.back();
    expect(std::int64_t(sum.grid.x) * sum.block.x >= sites, where, "sites without a thread");
  }
}

// A backward call is one launch.
void check_backward() {
  for (const std::int64_t positions : {1, 64}) {
    for (const std::int64_t classes : {8, 100, 5000}) {
      tests::Case c;
      c.rows = 64, c.classes = classes, c.positions = positions, c.heads = 3;
      BiasLossCall call = call_of(c);
      call.loss = call.cross_entropy = call.entropy = nullptr;
      call.upstream = nowhere(9);
      int launches = 0;
      emulator::settings().instead = [&](const emulator::Launch&) { ++launches; };
      expect(cuda::launch_bias_loss(call, {132, 227 * 1024}, nowhere(8), nullptr) == 0, c.name(),
             "an error");
      emulator::settings().instead = nullptr;
      expect(launches == 1, c.name(), std::to_string(launches) + " launches backward");
    }
  }
}

void check_launches() {
  const cuda::Device devices[] = {{1, 48 * 1024},    {40, 64 * 1024},  {108, 163 * 1024},
                                  {132, 227 * 1024}, {170, 99 * 1024}, {132, 227 * 1024, 32}};
  const std::int64_t one = 1, most_elements = one << 46;
  int turn = 0;
  for (const cuda::Device& device : devices) {
    for (const DType dtype :
         {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
      for (const std::int64_t rows : {one, one * 31, (one << 20) + 1, (one << 31) - 1,
                                      (one << 31) + 7, (one << 32) + 1, (one << 36) + 5}) {
        for (const std::int64_t classes : {1, 2, 12, 32, 33, 100, 1000, 4099, 58000, 262144}) {
          for (const std::int64_t positions : {one, one * 7, one * 196, one << 20}) {
            for (const std::int64_t heads : {1, 3, 65535}) {
              if (rows > most_elements / classes / positions / heads) continue;
              // Without a reduction the values alone take 12 bytes a site.
              if (turn % 3 == 0 && rows * positions > one << 37) continue;
              tests::Case c;
              c.dtype = dtype;
              c.rows = rows, c.classes = classes, c.positions = positions, c.heads = heads;
              c.channels_last = positions > 1 && turn % 5 == 0;
              c.reduction = static_cast<Reduction>(turn % 3);
              if (turn % 7 == 0) c.target = tests::Target::kProbabilities;
              c.shared_memory = device.shared_memory;
              ++turn;
              check_launch(c, device);
            }
          }
        }
      }
    }
  }
}

// The most classes of which the logits are read once. Of rows an odd number: they begin anywhere in
// a 32-byte sector, which takes the most room.
std::int64_t most_on_chip(tests::Case c, const cuda::Device& device) {
  const std::int64_t step = c.positions == 1 ? 2 : 1;
  std::int64_t fits = 101, beyond = (1 << 18) + 1;
  while (beyond - fits > step) {
    c.classes = fits + (beyond - fits) / (2 * step) * step;
    (cuda::launch_facts(call_of(c), device).reads_logits_once ? fits : beyond) = c.classes;
  }
  return fits;
}

// The table of docs/cuda.md: a limit is what a block may have less its scratch, a few KiB.
void check_limits() {
  struct Limit {
    int kibibytes;
    DType dtype;
    std::int64_t rows, dense_rows, sites, dense_sites;
  };
  const Limit limits[] = {
      {227, DType::kFloat32, 57781, 57701, 1777, 1733},
      {227, DType::kFloat64, 28859, 28779, 1777, 1733},
      {227, DType::kBFloat16, 115561, 115401, 1738, 1650},
      {163, DType::kFloat32, 41397, 41317, 1265, 1221},
      {163, DType::kFloat64, 20667, 20587, 1265, 1221},
      {163, DType::kBFloat16, 82793, 82633, 1226, 1138},
      {99, DType::kFloat32, 25013, 24933, 753, 709},
      {99, DType::kFloat64, 12475, 12395, 753, 709},
      {99, DType::kBFloat16, 50025, 49865, 714, 626},
      {64, DType::kFloat32, 16053, 15973, 473, 429},
      {64, DType::kFloat64, 7995, 7915, 473, 429},
      {64, DType::kBFloat16, 32105, 31945, 434, 346},
  };
  for (const Limit& limit : limits) {
    const cuda::Device device{132, limit.kibibytes * 1024};
    tests::Case c;
    c.dtype = limit.dtype;
    c.rows = 4;
    const auto found = [&](std::int64_t positions, tests::Target target) {
      c.positions = positions;
      c.target = target;
      return most_on_chip(c, device);
    };
    const std::int64_t rows = found(1, tests::Target::kLabels);
    const std::int64_t dense_rows = found(1, tests::Target::kProbabilities);
    const std::int64_t sites = found(64, tests::Target::kLabels);
    const std::int64_t dense_sites = found(64, tests::Target::kProbabilities);
    char line[160];
    std::snprintf(line, sizeof(line), "%d KiB, %lld bytes: rows %lld, dense %lld; sites %lld, %lld",
                  limit.kibibytes, static_cast<long long>(size_of(limit.dtype)),
                  static_cast<long long>(rows), static_cast<long long>(dense_rows),
                  static_cast<long long>(sites), static_cast<long long>(dense_sites));
    std::printf("on chip in %s\n", line);
    expect(rows == limit.rows && dense_rows == limit.dense_rows && sites == limit.sites &&
               dense_sites == limit.dense_sites,
           line, "not as in docs/cuda.md");
  }
}

void check_divisions() {
  const std::int64_t one = 1;
  for (const std::int64_t by :
       {one, one * 2, one * 3, one * 7, one * 255, one * 256, one * 1000, one * 65535,
        (one << 20) + 1, (one << 31) - 1, one << 31, (one << 31) + 1, (one << 40) + 3}) {
    for (const std::int64_t largest :
         {one * 1000, (one << 31) - 1, one << 31, one << 32, (one << 46) + 5}) {
      const cuda::Divider divider(by, largest);
      for (const std::int64_t base :
           {one * 0, by, 2 * by, largest / 2, largest / by * by, largest}) {
        for (std::int64_t value = base - 2; value <= base + 2; ++value) {
          if (value < 0 || value > largest) continue;
          expect(
              divider.divide(value) == value / by, std::to_string(value),
              "divided by " + std::to_string(by) + " is " + std::to_string(divider.divide(value)));
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_divisions();
  check_launches();
  check_backward();
  check_limits();
  std::printf("%d checked, %d failed\n", checked, failures);
  return failures > 0 || checked < 10000;
}
