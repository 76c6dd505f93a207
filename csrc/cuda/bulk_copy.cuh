// Bulk copies from global to shared memory, which sm_90 and newer have: one thread asks for many
// bytes, and whoever waits for a phase of the copies' barrier finds them there. All of it comes
// from CUDA's own wrappers of PTX; the emulator has a <cuda/ptx> of its own.
#pragma once

#include <cstdint>
#include <cuda/ptx>

// Whether the code being compiled may use them; the emulator's cuda_runtime.h says by its settings.
#ifndef LNL_BULK_COPIES
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LNL_BULK_COPIES true
#else
#define LNL_BULK_COPIES false
#endif
#endif

namespace lnl::cuda {

using BulkBarrier = std::uint64_t;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// Never called, but nvcc's -G keeps the calls.
__device__ inline void order_stores_before_copies() {}
__device__ inline void begin_barrier(BulkBarrier*) {}
__device__ inline void start_copy(void*, const void*, unsigned, BulkBarrier*) {}
__device__ inline void wait_for_copy(BulkBarrier*, unsigned) {}
#else

// Stores and copies to the same place are otherwise in no order: for a thread that has stored, or
// that comes after those by a barrier, before the next copy to that place is asked for.
__device__ inline void order_stores_before_copies() {
  ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
}

// Of a barrier whose phases each take one start_copy. Its first phase has parity 0.
__device__ inline void begin_barrier(BulkBarrier* barrier) {
  ::cuda::ptx::mbarrier_init(barrier, 1u);
}

// Both addresses and the number of bytes are multiples of 16; 0 bytes complete the phase at once.
// Whoever reads the place must have done so, and the caller know it by a barrier.
__device__ inline void start_copy(void* to, const void* from, unsigned bytes,
                                  BulkBarrier* barrier) {
  namespace ptx = ::cuda::ptx;
  ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier,
                                 bytes);
  // For an address in a cluster's memory sm_120 has code, and registers, that asks whose it is.
#if __cccl_ptx_isa >= 860
  constexpr auto own_memory = ptx::space_shared;
#else
  constexpr auto own_memory = ptx::space_cluster;  // before CUDA 12.8
#endif
  if (bytes > 0) ptx::cp_async_bulk(own_memory, ptx::space_global, to, from, bytes, barrier);
}

// For every thread that reads what was copied.
__device__ inline void wait_for_copy(BulkBarrier* barrier, unsigned parity) {
  while (!::cuda::ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}
#endif

}  // namespace lnl::cuda
