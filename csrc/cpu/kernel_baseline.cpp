// The CPU kernels for what every processor of the architecture has: SSE2 on x86-64, NEON on aarch64.
#include "kernel.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#ifdef LNL_CPU_X86
#include <emmintrin.h>
#endif


namespace lnl::cpu {
namespace {

using std::index_sequence;
using std::make_index_sequence;
#if defined(__GNUC__) || defined(__clang__)
constexpr int kVectorBytes = 16;
#else
constexpr int kVectorBytes = 0;  // one lane
#endif

#include "simd.h"

#include "storage.h"

#include "site_kernel.h"

#include "row_kernel.h"

#include "kernel_impl.h"

}  // namespace

const KernelTable& kernels_baseline() {
  static const KernelTable table{"baseline", count_units, run_problem, count_targets, scale_units};
  return table;
}

}  // namespace lnl::cpu
