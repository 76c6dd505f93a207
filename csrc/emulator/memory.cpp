#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "checker.h"

namespace lnl::emulator {

namespace {

constexpr std::size_t kAlignment = 256;

#if defined(LNL_EMULATOR_HOOKS)
unsigned char* reserve(const std::string& name, std::size_t bytes, Kind kind, int& id) {
  return checker().add(name, bytes, kind, id);
}
void give_back(void*, int id) { checker().remove(id); }
#else
// Sized exactly, so that AddressSanitizer sees the first byte beyond.
unsigned char* reserve(const std::string&, std::size_t bytes, Kind, int&) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, bytes == 0 ? 1 : bytes) != 0) throw std::bad_alloc();
  return static_cast<unsigned char*>(memory);
}
void give_back(void* memory, int) { std::free(memory); }
#endif

}  // namespace

Buffer::Buffer(std::string name, std::size_t bytes, Access access, const void* contents)
    : bytes_(bytes) {
  data_ =
      reserve(name, bytes, access == Access::kReadOnly ? Kind::kReadOnly : Kind::kReadWrite, id_);
  if (contents != nullptr) {
    std::memcpy(data_, contents, bytes);
  } else {
    std::memset(data_, kPoison, bytes);
  }
#if defined(LNL_EMULATOR_HOOKS)
  if (contents != nullptr) checker().mark_written(id_);
#endif
}

Buffer::~Buffer() { give_back(data_, id_); }

bool Buffer::is_written([[maybe_unused]] std::size_t first) const {
#if defined(LNL_EMULATOR_HOOKS)
  return checker().all_written(id_, first);
#else
  return true;
#endif
}

void SharedMemory::begin_launch(std::size_t bytes) {
  bytes_ = bytes;
  data_ = reserve("shared memory", bytes, Kind::kShared, id_);
}

void SharedMemory::begin_block() { std::memset(data_, kPoison, bytes_); }

void SharedMemory::end_launch() {
  give_back(data_, id_);
  data_ = nullptr;
}

#if !defined(LNL_EMULATOR_HOOKS)
bool has_hooks() { return false; }
void start_counting() {}
std::map<std::string, Traffic> stop_counting() { return {}; }
void memory_begin_copy(const void*, void*, const void*, std::size_t) {}
void memory_end_copy(void*, std::size_t) {}
void memory_use_barrier(void*, bool) {}
void memory_begin_bulk_copy(const void*, void*, const void*, std::size_t) {}
void memory_end_bulk_copy(void*, std::size_t, unsigned, unsigned) {}
void memory_begin_launch() {}
void memory_end_block() {}
void memory_end_launch() {}
#endif

}  // namespace lnl::emulator
