// Checks single accesses of emulated threads: bounds, alignment, stores to read-only memory, reads
// of what nobody wrote, and races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "memory.h"

namespace lnl::emulator {

enum class Kind { kReadOnly, kReadWrite, kShared };

class Checker {
 public:
  Checker();

  unsigned char* add(const std::string& name, std::size_t bytes, Kind kind, int& id);
  void remove(int id);
  void mark_written(int id);
  bool all_written(int id, std::size_t first) const;  // from this offset on

  // An access of the running thread by the instruction at `place`.
  void access(const void* place, std::uintptr_t address, std::size_t bytes, bool write,
              bool must_be_aligned);

  // An asynchronous copy of the running thread. Nobody may touch its place while it is under way.
  void begin_copy(const void* place, std::uintptr_t to, std::uintptr_t from, std::size_t bytes);
  void end_copy(std::uintptr_t to, std::size_t bytes);
  // Likewise in bulk: what has arrived may be touched by who has waited for those phases.
  void begin_bulk_copy(const void* place, std::uintptr_t to, std::uintptr_t from,
                       std::size_t bytes);
  void end_bulk_copy(std::uintptr_t to, std::size_t bytes, unsigned barrier, unsigned phases);

  bool counting = false;
  std::map<std::string, Traffic> traffic;
  void end_block();

 private:
  // Who last touched two bytes. Epochs are of barriers passed; a block's number tells its launch.
  struct Cell {
    std::uint32_t write_block = 0;
    std::uint32_t read_block = 0;
    std::uint16_t write_thread = 0, write_block_epoch = 0, write_warp_epoch = 0;
    std::uint16_t read_thread = 0, read_block_epoch = 0, read_warp_epoch = 0;
    std::uint16_t write_fences = 0;         // the writer's, until then
    std::uint16_t barrier = 0, phases = 0;  // of the bulk copy that came last, if phases > 0
    bool written = false;
    bool copied_to = false;       // an asynchronous copy is under way
    bool read_by_blocks = false;  // several
    bool read_by_warps = false;   // several, since the last barrier of the block
    bool read_by_lanes = false;   // several of one warp, since its last barrier
  };
  struct Region {
    std::string name;
    unsigned char* begin = nullptr;
    std::size_t bytes = 0;
    std::size_t pages = 0;
    Kind kind = Kind::kReadWrite;
    std::vector<Cell> cells;
  };

  Region* region_of(std::uintptr_t address);
  // function(region, cell) for the cells of a copy's place.
  template <typename Function>
  void for_copied(std::uintptr_t to, std::size_t bytes, Function function);
  void mark_copied_to(std::uintptr_t to, std::size_t bytes, bool under_way);
  void check_read(const Region& region, Cell& cell);
  void check_write(const Region& region, Cell& cell);
  void count(const void* place, const Region& region, std::uintptr_t address, std::size_t bytes,
             bool write);
  [[noreturn]] void fault(const Region& region, const std::string& what, std::uintptr_t address,
                          std::size_t bytes) const;

  unsigned char* arena_ = nullptr;
  std::vector<int> region_of_page_;
  std::vector<Region> regions_;
  std::size_t next_page_ = 1;

  // Requests of warps: accesses of one instruction to one region, the n-th time that each lane
  // comes by.
  using Instruction = std::tuple<const void*, const Region*, unsigned>;  // of a thread or a warp
  struct Request {
    const Region* region;
    bool write;
    std::uint64_t bytes = 0;
    std::vector<std::uintptr_t> sectors;
  };
  std::map<Instruction, std::uint32_t> visits_;
  std::map<std::pair<Instruction, std::uint32_t>, Request> requests_;
};

Checker& checker();

}  // namespace lnl::emulator
