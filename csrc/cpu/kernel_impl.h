// Everything an instruction set's two units are made of, in the order of use.
// Included like simd.h: inside each instruction set's namespace, after its target pragma.

using std::index_sequence;
using std::make_index_sequence;

// clang-format off
#include "simd.h"
#include "storage.h"
#include "site_kernel.h"
#include "row_kernel.h"
#include "units.h"
#include "site_runner.h"
#ifdef LNL_LINEAR_KERNELS
#include "linear_kernel.h"
#include "linear_runner.h"
#else
#include "row_runner.h"
#include "dispatch.h"
#include "elementwise.h"
#endif
// clang-format on
