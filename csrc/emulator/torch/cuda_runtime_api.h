// What csrc/cuda's torch side asks CUDA's runtime, answered for the emulated device.
#pragma once

#include "../emulator.h"

enum cudaError_t : int { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };

namespace lnl::emulator {

inline int multiprocessors = 2;

}  // namespace lnl::emulator

inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? lnl::emulator::multiprocessors
                                                       : lnl::emulator::settings().shared_memory;
  return cudaSuccess;
}
