// Scalar types, their accumulation type, elementary functions, wide memory accesses and divisions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// The two places where a launch or a kernel must look different under the emulator, whose
// cuda_runtime.h defines both.
#ifndef LNL_LAUNCH
#define LNL_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif
#ifndef LNL_SHARED
#define LNL_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace lnl::cuda {

template <typename T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <typename T>
using Accumulation = typename AccumulationOf<T>::type;

__host__ __device__ inline float widen(float value) { return value; }
__host__ __device__ inline double widen(double value) { return value; }
__host__ __device__ inline float widen(__half value) { return __half2float(value); }
__host__ __device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T narrow(Accumulation<T> value);
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline double narrow<double>(double value) {
  return value;
}
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <typename A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

// Below this distance from the maximum exp is 0 in either type; a finite stand-in for -inf keeps
// 0 * distance at 0.
template <typename A>
__device__ constexpr A lowest_distance() {
  return A(-1000);
}

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// max(distance, lowest_distance) that keeps NaN, which fmaxf would drop.
__device__ inline float clamp_distance(float distance) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float clamped;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(distance), "f"(lowest_distance<float>()));
  return clamped;
#else
  return distance < lowest_distance<float>() ? lowest_distance<float>() : distance;
#endif
}
__device__ inline double clamp_distance(double distance) {
  return distance < lowest_distance<double>() ? lowest_distance<double>() : distance;
}

// Likewise without NaN, as the gradients take it.
__device__ inline float finite_distance(float distance) {
  return fmaxf(distance, lowest_distance<float>());
}
__device__ inline double finite_distance(double distance) {
  return distance > lowest_distance<double>() ? distance : lowest_distance<double>();
}

// 2^x with flushed subnormals: one MUFU instruction, at most 2 ulp off.
__device__ inline float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return exp2f(x);
#endif
}

// 1 / x for x in [1, 2^126]: one MUFU instruction, at most 1 ulp off.
__device__ inline float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return __fdividef(1.0f, x);
#endif
}
__device__ inline double reciprocal(double x) { return 1.0 / x; }

__device__ inline float log1p_of(float x) { return log1pf(x); }
__device__ inline double log1p_of(double x) { return log1p(x); }

// exp of a clamped distance. The rounding of distance * log2(e) costs |distance| * 6e-8 of relative
// error; float32 logits get it back with two more multiply-adds, 16-bit ones do not need it.
template <typename T>
__device__ inline Accumulation<T> exp_distance(Accumulation<T> distance) {
  if constexpr (std::is_same_v<T, double>) {
    return exp(distance);
  } else {
    const float scaled = distance * 1.4426950408889634f;
    const float power = exp2_fast(scaled);
    if constexpr (std::is_same_v<T, float>) {
      return fmaf(power, fmaf(-scaled, 0.6931471805599453f, distance), power);
    } else {
      return power;
    }
  }
}

// Words that one load or store instruction moves.
template <int Bytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};

// One access of Count adjacent values; the address must be a multiple of its size.
template <typename T, int Count>
struct Pack {
  T values[Count] = {};

  __device__ static Pack load(const T* address) {
    using Word = typename WordOf<sizeof(T) * Count>::type;
    const Word word = *reinterpret_cast<const Word*>(address);
    Pack pack;
    memcpy(pack.values, &word, sizeof(Word));
    return pack;
  }
  __device__ void store(T* address) const {
    using Word = typename WordOf<sizeof(T) * Count>::type;
    Word word;
    memcpy(&word, values, sizeof(Word));
    *reinterpret_cast<Word*>(address) = word;
  }
  // To global memory. nvcc takes plain stores apart where it can share them with an unaligned path.
  __device__ void store_global(T* address) const {
    using Word = typename WordOf<sizeof(T) * Count>::type;
    Word word;
    memcpy(&word, values, sizeof(Word));
    __stwb(reinterpret_cast<Word*>(address), word);
  }
};

// Values in one 128-bit access.
template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

// Four adjacent accumulators, two 128-bit accesses for double.
__device__ inline void load_four(const float* address, float (&values)[4]) {
  const auto pack = Pack<float, 4>::load(address);
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = pack.values[i];
}
__device__ inline void load_four(const double* address, double (&values)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto pack = Pack<double, 2>::load(address + 2 * half);
#pragma unroll
    for (int i = 0; i < 2; ++i) values[2 * half + i] = pack.values[i];
  }
}
__device__ inline void store_four(float* address, const float (&values)[4]) {
  Pack<float, 4> pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) pack.values[i] = values[i];
  pack.store(address);
}
__device__ inline void store_four(double* address, const double (&values)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Pack<double, 2> pack;
#pragma unroll
    for (int i = 0; i < 2; ++i) pack.values[i] = values[2 * half + i];
    pack.store(address + 2 * half);
  }
}

// Elements first .. first + kWide - 1 of a row of `count`; those outside of it read as `fill`.
template <typename T, typename Index>
__device__ inline void load_window(const T* row, Index first, Index count, bool wide,
                                   Accumulation<T> fill, Accumulation<T> (&values)[kWide<T>]) {
  if (wide && first >= 0 && first + kWide<T> <= count) {
    const auto pack = Pack<T, kWide<T>>::load(row + first);
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) values[i] = widen(pack.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) {
      const Index element = first + i;
      values[i] = element >= 0 && element < count ? widen(row[element]) : fill;
    }
  }
}

template <typename T, typename Index>
__device__ inline void store_window(T* row, Index first, Index count, bool wide,
                                    const Accumulation<T> (&values)[kWide<T>]) {
  if (wide && first >= 0 && first + kWide<T> <= count) {
    Pack<T, kWide<T>> pack;
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) pack.values[i] = narrow<T>(values[i]);
    pack.store_global(row + first);
  } else {
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) {
      const Index element = first + i;
      if (element >= 0 && element < count) row[element] = narrow<T>(values[i]);
    }
  }
}

// Starts to copy such a window into shared memory, where it arrives at the wait for its group. What
// is not aligned or not whole is copied at once, with -inf for what is outside of the row.
template <typename T, typename Index>
__device__ inline void copy_window(const T* row, Index first, Index count, bool wide, T* to) {
  if (wide && first >= 0 && first + kWide<T> <= count) {
    __pipeline_memcpy_async(to, row + first, 16);
  } else {
    Pack<T, kWide<T>> pack;
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) {
      const Index element = first + i;
      const bool inside = element >= 0 && element < count;
      pack.values[i] = inside ? row[element] : narrow<T>(-kInfinity<Accumulation<T>>);
    }
    pack.store(to);
  }
}

// A window that has arrived.
template <typename T>
__device__ inline void load_staged(const T* place, Accumulation<T> (&values)[kWide<T>]) {
  const auto pack = Pack<T, kWide<T>>::load(place);
#pragma unroll
  for (int i = 0; i < kWide<T>; ++i) values[i] = widen(pack.values[i]);
}

// Where window 0 of a row begins, in elements before the row: windows lie on 32-byte sectors of
// memory, wherever the row begins.
template <typename T>
__device__ inline int elements_before(const T* row) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % 32 / sizeof(T));
}

// Quotients by multiplication, in 32 bits where all numbers are below 2^31, else in 64: a division
// of 64 bits would be a hundred instructions in every kernel.
struct Divider {
  std::uint64_t wide_multiplier = 1;
  std::uint32_t multiplier = 1;
  std::uint32_t shift = 0;
  bool narrow = true;

  Divider() = default;
  // An empty tensor's 0 positions divide nothing, and must not divide here either.
  Divider(std::int64_t by, std::int64_t largest_dividend) {
    const std::uint64_t divisor = by < 1 ? 1 : by;
    constexpr std::int64_t limit = std::int64_t{1} << 31;
    narrow = largest_dividend < limit && by < limit;
    while ((std::uint64_t{1} << shift) < divisor) ++shift;
    // 2^32 or 2^64 times (2^shift - divisor) / divisor, and 1: the quotient's bits one by one.
    std::uint64_t rest = (std::uint64_t{1} << shift) - divisor, bits = 0;
    for (int bit = 0; bit < (narrow ? 32 : 64); ++bit) {
      rest *= 2;
      bits *= 2;
      if (rest >= divisor) rest -= divisor, ++bits;
    }
    if (narrow) multiplier = static_cast<std::uint32_t>(bits + 1);
    if (!narrow) wide_multiplier = bits + 1;
  }

  // For dividends and divisors that are known to be below 2^31.
  __device__ int divide_int(int dividend) const {
    const auto value = static_cast<std::uint32_t>(dividend);
    return static_cast<int>((__umulhi(value, multiplier) + value) >> shift);
  }
  __device__ std::int64_t divide(std::int64_t dividend) const {
    if (narrow) return divide_int(static_cast<int>(dividend));
    const auto value = static_cast<std::uint64_t>(dividend);
    return static_cast<std::int64_t>((__umul64hi(value, wide_multiplier) + value) >> shift);
  }
};

}  // namespace lnl::cuda
