// The part of CUDA that the kernels of csrc/cuda use, for the CPU: found instead of NVIDIA's header
// when this folder comes first on the include path.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

// Vector types of one access each, so that a checker sees the access whole.
typedef unsigned int uint2 __attribute__((vector_size(8)));
typedef unsigned int uint4 __attribute__((vector_size(16)));

using dim3 = lnl::emulator::Dim3;
using cudaStream_t = struct CUstream_st*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& settings = lnl::emulator::settings();
  *value = attribute == cudaDevAttrMultiProcessorCount ? settings.multiprocessors
                                                       : settings.shared_memory;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute, int bytes) {
  return lnl::emulator::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes)
             ? cudaSuccess
             : cudaErrorInvalidValue;
}

#define LNL_LAUNCH(kernel, grid, block, shared, stream, ...)                                 \
  (static_cast<void>(stream),                                                                \
   ::lnl::emulator::launch(reinterpret_cast<const void*>(kernel), (grid), (block), (shared), \
                           [&] { kernel(__VA_ARGS__); }))
#define LNL_BULK_COPIES (::lnl::emulator::settings().bulk_copies)
#define LNL_SHARED(name) unsigned char* name = ::lnl::emulator::shared_memory()

// A barrier is known by its place in the source: compilers duplicate calls.
#define __syncthreads() ::lnl::emulator::block_barrier(__FILE__, __LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu) { lnl::emulator::warp_barrier(mask); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = lnl::emulator::exchange(mask, bits, lane_mask, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
void __stwb(T* address, T value) {
  *address = value;
}

inline std::uint32_t __umulhi(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>((std::uint64_t{a} * b) >> 32);
}
inline std::uint64_t __umul64hi(std::uint64_t a, std::uint64_t b) {
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

// The approximate functions, off by up to their documented error where noise is asked for.
inline float __fdividef(float a, float b) { return lnl::emulator::with_noise(a / b, 2); }
#define exp2f(x) (::lnl::emulator::with_noise(::exp2f(x), 2))
#define log1pf(x) (::lnl::emulator::with_noise(::log1pf(x), 1))
