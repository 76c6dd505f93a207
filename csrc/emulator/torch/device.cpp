// The emulated device of the torch side: its facts, and the one product that torch has for CUDA
// tensors alone.
#include <ATen/ATen.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include "../../cuda/linear_bias_loss_chunks.h"

namespace {

// mm with a result wider than its factors, as cuBLAS computes it: products and sums in float32.
// The checks are those of torch's CUDA kernel.
at::Tensor& mm_wide(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                    at::Tensor& out) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "input dtypes must be the same");
  TORCH_CHECK(dtype == out.scalar_type(), "out_dtype must be that of out");
  TORCH_CHECK(
      dtype == at::kFloat && (a.scalar_type() == at::kHalf || a.scalar_type() == at::kBFloat16),
      "out_dtype must be float32 for float16 or bfloat16 inputs");
  TORCH_CHECK(out.dim() == 2 && out.size(0) == a.size(0) && out.size(1) == b.size(1),
              "out must have the product's shape: CUDA would resize it");
  return out.copy_(at::mm(a.to(at::kFloat), b.to(at::kFloat)));
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("mm.dtype_out", &mm_wide); }

extern "C" {

void lnl_emulated_device(int multiprocessors, int shared_memory) {
  lnl::emulator::multiprocessors = multiprocessors;
  lnl::emulator::settings().shared_memory = shared_memory;
}

void lnl_emulated_chunks(std::int64_t bytes, std::int64_t least_rows) {
  lnl::cuda::chunk_limits() = {bytes, least_rows};
}
}
