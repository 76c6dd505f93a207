// The CPU kernels for AVX2, FMA and F16C.
#include "kernel.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

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

using std::index_sequence;
using std::make_index_sequence;
constexpr int kVectorBytes = 32;

#include "simd.h"

#include "storage.h"

#include "site_kernel.h"

#include "row_kernel.h"

#include "kernel_impl.h"

}  // namespace

const KernelTable& kernels_avx2() {
  static const KernelTable table{"AVX2", count_units, run_problem, count_targets, scale_units};
  return table;
}

}  // namespace lnl::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // LNL_CPU_X86
