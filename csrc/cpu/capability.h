// Which instruction set the CPU kernels use.
#pragma once

namespace lnl::cpu {

enum class Capability { kBaseline, kAvx2, kAvx512 };

// The best that the processor has and that ATEN_CPU_CAPABILITY (default, avx2 or avx512), the
// variable torch itself reads, allows.
Capability capability();

// As torch names it.
const char* name_of(Capability capability);

}  // namespace lnl::cpu
