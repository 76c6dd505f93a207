// Memory of large results, kept for the next call.
//
// A gradient of 128 MiB that malloc maps and unmaps every step costs more than the products that
// fill it: the system hands out and clears its pages, and below a hypervisor that takes free pages
// away it fetches them back from there. So a block that is freed stays mapped, on huge pages where
// there are any, and one of more than 8 MiB is marked with MADV_FREE: the system may take its pages
// whenever it is short of memory, and only then.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lnl::cpu {

// Uninitialised tensors on the CPU. Those of less than kKeptBytes, and all where the system lacks
// MADV_FREE, are torch's own.
constexpr int64_t kKeptBytes = int64_t{2} << 20;
at::Tensor new_tensor(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor new_tensor_like(const at::Tensor& dense);  // of its strides, too

// Unmaps the blocks that no tensor uses; returns their bytes.
int64_t release_kept_memory();

}  // namespace lnl::cpu
