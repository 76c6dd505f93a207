// The CPU kernels for AVX2, FMA and F16C.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernel.h"

#ifdef LNL_CPU_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LNL_HAS_F16C 1
#define LNL_HAS_AVX2 1

namespace lnl::cpu {
namespace {

constexpr int kVectorBytes = 32;

#include "kernel_impl.h"

}  // namespace

#ifdef LNL_LINEAR_KERNELS
LinearKernel linear_avx2() { return run_linear; }
#else
const KernelTable& kernels_avx2() {
  static const KernelTable table{"AVX2",        count_units,   run_problem,
                                 linear_avx2(), count_targets, scale_units};
  return table;
}
#endif

}  // namespace lnl::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // LNL_CPU_X86
