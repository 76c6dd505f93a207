// The CPU kernels for AVX-512 (F, BW, DQ, VL).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernel.h"

#ifdef LNL_CPU_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own avx512fintrin.h (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define LNL_HAS_F16C 1
#define LNL_HAS_AVX2 1
#define LNL_HAS_AVX512 1

namespace lnl::cpu {
namespace {

constexpr int kVectorBytes = 64;

#include "kernel_impl.h"

}  // namespace

#ifdef LNL_LINEAR_KERNELS
LinearKernel linear_avx512() { return run_linear; }
#else
const KernelTable& kernels_avx512() {
  static const KernelTable table{"AVX512",        count_units,   run_problem,
                                 linear_avx512(), count_targets, scale_units};
  return table;
}
#endif

}  // namespace lnl::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // LNL_CPU_X86
