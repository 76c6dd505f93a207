#include "kept_memory.h"

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(MADV_FREE) && defined(MADV_HUGEPAGE)
#define LNL_KEEPS_MEMORY 1
#endif

namespace lnl::cpu {

#ifdef LNL_KEEPS_MEMORY

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostBlocks = 4;  // kept and unused
// Marking takes a flush of address translations: of a step of 0.4 ms it were a sixth, of one of 23
// ms a thirtieth. What is smaller stays unmarked, as malloc does it.
constexpr size_t kMarked = size_t{8} << 20;

struct Block {
  char* data = nullptr;
  size_t bytes = 0;
};

// Whole, aligned huge pages.
Block map(size_t bytes) {
  void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "lnl_ext cannot allocate ", bytes, " bytes");
  }
  char* const begin = static_cast<char*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) {
    munmap(begin, before);
  }
  if (before < kHugePage) {
    munmap(begin + before + bytes, kHugePage - before);
  }
  madvise(begin + before, bytes, MADV_HUGEPAGE);  // a hint
  return {begin + before, bytes};
}

void unmap(const Block& block) { munmap(block.data, block.bytes); }

// The lock is only ever tried: whoever does not get it maps or unmaps for itself. So a child that
// was forked while another thread held it does not hang.
class KeptMemory final : public c10::Allocator {
 public:
  // Never destroyed: tensors may live longer than static objects.
  static KeptMemory& instance() {
    static KeptMemory* const only = new KeptMemory;
    return *only;
  }

  c10::DataPtr allocate(size_t size) override {
    if (size < static_cast<size_t>(kKeptBytes)) {  // a tensor of ours that is resized
      return c10::GetCPUAllocator()->allocate(size);
    }
    const size_t bytes = (size + kHugePage - 1) / kHugePage * kHugePage;
    Block block = take(bytes);
    if (block.data == nullptr) {
      block = map(bytes);
    }
    c10::profiledCPUMemoryReporter().New(block.data, size);
    return {block.data, new Block(block), &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }

  int64_t release() {
    std::vector<Block> blocks;
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock.owns_lock()) {
        blocks.swap(kept_);
      }
    }
    int64_t bytes = 0;
    for (const Block& block : blocks) {
      bytes += static_cast<int64_t>(block.bytes);
      unmap(block);
    }
    return bytes;
  }

 private:
  // The last block that is no more than a quarter too large.
  Block take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) {
      return {};
    }
    const auto fits = [bytes](const Block& block) {
      return block.bytes >= bytes && block.bytes - bytes <= bytes / 4;
    };
    const auto found = std::find_if(kept_.rbegin(), kept_.rend(), fits);
    if (found == kept_.rend()) {
      return {};
    }
    const Block block = *found;
    kept_.erase(std::next(found).base());
    return block;
  }

  void keep(const Block& block) {
    // Refused by systems before 4.5 and for locked pages.
    if (block.bytes > kMarked && madvise(block.data, block.bytes, MADV_FREE) != 0) {
      return unmap(block);
    }
    Block surplus = block;
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock.owns_lock()) {
        kept_.push_back(block);
        surplus = {};
        if (kept_.size() > kMostBlocks) {
          surplus = kept_.front();
          kept_.erase(kept_.begin());
        }
      }
    }
    if (surplus.data != nullptr) {
      unmap(surplus);
    }
  }

  static void give_back(void* context) {
    auto* const block = static_cast<Block*>(context);
    c10::profiledCPUMemoryReporter().Delete(block->data);
    instance().keep(*block);
    delete block;
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // the last one given back at the end
};

at::Tensor kept_tensor(int64_t bytes, at::IntArrayRef sizes, at::IntArrayRef strides,
                       const at::TensorOptions& options) {
  KeptMemory& memory = KeptMemory::instance();
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                       memory.allocate(static_cast<size_t>(bytes)), &memory, /*resizable=*/true);
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), options.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return tensor;
}

}  // namespace

at::Tensor new_tensor(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t bytes =
      c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes < kKeptBytes) {
    return at::empty(sizes, options);
  }
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * sizes[i];
  }
  return kept_tensor(bytes, sizes, strides, options);
}

at::Tensor new_tensor_like(const at::Tensor& dense) {
  const auto bytes = static_cast<int64_t>(dense.nbytes());
  if (bytes < kKeptBytes || !dense.is_non_overlapping_and_dense()) {
    return at::empty_like(dense);
  }
  return kept_tensor(bytes, dense.sizes(), dense.strides(), dense.options());
}

int64_t release_kept_memory() { return KeptMemory::instance().release(); }

#else

at::Tensor new_tensor(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

at::Tensor new_tensor_like(const at::Tensor& dense) { return at::empty_like(dense); }

int64_t release_kept_memory() { return 0; }

#endif

}  // namespace lnl::cpu
