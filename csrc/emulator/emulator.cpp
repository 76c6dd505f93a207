#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "memory.h"

lnl::emulator::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace lnl::emulator {

Running running;

namespace {

constexpr unsigned kWarp = 32;
constexpr std::size_t kSharedWithoutAsking = 48 * 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kAtExchange, kAtPhase, kDone };

struct Thread {
  State state = State::kReady;
  const char* file = nullptr;  // of the block barrier
  int line = 0;
  unsigned mask = 0;  // of the warp operation
  int lane_mask = 0;
  int width = 0;
  std::uint64_t value = 0;
  std::size_t barrier = 0;  // whose phase the thread waits for, by its number
  std::uint16_t fences = 0;
  int fence_epoch = -1;  // of the block, at the last fence
};

struct Warp {
  unsigned waiting = 0;
  std::uint16_t epoch = 0;
};

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
  std::size_t group;  // of those of one thread
};

// A barrier of bulk copies. Its word in shared memory holds its number, scrambled, so that stores
// over it are noticed.
struct Barrier {
  unsigned arrivals = 0;  // of a phase
  unsigned pending = 0;   // of them, in this phase
  std::size_t expected = 0;
  std::vector<Copy> under_way;
  unsigned phases = 0;           // complete ones
  std::vector<unsigned> waited;  // for so many of them, by thread

  std::size_t copied() const {
    std::size_t bytes = 0;
    for (const Copy& copy : under_way) bytes += copy.bytes;
    return bytes;
  }
};
constexpr std::uint64_t kBarrierWord = 0x6d62617272696572;

// A thread's asynchronous copies that have not arrived.
struct Copies {
  std::vector<Copy> under_way;
  std::size_t committed = 0;  // groups
};

// One launch at a time; kernels run on the calling operating system thread.
struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Copies> copies;            // by thread
  std::vector<Barrier> barriers;         // of the block
  std::vector<unsigned> thread_of_rank;  // in the order of the schedule
  std::vector<unsigned> rank_of_thread;
  std::vector<std::uint64_t> ready;  // by rank
  unsigned at_block_barrier = 0;
  unsigned done = 0;
  unsigned current = 0;
  std::uint16_t block_epoch = 0;
  std::uint32_t blocks_run = 0;
  std::uint32_t first_block = 0;
  const std::function<void()>* body = nullptr;
  std::string fault;
  std::mt19937_64 random;
  std::unordered_map<const void*, int> allowed_shared;
  SharedMemory shared;
};

Machine machine;

void set_ready(unsigned thread, bool ready) {
  const unsigned rank = machine.rank_of_thread[thread];
  const std::uint64_t bit = std::uint64_t{1} << rank % 64;
  if (ready) {
    machine.ready[rank / 64] |= bit;
  } else {
    machine.ready[rank / 64] &= ~bit;
  }
}

void release(unsigned thread) {
  machine.threads[thread].state = State::kReady;
  set_ready(thread, true);
}

void wait(State state) {
  machine.threads[machine.current].state = state;
  set_ready(machine.current, false);
  Fiber::suspend();
}

// Completes a warp operation once every lane that its mask names has arrived.
void complete_warp_operation(unsigned warp_index) {
  Warp& warp = machine.warps[warp_index];
  const unsigned first = warp_index * kWarp;
  const Thread self = machine.threads[machine.current];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(self.mask >> lane & 1)) continue;
    if (first + lane >= machine.threads.size())
      fail("warp operation names a lane that is not there");
    const Thread& other = machine.threads[first + lane];
    if (other.state == State::kDone) fail("warp operation names a lane that has exited");
    if (!(warp.waiting >> lane & 1)) return;
    if (other.state != self.state || other.mask != self.mask || other.lane_mask != self.lane_mask ||
        other.width != self.width) {
      fail("lanes of a warp wait in different operations or with different masks");
    }
  }
  if (self.state == State::kAtExchange) {
    std::uint64_t values[kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(self.mask >> lane & 1)) continue;
      const unsigned source = lane ^ static_cast<unsigned>(self.lane_mask);
      const bool same_segment = source / self.width == lane / self.width;
      const unsigned from = same_segment ? source : lane;
      if (!(self.mask >> from & 1)) fail("shuffle reads a lane that its mask does not name");
      values[lane] = machine.threads[first + from].value;
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (self.mask >> lane & 1) machine.threads[first + lane].value = values[lane];
    }
  } else {
    ++warp.epoch;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (self.mask >> lane & 1) release(first + lane);
  }
  warp.waiting &= ~self.mask;
}

void warp_operation(State state, unsigned mask) {
  const unsigned lane = machine.current % kWarp;
  if (!(mask >> lane & 1)) fail("warp operation without its caller in the mask");
  Thread& thread = machine.threads[machine.current];
  thread.state = state;
  thread.mask = mask;
  set_ready(machine.current, false);
  machine.warps[machine.current / kWarp].waiting |= 1u << lane;
  complete_warp_operation(machine.current / kWarp);
  Fiber::suspend();
}

// Not in the frame of run_thread, which never returns: a sanitizer would keep the message's guard
// zones on a stack that the next thread is to have.
[[gnu::noinline]] void check_copies_arrived() {
  if (!machine.copies[machine.current].under_way.empty()) {
    fail("a thread ends while its asynchronous copies are under way");
  }
}

void run_thread() {
  Fiber::started();
  (*machine.body)();
  check_copies_arrived();
  Thread& thread = machine.threads[machine.current];
  thread.state = State::kDone;
  set_ready(machine.current, false);
  ++machine.done;
  Fiber::suspend();
}

void order_threads(unsigned count) {
  auto& order = machine.thread_of_rank;
  order.resize(count);
  std::iota(order.begin(), order.end(), 0u);
  if (settings().schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  if (settings().schedule == Schedule::kPriority) {
    std::shuffle(order.begin(), order.end(), machine.random);
  }
  machine.rank_of_thread.resize(count);
  for (unsigned rank = 0; rank < count; ++rank) machine.rank_of_thread[order[rank]] = rank;
}

// The first ready thread in the schedule's order, from a random place on where that is asked for.
int next_thread() {
  const std::size_t words = machine.ready.size();
  std::size_t start = 0;
  std::uint64_t from = ~std::uint64_t{0};
  if (settings().schedule == Schedule::kRandom) {
    const std::uint64_t draw = machine.random();
    start = draw % words;
    from <<= draw >> 32 & 63;
  }
  for (std::size_t i = 0; i <= words; ++i) {
    const std::size_t word = (start + i) % words;
    const std::uint64_t bits = machine.ready[word] & (i == 0 ? from : ~std::uint64_t{0});
    if (bits != 0) {
      return static_cast<int>(machine.thread_of_rank[word * 64 + __builtin_ctzll(bits)]);
    }
  }
  return -1;
}

void release_block_barrier() {
  const Thread& first = machine.threads.front();
  for (const Thread& thread : machine.threads) {
    if (thread.line != first.line || std::strcmp(thread.file, first.file) != 0) {
      throw Fault("divergent barrier: threads of a block wait at different __syncthreads");
    }
  }
  ++machine.block_epoch;
  machine.at_block_barrier = 0;
  for (unsigned thread = 0; thread < machine.threads.size(); ++thread) release(thread);
}

std::size_t number_of_barrier(std::uint64_t* address) {
  memory_use_barrier(address, false);
  const std::uint64_t number = *address ^ kBarrierWord;
  if (number >= machine.barriers.size()) fail("not a barrier, or one that was stored over");
  return number;
}

// All of the block wait, and some for a phase that nobody will complete.
void check_phases() {
  for (const Thread& thread : machine.threads) {
    if (thread.state != State::kAtPhase) continue;
    const Barrier& barrier = machine.barriers[thread.barrier];
    throw Fault("a wait for a phase that is never complete: " + std::to_string(barrier.pending) +
                " arrivals are missing, and of " + std::to_string(barrier.expected) +
                " bytes expected " + std::to_string(barrier.copied()) + " are copied");
  }
}

void run_block(Dim3 block, Dim3 index) {
  const unsigned count = block.x * block.y * block.z;
  machine.threads.assign(count, Thread());
  machine.warps.assign((count + kWarp - 1) / kWarp, Warp());
  machine.copies.assign(count, Copies());
  machine.barriers.clear();
  machine.ready.assign((count + 63) / 64, 0);
  machine.at_block_barrier = machine.done = 0;
  machine.block_epoch = 0;
  ++machine.blocks_run;
  order_threads(count);
  while (machine.fibers.size() < count) machine.fibers.push_back(std::make_unique<Fiber>());
  for (unsigned thread = 0; thread < count; ++thread) {
    machine.fibers[thread]->prepare(run_thread);
    set_ready(thread, true);
  }
  machine.shared.begin_block();
  blockIdx = index;
  while (machine.done < count) {
    const int next = next_thread();
    if (next < 0) {
      if (machine.at_block_barrier == count) {
        release_block_barrier();
        continue;
      }
      check_phases();
      throw Fault(machine.at_block_barrier > 0
                      ? "divergent barrier: some threads wait at __syncthreads and the others "
                        "wait elsewhere or have exited"
                      : "a warp operation waits for lanes that never come");
    }
    machine.current = static_cast<unsigned>(next);
    threadIdx = Dim3(machine.current % block.x, machine.current / block.x % block.y,
                     machine.current / block.x / block.y);
    running.active = true;
    running.block = machine.blocks_run;
    running.first_block = machine.first_block;
    running.thread = static_cast<std::uint16_t>(next);
    running.block_epoch = machine.block_epoch;
    running.warp_epoch = machine.warps[machine.current / kWarp].epoch;
    running.fences = machine.threads[machine.current].fences;
    machine.fibers[machine.current]->resume();
    running.active = false;
    if (!machine.fault.empty()) throw Fault(machine.fault);
  }
  for (const Barrier& barrier : machine.barriers) {
    if (!barrier.under_way.empty()) throw Fault("a block ends while its bulk copies are under way");
  }
  memory_end_block();
}

}  // namespace

Settings& settings() {
  static Settings value;
  return value;
}

void fail(const std::string& message) {
  machine.fault = message;
  Fiber::suspend();
  std::abort();  // a faulty thread is never resumed
}

unsigned char* shared_memory() { return machine.shared.data(); }

void block_barrier(const char* file, int line) {
  machine.threads[machine.current].file = file;
  machine.threads[machine.current].line = line;
  ++machine.at_block_barrier;
  wait(State::kAtBlockBarrier);
}

void warp_barrier(unsigned mask) {
  machine.threads[machine.current].lane_mask = 0;
  warp_operation(State::kAtWarpBarrier, mask);
}

std::uint64_t exchange(unsigned mask, std::uint64_t value, int lane_mask, int width) {
  Thread& thread = machine.threads[machine.current];
  thread.value = value;
  thread.lane_mask = lane_mask;
  thread.width = width;
  const unsigned self = machine.current;
  warp_operation(State::kAtExchange, mask);
  return machine.threads[self].value;
}

float with_noise(float value, int ulps) {
  if (!settings().noise) return value;
  const int steps = static_cast<int>(machine.random() % (2 * ulps + 1)) - ulps;
  return value * (1.0f + static_cast<float>(steps) * 5.9604645e-8f);
}

void copy_async(void* to, const void* from, std::size_t bytes) {
  const auto aligned = [bytes](const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
  };
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail("asynchronous copy of a size that CUDA refuses");
  if (!aligned(to) || !aligned(from)) fail("misaligned access: an asynchronous copy");
  memory_begin_copy(__builtin_return_address(0), to, from, bytes);
  std::memset(to, kPoison, bytes);
  Copies& own = machine.copies[machine.current];
  own.under_way.push_back({to, from, bytes, own.committed});
}

void commit_copies() { ++machine.copies[machine.current].committed; }

void wait_for_copies(std::size_t groups_under_way) {
  Copies& own = machine.copies[machine.current];
  const auto arrived = [&](const Copy& copy) {
    if (copy.group + groups_under_way >= own.committed) return false;
    std::memcpy(copy.to, copy.from, copy.bytes);
    memory_end_copy(copy.to, copy.bytes);
    return true;
  };
  own.under_way.erase(std::remove_if(own.under_way.begin(), own.under_way.end(), arrived),
                      own.under_way.end());
}

void begin_barrier(std::uint64_t* barrier, unsigned arrivals) {
  if (reinterpret_cast<std::uintptr_t>(barrier) % 8 != 0) fail("misaligned access: a barrier");
  memory_use_barrier(barrier, true);
  *barrier = kBarrierWord ^ machine.barriers.size();
  Barrier begun;
  begun.arrivals = begun.pending = arrivals;
  begun.waited.resize(machine.threads.size());
  machine.barriers.push_back(std::move(begun));
}

void arrive(std::uint64_t* address, unsigned bytes) {
  const std::size_t number = number_of_barrier(address);
  Barrier& barrier = machine.barriers[number];
  if (barrier.pending == 0) fail("an arrival at a barrier whose phase has had all of them");
  --barrier.pending;
  barrier.expected += bytes;
  for (unsigned thread = 0; thread < machine.threads.size(); ++thread) {
    const Thread& other = machine.threads[thread];
    if (other.state == State::kAtPhase && other.barrier == number) release(thread);
  }
}

void copy_bulk(void* to, const void* from, std::size_t bytes, std::uint64_t* address) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
  };
  if (bytes % 16 != 0) fail("bulk copy of a size that CUDA refuses");
  if (!aligned(to) || !aligned(from)) fail("misaligned access: a bulk copy");
  Barrier& barrier = machine.barriers[number_of_barrier(address)];
  memory_begin_bulk_copy(__builtin_return_address(0), to, from, bytes);
  std::memset(to, kPoison, bytes);
  barrier.under_way.push_back({to, from, bytes, 0});
}

void wait_for_phase(std::uint64_t* address, unsigned parity) {
  const std::size_t number = number_of_barrier(address);
  while (true) {
    Barrier& barrier = machine.barriers[number];
    if (barrier.phases % 2 == parity && barrier.pending == 0 &&
        barrier.copied() == barrier.expected) {
      ++barrier.phases;
      barrier.pending = barrier.arrivals;
      barrier.expected = 0;
      for (const Copy& copy : barrier.under_way) {
        std::memcpy(copy.to, copy.from, copy.bytes);
        memory_end_bulk_copy(copy.to, copy.bytes, static_cast<unsigned>(number), barrier.phases);
      }
      barrier.under_way.clear();
    }
    if (barrier.phases % 2 != parity) {
      barrier.waited[machine.current] = barrier.phases;
      return;
    }
    machine.threads[machine.current].barrier = number;
    wait(State::kAtPhase);
  }
}

void fence_copies() {
  Thread& thread = machine.threads[machine.current];
  running.fences = ++thread.fences;
  thread.fence_epoch = machine.block_epoch;
}

std::uint16_t fences_of(unsigned thread) { return machine.threads[thread].fences; }
bool has_fenced_after(std::uint16_t block_epoch) {
  return machine.threads[machine.current].fence_epoch > block_epoch;
}
bool has_waited(unsigned barrier, unsigned phases) {
  return machine.barriers[barrier].waited[machine.current] >= phases;
}

bool allow_shared_memory(const void* kernel, int bytes) {
  if (bytes > settings().shared_memory) return false;
  // The limit is the kernel's: another host thread may have raised it and not launched yet.
  if (bytes < settings().shared_memory) {
    throw Fault("a launcher sets a kernel's shared memory to less than the device's most");
  }
  machine.allowed_shared[kernel] = bytes;
  return true;
}

void launch(const void* kernel, Dim3 grid, Dim3 block, std::size_t shared_bytes,
            const std::function<void()>& body) {
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535) {
    throw Fault("launch with a grid that CUDA refuses");
  }
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024) throw Fault("launch with a block that CUDA refuses");
  const auto allowed = machine.allowed_shared.find(kernel);
  const std::size_t limit = allowed == machine.allowed_shared.end()
                                ? kSharedWithoutAsking
                                : std::max(kSharedWithoutAsking, std::size_t(allowed->second));
  if (shared_bytes > limit) throw Fault("launch with more shared memory than was asked for");
  if (settings().instead) {
    settings().instead({kernel, grid, block, shared_bytes});
    return;
  }

  machine.fault.clear();
  machine.body = &body;
  machine.random.seed(settings().seed);
  machine.first_block = machine.blocks_run + 1;
  machine.shared.begin_launch(shared_bytes);
  memory_begin_launch();
  gridDim = grid;
  blockDim = block;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  const auto index_of = [&](std::uint64_t linear) {
    return Dim3(static_cast<unsigned>(linear % grid.x),
                static_cast<unsigned>(linear / grid.x % grid.y),
                static_cast<unsigned>(linear / grid.x / grid.y));
  };
  // Odd multiples run through all blocks in a mixed order without a list of them.
  std::uint64_t stride = 1;
  if (settings().schedule == Schedule::kRandom || settings().schedule == Schedule::kPriority) {
    stride = machine.random() % blocks | 1;
    while (std::gcd(stride, blocks) != 1) stride += 2;
  }
  try {
    for (std::uint64_t i = 0; i < blocks; ++i) {
      std::uint64_t linear = i * stride % blocks;
      if (settings().schedule == Schedule::kReverse) linear = blocks - 1 - i;
      const Dim3 index = index_of(linear);
      if (settings().only && !settings().only(index, grid)) continue;
      run_block(block, index);
    }
  } catch (...) {
    running.active = false;
    memory_end_launch();
    machine.shared.end_launch();
    throw;
  }
  memory_end_launch();
  machine.shared.end_launch();
}

}  // namespace lnl::emulator
