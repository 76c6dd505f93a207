// The operators on CUDA tensors: allocates, fills in a BiasLossCall and launches it on the current
// stream of the logits' device. Nothing here waits for the device, so that calls can be captured in
// a CUDA graph. Labels are not looked at on the host: one outside of [0, C) makes its site's value
// and gradient NaN.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../bias_loss.h"
#include "bias_loss_call.h"

namespace lnl::cuda {

namespace {

// A call with the tensors that it points into.
class TensorCall {
 public:
  explicit TensorCall(const BiasLossArguments& given) : arguments_(given) {
    const Geometry geometry = prepare(arguments_);
    const at::Tensor& logits = arguments_.logits;
    accumulation_ = logits.options().dtype(accumulation_dtype(logits)).memory_format(std::nullopt);
    fill_in(call_, arguments_, geometry, held_);
    call_.logits = logits.const_data_ptr();
    gradient = allocate(arguments_.logits_gradient, call_.gradient);
    head_gradient = allocate(arguments_.head_gradient, call_.head_gradient);
  }

  const BiasLossArguments& arguments() const { return arguments_; }
  const at::TensorOptions& accumulation() const { return accumulation_; }
  BiasLossCall& call() { return call_; }

  void launch() {
    const Device device = current_device();
    const auto bytes = static_cast<int64_t>(launch_facts(call_, device).workspace);
    const at::Tensor workspace = at::empty({bytes}, accumulation_.dtype(at::kByte));
    const auto stream = c10::cuda::getCurrentCUDAStream();
    C10_CUDA_CHECK(static_cast<cudaError_t>(
        launch_bias_loss(call_, device, workspace.mutable_data_ptr(), stream.stream())));
  }

  at::Tensor gradient;       // as logits, or empty
  at::Tensor head_gradient;  // likewise

 private:
  at::Tensor allocate(bool wanted, void*& address) {
    if (!wanted) return at::empty({0}, arguments_.logits.options().memory_format(std::nullopt));
    at::Tensor made = at::empty_like(arguments_.logits);
    address = made.mutable_data_ptr();
    return made;
  }

  BiasLossArguments arguments_;
  BiasLossCall call_;
  at::TensorOptions accumulation_;
  std::vector<at::Tensor> held_;
};

using ForwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ForwardResult bias_loss(const at::Tensor& logits, const at::Tensor& target,
                        const std::optional<at::Tensor>& weight,
                        const std::optional<at::Tensor>& reversal,
                        const std::optional<at::Tensor>& entropy_weight,
                        const std::optional<at::Tensor>& confusion_weight, int64_t ignore_index,
                        double label_smoothing, int64_t reduction, bool mask_entropy, int64_t heads,
                        bool logits_gradient, bool head_gradient) {
  const c10::cuda::CUDAGuard guard(logits.device());
  TensorCall tensors({logits, target, weight, reversal, entropy_weight, confusion_weight,
                      ignore_index, label_smoothing, static_cast<lnl::Reduction>(reduction),
                      mask_entropy, heads, logits_gradient, head_gradient});
  const auto shape = tensors.arguments().reduction == lnl::Reduction::kNone
                         ? site_shape(logits)
                         : std::vector<int64_t>{};
  const at::Tensor loss = at::empty(shape, tensors.accumulation());
  const at::Tensor cross_entropy = at::empty_like(loss);
  const at::Tensor entropy = at::empty_like(loss);
  // Only a mean is divided by anything; the kernels fill its denominators in.
  const bool mean = tensors.arguments().reduction == lnl::Reduction::kMean;
  const at::Tensor denominators = mean ? at::empty({heads, 2}, tensors.accumulation())
                                       : at::ones({heads, 2}, tensors.accumulation());
  // An unreduced loss of no sites has no address and nothing to launch for.
  if (loss.numel() > 0) {
    BiasLossCall& call = tensors.call();
    call.loss = loss.mutable_data_ptr();
    call.cross_entropy = cross_entropy.mutable_data_ptr();
    call.entropy = entropy.mutable_data_ptr();
    call.denominators = denominators.mutable_data_ptr();
    tensors.launch();
  }
  return {loss, cross_entropy, entropy, denominators, tensors.gradient, tensors.head_gradient};
}

std::tuple<at::Tensor, at::Tensor> bias_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, const at::Tensor& denominators,
    const std::optional<at::Tensor>& reversal, const std::optional<at::Tensor>& entropy_weight,
    const std::optional<at::Tensor>& confusion_weight, int64_t ignore_index, double label_smoothing,
    int64_t reduction, bool mask_entropy, int64_t heads, bool logits_gradient, bool head_gradient) {
  const c10::cuda::CUDAGuard guard(logits.device());
  TensorCall tensors({logits, target, weight, reversal, entropy_weight, confusion_weight,
                      ignore_index, label_smoothing, static_cast<lnl::Reduction>(reduction),
                      mask_entropy, heads, logits_gradient, head_gradient});
  TORCH_CHECK_VALUE(
      denominators.dim() == 2 && denominators.size(0) == heads && denominators.size(1) == 2,
      "denominators has shape ", denominators.sizes(), ", expected (", heads, ", 2)");
  TORCH_CHECK_VALUE(denominators.device() == logits.device(), "denominators is on ",
                    denominators.device(), ", logits on ", logits.device());
  const at::Tensor divisors = denominators.to(accumulation_dtype(logits)).contiguous();
  const at::Tensor upstream = prepare_upstream(grad_loss, tensors.arguments());
  BiasLossCall& call = tensors.call();
  call.denominators = divisors.data_ptr();
  call.upstream = upstream.const_data_ptr();
  if ((logits_gradient || head_gradient) && logits.numel() > 0) tensors.launch();
  return {tensors.gradient, tensors.head_gradient};
}

void scale_gradient_(at::Tensor& gradient, const at::Tensor& factor) {
  TORCH_CHECK_VALUE(factor.numel() == 1, "factor has shape ", factor.sizes(),
                    ", expected one value");
  TORCH_CHECK_VALUE(gradient.is_non_overlapping_and_dense(), "gradient must be dense, got strides ",
                    gradient.strides());
  const auto dtype = gradient.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "gradient must be float32, float64, float16 or bfloat16, got ", dtype);
  const c10::cuda::CUDAGuard guard(gradient.device());
  const at::Tensor scale = factor.to(gradient.options().dtype(accumulation_dtype(gradient)));
  C10_CUDA_CHECK(static_cast<cudaError_t>(launch_scale_gradient(
      gradient.mutable_data_ptr(), gradient.numel(), dtype_of(dtype), scale.const_data_ptr(),
      current_device(), c10::cuda::getCurrentCUDAStream().stream())));
}

}  // namespace
}  // namespace lnl::cuda

TORCH_LIBRARY_IMPL(lnl_ext, CUDA, m) {
  m.impl("bias_loss", &lnl::cuda::bias_loss);
  m.impl("bias_loss_backward", &lnl::cuda::bias_loss_backward);
  m.impl("scale_gradient_", &lnl::cuda::scale_gradient_);
}
