// The operators on CUDA tensors, on the current stream of the logits' device. Nothing here waits
// for the device, so that calls can be captured in a CUDA graph. Labels are not looked at on the
// host: one outside of [0, C) makes its site's value and gradient NaN.
#include "../backend.h"
#include "../operators.h"
#include "device.h"

namespace lnl::backend {

std::int32_t device_type() { return aoti_torch_device_type_cuda(); }

std::int64_t bias_loss(const BiasLossCall& call, const TensorFacts& logits) {
  cuda::check_limits(call);
  const cuda::DeviceScope scope(logits);
  const auto bytes = static_cast<std::int64_t>(cuda::launch_facts(call, scope.device).workspace);
  const Tensor workspace = empty_bytes(bytes, logits);
  cuda::check_launch(
      cuda::launch_bias_loss(call, scope.device, workspace.mutable_data_ptr(), scope.stream));
  return -1;
}

void scale_gradient(void* gradient, std::int64_t elements, DType dtype, const Coefficient& factor,
                    const TensorFacts& facts) {
  const cuda::DeviceScope scope(facts);
  cuda::check_launch(
      cuda::launch_scale_gradient(gradient, elements, dtype, factor, scope.device, scope.stream));
}

}  // namespace lnl::backend

STABLE_TORCH_LIBRARY_IMPL(lnl_ext, CUDA, m) { lnl::implement_operators(m); }
