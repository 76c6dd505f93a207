// Runs CUDA kernels on the CPU: a fiber per thread, blocks one after another, a switch of fibers
// only where threads wait for each other. It shows wrong results and wrong synchronisation; it does
// not show what ptxas makes of the code, the hardware's memory model, the bits of its
// approximations, or time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace lnl::emulator {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Who runs next among the threads (and blocks) that can. Random alone misses write-after-read
// hazards; reverse and fixed priorities find them.
enum class Schedule { kForward, kReverse, kRandom, kPriority };

struct Launch {
  const void* kernel = nullptr;
  Dim3 grid, block;
  std::size_t shared_bytes = 0;
};

struct Settings {
  Schedule schedule = Schedule::kForward;
  std::uint64_t seed = 1;
  bool noise = false;  // perturb approximate functions within their documented error
  int multiprocessors = 2;
  int shared_memory = 227 * 1024;  // most that a block may opt in to
  bool bulk_copies = false;        // the device has them
  // Blocks to run, all without it: for launches too large to be run whole.
  std::function<bool(Dim3 block, Dim3 grid)> only;
  // Gets every launch that CUDA would accept, which is then not run: its pointers may be anything.
  std::function<void(const Launch& launch)> instead;
};

Settings& settings();

// A fault of the kernel under test: a hazard, a wrong access, a barrier not reached by all.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Host side.
void launch(const void* kernel, Dim3 grid, Dim3 block, std::size_t shared_bytes,
            const std::function<void()>& body);
bool allow_shared_memory(const void* kernel, int bytes);

// Device side, called from fibers.
unsigned char* shared_memory();
void block_barrier(const char* file, int line);
void warp_barrier(unsigned mask);
std::uint64_t exchange(unsigned mask, std::uint64_t value, int lane_mask, int width);
float with_noise(float value, int ulps);
// Asynchronous copies of the running thread, in groups. The data arrive at the wait for their
// group, which is the latest moment that CUDA allows; until then their place holds NaN.
void copy_async(void* to, const void* from, std::size_t bytes);
void commit_copies();
void wait_for_copies(std::size_t groups_under_way);
// Bulk copies, with barriers in shared memory. A phase is complete when its arrivals and as many
// bytes as these expect are there; the data arrive when a thread waits for that, and a wait that
// never ends is a fault.
void begin_barrier(std::uint64_t* barrier, unsigned arrivals);
void arrive(std::uint64_t* barrier, unsigned bytes);
void copy_bulk(void* to, const void* from, std::size_t bytes, std::uint64_t* barrier);
void wait_for_phase(std::uint64_t* barrier, unsigned parity);
void fence_copies();  // orders the thread's stores before copies

// Ends the running thread's launch with a Fault; called from fibers and memory hooks.
[[noreturn]] void fail(const std::string& message);

// The running thread, for the memory checker.
struct Running {
  bool active = false;
  std::uint32_t block = 0;        // counts all blocks ever run
  std::uint32_t first_block = 0;  // of this launch
  std::uint16_t thread = 0;
  std::uint16_t block_epoch = 0;  // barriers passed by the block
  std::uint16_t warp_epoch = 0;   // barriers passed by the warp
  std::uint16_t fences = 0;       // of the thread
};
extern Running running;

// For the checker: a thread's fences, whether the running thread has made one since the block
// passed its barrier of this epoch, and whether it has waited for that many phases of a barrier.
std::uint16_t fences_of(unsigned thread);
bool has_fenced_after(std::uint16_t block_epoch);
bool has_waited(unsigned barrier, unsigned phases);

}  // namespace lnl::emulator
