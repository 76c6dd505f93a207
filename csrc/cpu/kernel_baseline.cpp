// The CPU kernels for what every processor of the architecture has: SSE2 on x86-64, NEON on
// aarch64.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernel.h"

#ifdef LNL_CPU_X86
#include <emmintrin.h>
#endif

namespace lnl::cpu {
namespace {

#if defined(__GNUC__) || defined(__clang__)
constexpr int kVectorBytes = 16;
#else
constexpr int kVectorBytes = 0;  // one lane
#endif

#include "kernel_impl.h"

}  // namespace

#ifdef LNL_LINEAR_KERNELS
LinearKernel linear_baseline() { return run_linear; }
#else
const KernelTable& kernels_baseline() {
  static const KernelTable table{"baseline",        count_units,   run_problem,
                                 linear_baseline(), count_targets, scale_units};
  return table;
}
#endif

}  // namespace lnl::cpu
