// The module object lnl_ext._C and the facts of its build. Importing it registers the operators of
// bias_loss.cpp; no tensor passes through pybind11.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>

#include <string>

#ifdef LNL_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

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

#ifdef LNL_WITH_CUDA
#define LNL_CUDART_VERSION LNL_STRINGIFY(CUDART_VERSION)
#define LNL_CUDA_ARCHITECTURES LNL_STRINGIFY(LNL_CUDA_ARCH_LIST)
#else
#define LNL_CUDART_VERSION "0"
#define LNL_CUDA_ARCHITECTURES ""
#endif

namespace {

// One literal, so that lnl_ext/build.py can read it from the file when the module was built for
// another torch and must not be loaded.
// clang-format off
constexpr char kBuildFacts[] =
    "lnl_ext build facts"
    "|torch=" LNL_STRINGIFY(LNL_TORCH_VERSION)
    "|cudart=" LNL_CUDART_VERSION
    "|cuda_arch_list=" LNL_CUDA_ARCHITECTURES
    "|compiler=" LNL_COMPILER
    "|";
// clang-format on

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() =
      "Compiled part of lnl_ext: importing it registers the torch operators of the namespace "
      "lnl_ext.";
  module.attr("build_facts") = kBuildFacts;
  module.def("cpu_capability", &at::get_cpu_capability, "Instruction set chosen at run time.");
}
