// Asynchronous copies to shared memory, for the CPU.
#pragma once

#include "emulator.h"

// Inlined, so that every call of a kernel is a place of its own.
__attribute__((always_inline)) inline void __pipeline_memcpy_async(void* to, const void* from,
                                                                   std::size_t bytes) {
  lnl::emulator::copy_async(to, from, bytes);
}
inline void __pipeline_commit() { lnl::emulator::commit_copies(); }
inline void __pipeline_wait_prior(std::size_t groups) { lnl::emulator::wait_for_copies(groups); }
