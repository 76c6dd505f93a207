// Everything an instruction set's unit is made of, in the order of use.
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
#include "row_runner.h"
#include "dispatch.h"
#include "linear_kernel.h"
#include "linear_runner.h"
#include "elementwise.h"
// clang-format on
