// Large new tensors on huge pages: the kernel of the operating system takes longer to hand out and
// clear 4 KiB pages than the matrix products here take to fill them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lnl::cpu {

// Asks for huge pages where `tensor`, just allocated and not yet written, covers whole ones. A
// hint: where the system does not heed it, the pages are ordinary ones.
inline void use_huge_pages([[maybe_unused]] const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  constexpr uintptr_t kWorthwhile = 8 * kHugePage;
  if (tensor.nbytes() < kWorthwhile) {
    return;
  }
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + tensor.nbytes()) & ~(kHugePage - 1);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace lnl::cpu
