#include "capability.h"

#include <cstdlib>
#include <string>

namespace lnl::cpu {

namespace {

Capability of_processor() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Capability::kAvx512;
  }
  if (avx2) return Capability::kAvx2;
#endif
  return Capability::kBaseline;
}

}  // namespace

Capability capability() {
  static const Capability chosen = [] {
    const Capability best = of_processor();
    const char* const asked = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string name = asked == nullptr ? "" : asked;
    Capability most = best;
    if (name == "default") most = Capability::kBaseline;
    if (name == "avx2") most = Capability::kAvx2;
    return most < best ? most : best;
  }();
  return chosen;
}

const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::kAvx512:
      return "AVX512";
    case Capability::kAvx2:
      return "AVX2";
    case Capability::kBaseline:
      break;
  }
  return "DEFAULT";
}

}  // namespace lnl::cpu
