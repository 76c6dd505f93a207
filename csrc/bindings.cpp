// The module object lnl_ext._C: the facts of the build, and C++ helpers that know no torch. No
// tensor passes through pybind11.
#include <pybind11/pybind11.h>

#include "cpu/capability.h"

#define LNL_STRINGIFY_EXPANDED(...) #__VA_ARGS__
#define LNL_STRINGIFY(...) LNL_STRINGIFY_EXPANDED(__VA_ARGS__)

#if defined(__clang__)
#define LNL_COMPILER "Clang " LNL_STRINGIFY(__clang_major__.__clang_minor__.__clang_patchlevel__)
#elif defined(__GNUC__)
#define LNL_COMPILER "GCC " LNL_STRINGIFY(__GNUC__.__GNUC_MINOR__.__GNUC_PATCHLEVEL__)
#elif defined(_MSC_VER)
#define LNL_COMPILER "MSVC " LNL_STRINGIFY(_MSC_VER)
#else
#error "lnl_ext does not know this compiler's name: use GCC, Clang or MSVC"
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "The facts of lnl_ext's build, and which instructions its CPU kernels use.";
  module.attr("torch") = LNL_STRINGIFY(LNL_TORCH_VERSION);
  // The toolkit's version, and its architectures, with commas between; empty without CUDA.
  module.attr("cuda") = LNL_STRINGIFY(LNL_CUDA_VERSION);
  module.attr("cuda_arch_list") = LNL_STRINGIFY(LNL_CUDA_ARCH_LIST);
  module.attr("compiler") = LNL_COMPILER;
  module.def(
      "cpu_capability", [] { return lnl::cpu::name_of(lnl::cpu::capability()); },
      "Instruction set of the CPU kernels, chosen at run time.");
}
