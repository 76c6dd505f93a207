// The emulated device as torch shows it: one device, the CPU; one stream, on which everything is
// done when a launch returns; and products that check what torch's CUDA kernels check.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <cstdio>

#include "../../cuda/linear_bias_loss_chunks.h"
#include "../../tensor.h"
#include "../emulator.h"

namespace {

// Of a dense tensor of any strides, for a product out of float32 factors.
lnl::Tensor widened(AtenTensorHandle handle) {
  AtenTensorHandle own = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &own));
  const lnl::Tensor tensor(own);
  const lnl::TensorFacts facts(tensor);
  return lnl::laid_out(tensor, facts, lnl::DType::kFloat32, lnl::dense_strides(facts.sizes));
}

AOTITorchError refuse(const char* what) {
  std::fprintf(stderr, "emulated product: %s\n", what);
  return TORCH_FAILURE;
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

AOTITorchError lnl_emulated_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return TORCH_SUCCESS;
}

AOTITorchError lnl_emulated_delete_device_guard(DeviceGuardHandle) { return TORCH_SUCCESS; }

AOTITorchError lnl_emulated_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return TORCH_SUCCESS;
}

int32_t lnl_emulated_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError lnl_emulated_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
  return aoti_torch_cpu_mm_out(out, a, b);
}

AOTITorchError lnl_emulated_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                      AtenTensorHandle a, AtenTensorHandle b, double beta,
                                      double alpha) {
  return aoti_torch_cpu_addmm_out(out, self, a, b, beta, alpha);
}

// mm with a result wider than its factors, as cuBLAS computes it: products and sums in float32.
AOTITorchError lnl_emulated_mm_dtype_out(AtenTensorHandle out, AtenTensorHandle a,
                                         AtenTensorHandle b, int32_t dtype) {
  int32_t of_a = 0, of_b = 0, of_out = 0;
  aoti_torch_get_dtype(a, &of_a);
  aoti_torch_get_dtype(b, &of_b);
  aoti_torch_get_dtype(out, &of_out);
  if (of_a != of_b) return refuse("input dtypes must be the same");
  if (dtype != of_out) return refuse("out_dtype must be that of out");
  if (dtype != aoti_torch_dtype_float32() ||
      (of_a != aoti_torch_dtype_float16() && of_a != aoti_torch_dtype_bfloat16())) {
    return refuse("out_dtype must be float32 for float16 or bfloat16 inputs");
  }
  return aoti_torch_cpu_mm_out(out, widened(a).get(), widened(b).get());
}

EXPORTED void lnl_emulated_device(int multiprocessors, int shared_memory) {
  lnl::emulator::settings().multiprocessors = multiprocessors;
  lnl::emulator::settings().shared_memory = shared_memory;
}

EXPORTED void lnl_emulated_chunks(std::int64_t bytes, std::int64_t least_rows) {
  lnl::cuda::chunk_limits() = {bytes, least_rows};
}
}
