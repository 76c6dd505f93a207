// The linear layer's kernel for bfloat16 on processors with AVX512_BF16, beside those for AVX-512.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernel.h"

#ifdef LNL_CPU_BFLOAT16
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own avx512fintrin.h (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define LNL_HAS_F16C 1
#define LNL_HAS_AVX2 1
#define LNL_HAS_AVX512 1

namespace lnl::cpu {
namespace {

constexpr int kVectorBytes = 64;
using std::index_sequence;
using std::make_index_sequence;

// clang-format off
#include "simd.h"
#include "storage.h"
#include "site_kernel.h"
#include "units.h"
#include "site_runner.h"
#include "linear_kernel.h"
#include "linear_bfloat16.h"
// clang-format on

}  // namespace

LinearKernel bfloat16_linear_kernel() { return &run_linear_bfloat16; }

}  // namespace lnl::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // LNL_CPU_BFLOAT16
