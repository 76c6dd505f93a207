// Whether this processor has an instruction set that ATEN_CPU_CAPABILITY can name.
#pragma once

#include <cstring>

namespace lnl::testing {

constexpr int kSkipped = 77;  // what ctest is told to report as skipped

inline bool supported(const char* capability) {
#if defined(__x86_64__)
  if (std::strcmp(capability, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (std::strcmp(capability, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return std::strcmp(capability, "default") == 0;
}

}  // namespace lnl::testing
