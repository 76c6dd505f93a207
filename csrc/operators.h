// The operators, the same for every backend.
#pragma once

#include <torch/csrc/stable/library.h>

namespace lnl {

// Implements all operators of schemas.cpp for a dispatch key.
void implement_operators(torch::stable::detail::StableLibrary& library);

}  // namespace lnl
