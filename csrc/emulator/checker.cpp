#include "checker.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "emulator.h"

namespace lnl::emulator {

namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kArena = std::size_t{1} << 30;
constexpr std::size_t kCell = 2;
constexpr std::uintptr_t kSector = 32;
constexpr unsigned kWarp = 32;

bool same_warp(unsigned a, unsigned b) { return a / kWarp == b / kWarp; }

}  // namespace

Checker& checker() {
  static Checker instance;
  return instance;
}

Checker::Checker() : region_of_page_(kArena / kPage, -1) {
  void* memory = mmap(nullptr, kArena, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  arena_ = static_cast<unsigned char*>(memory);
}

// Regions are whole pages apart, so that a wrong access nearby lies in no region.
unsigned char* Checker::add(const std::string& name, std::size_t bytes, Kind kind, int& id) {
  Region region;
  region.name = name;
  region.bytes = bytes;
  region.pages = (bytes + kPage - 1) / kPage;
  region.kind = kind;
  region.cells.resize((bytes + kCell - 1) / kCell);
  if (next_page_ + region.pages + 2 > kArena / kPage) next_page_ = 1;
  const std::size_t first = next_page_;
  next_page_ += region.pages + 1;
  if (next_page_ > kArena / kPage) throw std::bad_alloc();
  region.begin = arena_ + first * kPage;
  id = -1;
  for (std::size_t i = 0; i < regions_.size() && id < 0; ++i) {
    if (regions_[i].begin == nullptr) id = static_cast<int>(i);
  }
  if (id < 0) {
    id = static_cast<int>(regions_.size());
    regions_.emplace_back();
  }
  for (std::size_t page = first; page < first + region.pages; ++page) {
    if (region_of_page_[page] >= 0) throw std::bad_alloc();
    region_of_page_[page] = id;
  }
  unsigned char* begin = region.begin;
  regions_[id] = std::move(region);
  return begin;
}

void Checker::remove(int id) {
  Region& region = regions_[id];
  const std::size_t first = (region.begin - arena_) / kPage;
  std::fill_n(region_of_page_.begin() + first, region.pages, -1);
  region = Region();
}

void Checker::mark_written(int id) {
  for (Cell& cell : regions_[id].cells) cell.written = true;
}

bool Checker::all_written(int id, std::size_t first) const {
  const auto& cells = regions_[id].cells;
  return std::all_of(cells.begin() + first / kCell, cells.end(),
                     [](const Cell& cell) { return cell.written; });
}

void Checker::fault(const Region& region, const std::string& what, std::uintptr_t address,
                    std::size_t bytes) const {
  const auto offset = static_cast<long long>(address) -
                      static_cast<long long>(reinterpret_cast<std::uintptr_t>(region.begin));
  fail(what + ": " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of " +
       region.name + " (" + std::to_string(region.bytes) + " bytes), thread " +
       std::to_string(running.thread));
}

// Null: the thread's own stack, constants.
Checker::Region* Checker::region_of(std::uintptr_t address) {
  const std::uintptr_t base = reinterpret_cast<std::uintptr_t>(arena_);
  if (address < base || address >= base + kArena) return nullptr;
  const int id = region_of_page_[(address - base) / kPage];
  if (id < 0) fail("access out of bounds of all memory, thread " + std::to_string(running.thread));
  return &regions_[id];
}

template <typename Function>
void Checker::for_copied(std::uintptr_t to, std::size_t bytes, Function function) {
  Region* region = region_of(to);
  if (region == nullptr || region->kind != Kind::kShared) {
    fail("an asynchronous copy to what is not shared memory");
  }
  const std::size_t offset = to - reinterpret_cast<std::uintptr_t>(region->begin);
  for (std::size_t cell = offset / kCell; cell <= (offset + bytes - 1) / kCell; ++cell) {
    function(*region, region->cells[cell]);
  }
}

void Checker::mark_copied_to(std::uintptr_t to, std::size_t bytes, bool under_way) {
  for_copied(to, bytes, [&](const Region&, Cell& cell) { cell.copied_to = under_way; });
}

void Checker::begin_copy(const void* place, std::uintptr_t to, std::uintptr_t from,
                         std::size_t bytes) {
  access(place, from, bytes, false, true);
  access(place, to, bytes, true, true);
  mark_copied_to(to, bytes, true);
}

void Checker::end_copy(std::uintptr_t to, std::size_t bytes) {
  mark_copied_to(to, bytes, false);
  access(nullptr, to, bytes, true, true);
}

void Checker::begin_bulk_copy(const void* place, std::uintptr_t to, std::uintptr_t from,
                              std::size_t bytes) {
  const Running& now = running;
  for_copied(to, bytes, [&](const Region& region, const Cell& cell) {
    const bool stored = cell.write_block == now.block && cell.phases == 0;
    if (stored && fences_of(cell.write_thread) == cell.write_fences &&
        !has_fenced_after(cell.write_block_epoch)) {
      fault(region, "bulk copy to where a store is not fenced", to, bytes);
    }
  });
  access(place, from, bytes, false, false);
  access(place, to, bytes, true, false);
  mark_copied_to(to, bytes, true);
}

void Checker::end_bulk_copy(std::uintptr_t to, std::size_t bytes, unsigned barrier,
                            unsigned phases) {
  const Running& now = running;
  for_copied(to, bytes, [&](const Region&, Cell& cell) {
    cell.copied_to = false;
    cell.write_thread = now.thread;
    cell.write_block_epoch = now.block_epoch;
    cell.write_warp_epoch = now.warp_epoch;
    cell.barrier = static_cast<std::uint16_t>(barrier);
    cell.phases = static_cast<std::uint16_t>(phases);
  });
}

void Checker::access(const void* place, std::uintptr_t address, std::size_t bytes, bool write,
                     bool must_be_aligned) {
  Region* found = region_of(address);
  if (found == nullptr) return;
  Region& region = *found;
  const std::size_t offset = address - reinterpret_cast<std::uintptr_t>(region.begin);
  if (offset + bytes > region.bytes) fault(region, "access out of bounds", address, bytes);
  if (must_be_aligned && address % bytes != 0) fault(region, "misaligned access", address, bytes);
  if (write && region.kind == Kind::kReadOnly) {
    fault(region, "store to read-only memory", address, bytes);
  }
  for (std::size_t cell = offset / kCell; cell <= (offset + bytes - 1) / kCell; ++cell) {
    if (region.cells[cell].copied_to) {
      fault(region, "access to where an asynchronous copy is under way", address, bytes);
    }
    if (write) {
      check_write(region, region.cells[cell]);
    } else {
      check_read(region, region.cells[cell]);
    }
  }
  if (counting && region.kind != Kind::kShared) count(place, region, address, bytes, write);
}

void Checker::check_read(const Region& region, Cell& cell) {
  const auto at = [&] {
    return reinterpret_cast<std::uintptr_t>(region.begin) + (&cell - region.cells.data()) * kCell;
  };
  const Running& now = running;
  const bool valid = region.kind == Kind::kShared ? cell.write_block == now.block : cell.written;
  if (!valid) fault(region, "read of memory that was never written", at(), kCell);
  if (cell.write_block >= now.first_block) {
    if (cell.write_block != now.block) fault(region, "race across blocks", at(), kCell);
    const bool ordered =
        cell.write_thread == now.thread || cell.write_block_epoch != now.block_epoch ||
        (same_warp(cell.write_thread, now.thread) && cell.write_warp_epoch != now.warp_epoch) ||
        (cell.phases > 0 && has_waited(cell.barrier, cell.phases));
    if (!ordered) fault(region, "race: read of another thread's store", at(), kCell);
  }
  if (cell.read_block < now.first_block) cell.read_by_blocks = false;
  if (cell.read_block != now.block) {
    cell.read_by_blocks = cell.read_block >= now.first_block;
    cell.read_by_warps = cell.read_by_lanes = false;
  } else if (cell.read_block_epoch != now.block_epoch) {
    cell.read_by_warps = cell.read_by_lanes = false;
  } else if (!same_warp(cell.read_thread, now.thread)) {
    cell.read_by_warps = true;
  } else if (cell.read_warp_epoch != now.warp_epoch) {
    cell.read_by_lanes = false;
  } else if (cell.read_thread != now.thread) {
    cell.read_by_lanes = true;
  }
  cell.read_block = now.block;
  cell.read_thread = now.thread;
  cell.read_block_epoch = now.block_epoch;
  cell.read_warp_epoch = now.warp_epoch;
}

void Checker::check_write(const Region& region, Cell& cell) {
  const auto at = [&] {
    return reinterpret_cast<std::uintptr_t>(region.begin) + (&cell - region.cells.data()) * kCell;
  };
  const Running& now = running;
  if (cell.write_block >= now.first_block && cell.write_block != now.block &&
      region.kind != Kind::kShared) {
    fault(region, "race across blocks: two stores", at(), kCell);
  }
  if (cell.write_block == now.block) {
    const bool ordered =
        cell.write_thread == now.thread || cell.write_block_epoch != now.block_epoch ||
        (same_warp(cell.write_thread, now.thread) && cell.write_warp_epoch != now.warp_epoch) ||
        (cell.phases > 0 && has_waited(cell.barrier, cell.phases));
    if (!ordered) fault(region, "race: two stores", at(), kCell);
  }
  if (cell.read_block >= now.first_block && region.kind != Kind::kShared &&
      (cell.read_block != now.block || cell.read_by_blocks)) {
    fault(region, "race across blocks: store to what another block reads", at(), kCell);
  }
  if (cell.read_block == now.block && cell.read_block_epoch == now.block_epoch) {
    const bool own_warp = same_warp(cell.read_thread, now.thread) && !cell.read_by_warps;
    const bool ordered = own_warp && (cell.read_warp_epoch != now.warp_epoch ||
                                      (cell.read_thread == now.thread && !cell.read_by_lanes));
    if (!ordered) fault(region, "race: store to what another thread reads", at(), kCell);
  }
  cell.written = true;
  cell.phases = 0;
  cell.write_fences = now.fences;
  cell.write_block = now.block;
  cell.write_thread = now.thread;
  cell.write_block_epoch = now.block_epoch;
  cell.write_warp_epoch = now.warp_epoch;
}

void Checker::count(const void* place, const Region& region, std::uintptr_t address,
                    std::size_t bytes, bool write) {
  const std::uint32_t visit = visits_[{place, &region, running.thread}]++;
  Request& request = requests_[{{place, &region, running.thread / kWarp}, visit}];
  request.region = &region;
  request.write = write;
  request.bytes += bytes;
  for (std::uintptr_t sector = address / kSector; sector <= (address + bytes - 1) / kSector;
       ++sector) {
    request.sectors.push_back(sector);
  }
}

void Checker::end_block() {
  for (auto& [key, request] : requests_) {
    std::sort(request.sectors.begin(), request.sectors.end());
    const auto sectors = static_cast<std::uint64_t>(
        std::unique(request.sectors.begin(), request.sectors.end()) - request.sectors.begin());
    Traffic& total = traffic[request.region->name];
    (request.write ? total.written_bytes : total.read_bytes) += request.bytes;
    (request.write ? total.written_sectors : total.read_sectors) += sectors;
    (request.write ? total.written_requests : total.read_requests) += 1;
  }
  requests_.clear();
  visits_.clear();
}

bool has_hooks() { return true; }
void start_counting() {
  checker().traffic.clear();
  checker().counting = true;
}
std::map<std::string, Traffic> stop_counting() {
  checker().counting = false;
  return checker().traffic;
}
void memory_begin_copy(const void* place, void* to, const void* from, std::size_t bytes) {
  checker().begin_copy(place, reinterpret_cast<std::uintptr_t>(to),
                       reinterpret_cast<std::uintptr_t>(from), bytes);
}
void memory_use_barrier(void* barrier, bool begin) {
  checker().access(nullptr, reinterpret_cast<std::uintptr_t>(barrier), 8, begin, true);
}
void memory_begin_bulk_copy(const void* place, void* to, const void* from, std::size_t bytes) {
  checker().begin_bulk_copy(place, reinterpret_cast<std::uintptr_t>(to),
                            reinterpret_cast<std::uintptr_t>(from), bytes);
}
void memory_end_bulk_copy(void* to, std::size_t bytes, unsigned barrier, unsigned phases) {
  checker().end_bulk_copy(reinterpret_cast<std::uintptr_t>(to), bytes, barrier, phases);
}
void memory_end_copy(void* to, std::size_t bytes) {
  checker().end_copy(reinterpret_cast<std::uintptr_t>(to), bytes);
}
void memory_begin_launch() {}
void memory_end_block() { checker().end_block(); }
void memory_end_launch() { checker().end_block(); }

}  // namespace lnl::emulator

// What the compiler calls for every access of code compiled with -fsanitize=thread.
namespace {

inline void hook(const void* place, void* address, std::size_t bytes, bool write, bool aligned) {
  if (!lnl::emulator::running.active) return;
  lnl::emulator::checker().access(place, reinterpret_cast<std::uintptr_t>(address), bytes, write,
                                  aligned);
}

}  // namespace

#define LNL_HOOK(name, bytes, write, aligned)                          \
  void __tsan_##name(void* address) {                                  \
    hook(__builtin_return_address(0), address, bytes, write, aligned); \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
LNL_HOOK(read1, 1, false, true)
LNL_HOOK(read2, 2, false, true)
LNL_HOOK(read4, 4, false, true)
LNL_HOOK(read8, 8, false, true)
LNL_HOOK(read16, 16, false, true)
LNL_HOOK(write1, 1, true, true)
LNL_HOOK(write2, 2, true, true)
LNL_HOOK(write4, 4, true, true)
LNL_HOOK(write8, 8, true, true)
LNL_HOOK(write16, 16, true, true)
LNL_HOOK(unaligned_read2, 2, false, false)
LNL_HOOK(unaligned_read4, 4, false, false)
LNL_HOOK(unaligned_read8, 8, false, false)
LNL_HOOK(unaligned_read16, 16, false, false)
LNL_HOOK(unaligned_write2, 2, true, false)
LNL_HOOK(unaligned_write4, 4, true, false)
LNL_HOOK(unaligned_write8, 8, true, false)
LNL_HOOK(unaligned_write16, 16, true, false)
void __tsan_read_range(void* address, std::size_t bytes) {
  if (bytes > 0) hook(__builtin_return_address(0), address, bytes, false, false);
}
void __tsan_write_range(void* address, std::size_t bytes) {
  if (bytes > 0) hook(__builtin_return_address(0), address, bytes, true, false);
}
}
