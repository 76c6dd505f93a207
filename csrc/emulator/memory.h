// Device memory of the emulator. With LNL_EMULATOR_HOOKS every access of kernels that were compiled
// with -fsanitize=thread is checked against it and counted; without, buffers are plain memory
// (which AddressSanitizer surrounds with redzones).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace lnl::emulator {

enum class Access { kReadOnly, kReadWrite };

constexpr unsigned char kPoison = 0xff;  // NaN in every floating point type

// Memory for a kernel, 256-byte aligned as cudaMalloc's. Contents are poisoned with NaN unless
// `contents` are given; only what was given or written may be read.
class Buffer {
 public:
  Buffer(std::string name, std::size_t bytes, Access access, const void* contents = nullptr);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  // Whether kernels have written every byte from this offset on; always true without hooks.
  bool is_written(std::size_t first = 0) const;

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  int id_ = -1;
};

// Dynamic shared memory, poisoned anew for every block.
class SharedMemory {
 public:
  void begin_launch(std::size_t bytes);
  void begin_block();
  void end_launch();
  unsigned char* data() const { return data_; }

 private:
  unsigned char* data_ = nullptr;
  std::size_t bytes_ = 0;
  int id_ = -1;
};

// What the warps of the counted launches asked of one buffer.
struct Traffic {
  std::uint64_t read_bytes = 0;
  std::uint64_t written_bytes = 0;
  std::uint64_t read_requests = 0;  // warp instructions
  std::uint64_t written_requests = 0;
  std::uint64_t read_sectors = 0;  // of 32 bytes, per request
  std::uint64_t written_sectors = 0;
};

bool has_hooks();
void start_counting();
std::map<std::string, Traffic> stop_counting();  // by the name of the buffer

// An asynchronous copy reads and writes from its beginning to its end.
void memory_begin_copy(const void* place, void* to, const void* from, std::size_t bytes);
void memory_end_copy(void* to, std::size_t bytes);
// Likewise a bulk copy, which ends with that many phases of a barrier, and that barrier's own word.
void memory_use_barrier(void* barrier, bool begin);
void memory_begin_bulk_copy(const void* place, void* to, const void* from, std::size_t bytes);
void memory_end_bulk_copy(void* to, std::size_t bytes, unsigned barrier, unsigned phases);
void memory_begin_launch();
void memory_end_block();
void memory_end_launch();

}  // namespace lnl::emulator
