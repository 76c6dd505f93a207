// The module object lnl_ext._C. Importing it registers the operators of bias_loss.cpp; no tensor
// passes through pybind11.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>

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
  module.doc() =
      "Compiled part of lnl_ext: importing it registers the torch operators of the namespace "
      "lnl_ext.";
  module.attr("compiler") = LNL_COMPILER;
  module.def("cpu_capability", &at::get_cpu_capability, "Instruction set chosen at run time.");
}
