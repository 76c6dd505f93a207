// The linear operators on CUDA tensors. A head that fits on chip is one kernel; any other is worked
// off in chunks of rows, whose products are torch's own and whose logits are made, used and
// forgotten. Nothing here waits for the device.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../linear_bias_loss.h"
#include "bias_loss_call.h"
#include "linear_bias_loss_chunks.h"
#include "linear_bias_loss_launch.h"

namespace lnl::cuda {

namespace {

CUstream_st* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

void check(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

bool is_narrow(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

// A call with the tensors that it points into.
class LinearTensorCall {
 public:
  explicit LinearTensorCall(const LinearBiasLossArguments& given) : arguments_(given) {
    geometry_ = prepare(arguments_);
    const at::Tensor& features = arguments_.features;
    accumulation_ = features.options().dtype(accumulation_dtype(features));
    fill_in(call_.loss, arguments_.loss, geometry_, held_);
    call_.width = features.size(1);
    call_.features = features.const_data_ptr();
    call_.head_weight = arguments_.head_weight.const_data_ptr();
    if (arguments_.head_bias.has_value()) {
      call_.head_bias = arguments_.head_bias->const_data_ptr();
    }
    const auto allocate = [&](bool wanted, at::IntArrayRef shape, void*& address) {
      const at::Tensor made = at::empty(wanted ? shape : at::IntArrayRef{0}, features.options());
      // An empty gradient (of features of no width) has no address, and null would mean that it,
      // and with head_weight's also head_bias', is not wanted.
      static int64_t none = 0;
      if (wanted) address = made.numel() > 0 ? made.mutable_data_ptr() : &none;
      return made;
    };
    const bool head = arguments_.head_gradient, bias = arguments_.head_bias.has_value();
    features_gradient =
        allocate(arguments_.features_gradient, features.sizes(), call_.features_gradient);
    weight_gradient = allocate(head, arguments_.head_weight.sizes(), call_.weight_gradient);
    bias_gradient = allocate(head && bias, {arguments_.head_weight.size(0)}, call_.bias_gradient);
  }

  const LinearBiasLossArguments& arguments() const { return arguments_; }
  const at::TensorOptions& accumulation() const { return accumulation_; }
  BiasLossCall& loss() { return call_.loss; }

  void launch() {
    const Device device = current_device();
    const LinearLaunchFacts facts = linear_launch_facts(call_, device);
    if (facts.on_chip) {
      const at::Tensor workspace = bytes(static_cast<int64_t>(facts.workspace));
      check(launch_linear_bias_loss(call_, device, workspace.mutable_data_ptr(), stream()));
    } else {
      launch_chunks(device);
    }
  }

  at::Tensor features_gradient;  // as features, or empty
  at::Tensor weight_gradient;    // as head_weight, or empty
  at::Tensor bias_gradient;      // as head_bias, or empty

 private:
  at::Tensor bytes(int64_t count) const {
    return at::empty({count}, accumulation_.dtype(at::kByte));
  }

  // a times b in the accumulation dtype.
  void product(at::Tensor out, const at::Tensor& a, const at::Tensor& b) const {
    if (is_narrow(a)) {
      at::mm_out(out, a, b, at::kFloat);
    } else {
      at::mm_out(out, a, b);
    }
  }

  // The call of the loss kernels for all rows: logits and probabilities of the accumulation dtype.
  BiasLossCall whole_call() {
    BiasLossCall whole = call_.loss;
    const at::ScalarType wide = accumulation_.dtype().toScalarType();
    whole.dtype = dtype_of(wide);
    whole.wide_probabilities = false;
    if (whole.probabilities != nullptr) {
      held_.push_back(arguments_.loss.target.to(wide));
      whole.probabilities = held_.back().const_data_ptr();
    }
    return whole;
  }

  void launch_chunks(const Device& device) {
    // The products are neither recorded nor cast: that is the caller's business.
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::Tensor& features = arguments_.features;
    const at::Tensor& head_weight = arguments_.head_weight;
    const int64_t all = geometry_.rows, columns = head_weight.size(0);
    const auto size = static_cast<int64_t>(accumulation_.dtype().itemsize());
    const BiasLossCall whole = whole_call();
    const bool forward = whole.loss != nullptr;
    const bool reduced = forward && whole.reduction != Reduction::kNone;
    const bool reversed = whole.reversal.present;
    const bool to_features = arguments_.features_gradient, to_head = arguments_.head_gradient;
    const bool to_bias = to_head && arguments_.head_bias.has_value();
    // What launch_bias_loss is asked for: with a reversal the head has a gradient of its own.
    const bool gradient = to_features || (to_head && !reversed);
    const bool head_gradient = to_head && reversed;

    if (forward && whole.reduction == Reduction::kMean) {
      const at::Tensor workspace =
          bytes(static_cast<int64_t>(linear_denominators_workspace(whole, device)));
      check(launch_linear_denominators(whole, device, workspace.mutable_data_ptr(), stream()));
    }
    const int64_t chunk = chunk_rows(all, columns * size);
    BiasLossCall largest = whole;
    largest.rows = std::min(chunk, all);
    const int64_t most_blocks = launch_facts(largest, device).blocks;
    const int64_t chunks = (all + chunk - 1) / chunk;
    at::Tensor partials;
    if (reduced) {
      partials =
          at::empty({std::max<int64_t>(chunks * most_blocks, 1), whole.heads, 3}, accumulation_);
    }
    const at::Tensor logits = at::empty({largest.rows, columns}, accumulation_);
    const at::Tensor beside =
        at::empty({gradient && head_gradient ? largest.rows : 0, columns}, accumulation_);
    // A chunk's share of the weights' gradient is added in float32 also for 16-bit tensors.
    const bool narrow = is_narrow(features);
    at::Tensor weight_sum = weight_gradient, weight_share, bias_sum;
    if (to_head && narrow) {
      weight_sum = at::empty(head_weight.sizes(), accumulation_);
      if (chunks > 1) weight_share = at::empty_like(weight_sum);
    }
    if (to_head && all == 0) weight_sum.zero_();
    if (to_bias) bias_sum = at::zeros({columns}, accumulation_);
    int64_t blocks = 0;
    for (int64_t row = 0; row < all; row += chunk) {
      const int64_t rows = std::min(chunk, all - row);
      const at::Tensor part = features.narrow(0, row, rows);
      const at::Tensor part_logits = logits.narrow(0, 0, rows);
      product(part_logits, part, head_weight.t());
      if (arguments_.head_bias.has_value()) part_logits.add_(*arguments_.head_bias);

      BiasLossCall call =
          call_of_chunk(whole, row, rows, reduced ? partials.mutable_data_ptr() : nullptr, blocks);
      call.logits = part_logits.const_data_ptr();
      // A kernel reads a row before it writes its gradient: that can take the logits' place.
      const at::Tensor part_head = gradient ? beside : part_logits;
      if (gradient) call.gradient = part_logits.mutable_data_ptr();
      if (head_gradient) call.head_gradient = part_head.mutable_data_ptr();
      const LaunchFacts facts = launch_facts(call, device);
      TORCH_INTERNAL_ASSERT(facts.blocks <= most_blocks);  // partials have room for no more
      blocks += facts.blocks;
      const at::Tensor workspace = bytes(static_cast<int64_t>(facts.workspace));
      check(launch_bias_loss(call, device, workspace.mutable_data_ptr(), stream()));

      // The products' factors are of the tensors' dtype, as torch's own linear layer has them.
      at::Tensor by_row;
      if (gradient) by_row = part_logits.to(features.scalar_type());
      if (to_features) {
        at::Tensor out = features_gradient.narrow(0, row, rows);
        at::mm_out(out, by_row, head_weight);
      }
      if (!to_head) continue;
      const at::Tensor factors = reversed ? part_head.narrow(0, 0, rows) : part_logits;
      if (to_bias) bias_sum.add_(factors.sum(0));
      if (reversed) by_row = factors.to(features.scalar_type());
      if (row == 0) {
        product(weight_sum, by_row.t(), part);
      } else if (narrow) {
        product(weight_share, by_row.t(), part);
        weight_sum.add_(weight_share);
      } else {
        weight_sum.addmm_(by_row.t(), part);
      }
    }
    if (reduced) {
      BiasLossCall call = whole;
      call.partials = partials.mutable_data_ptr();
      check(launch_linear_fold(call, blocks, stream()));
    }
    if (to_head && narrow) weight_gradient.copy_(weight_sum);
    if (to_bias) bias_gradient.copy_(bias_sum);
  }

  LinearBiasLossArguments arguments_;
  Geometry geometry_;
  LinearBiasLossCall call_;
  at::TensorOptions accumulation_;
  std::vector<at::Tensor> held_;
};

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using ForwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

LinearBiasLossArguments collect(const at::Tensor& features, const at::Tensor& head_weight,
                                const std::optional<at::Tensor>& head_bias,
                                const at::Tensor& target, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& reversal,
                                const std::optional<at::Tensor>& entropy_weight,
                                const std::optional<at::Tensor>& confusion_weight,
                                int64_t ignore_index, double label_smoothing, int64_t reduction,
                                bool mask_entropy, int64_t heads, bool features_gradient,
                                bool head_gradient) {
  LinearBiasLossArguments arguments;
  arguments.features = features;
  arguments.head_weight = head_weight;
  arguments.head_bias = head_bias;
  arguments.loss = {at::Tensor(),
                    target,
                    weight,
                    reversal,
                    entropy_weight,
                    confusion_weight,
                    ignore_index,
                    label_smoothing,
                    static_cast<lnl::Reduction>(reduction),
                    mask_entropy,
                    heads};
  arguments.features_gradient = features_gradient;
  arguments.head_gradient = head_gradient;
  return arguments;
}

ForwardResult linear_bias_loss(const at::Tensor& features, const at::Tensor& head_weight,
                               const std::optional<at::Tensor>& head_bias, const at::Tensor& target,
                               const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& reversal,
                               const std::optional<at::Tensor>& entropy_weight,
                               const std::optional<at::Tensor>& confusion_weight,
                               int64_t ignore_index, double label_smoothing, int64_t reduction,
                               bool mask_entropy, int64_t heads, bool features_gradient,
                               bool head_gradient) {
  const c10::cuda::CUDAGuard guard(features.device());
  LinearTensorCall tensors(collect(features, head_weight, head_bias, target, weight, reversal,
                                   entropy_weight, confusion_weight, ignore_index, label_smoothing,
                                   reduction, mask_entropy, heads, features_gradient,
                                   head_gradient));
  const auto kind = tensors.arguments().loss.reduction;
  const auto shape = kind == lnl::Reduction::kNone ? std::vector<int64_t>{features.size(0)}
                                                   : std::vector<int64_t>{};
  const at::Tensor loss = at::empty(shape, tensors.accumulation());
  const at::Tensor cross_entropy = at::empty_like(loss);
  const at::Tensor entropy = at::empty_like(loss);
  // Only a mean is divided by anything; the kernels fill its denominators in.
  const at::Tensor denominators = kind == lnl::Reduction::kMean
                                      ? at::empty({heads, 2}, tensors.accumulation())
                                      : at::ones({heads, 2}, tensors.accumulation());
  if (loss.numel() > 0) {
    BiasLossCall& call = tensors.loss();
    call.loss = loss.mutable_data_ptr();
    call.cross_entropy = cross_entropy.mutable_data_ptr();
    call.entropy = entropy.mutable_data_ptr();
    call.denominators = denominators.mutable_data_ptr();
    tensors.launch();
  } else {  // an unreduced loss of no rows has no address and nothing to launch for
    tensors.weight_gradient.zero_();
    tensors.bias_gradient.zero_();
  }
  return {loss,
          cross_entropy,
          entropy,
          denominators,
          tensors.features_gradient,
          tensors.weight_gradient,
          tensors.bias_gradient};
}

Gradients linear_bias_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& features, const at::Tensor& head_weight,
    const std::optional<at::Tensor>& head_bias, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, const at::Tensor& denominators,
    const std::optional<at::Tensor>& reversal, const std::optional<at::Tensor>& entropy_weight,
    const std::optional<at::Tensor>& confusion_weight, int64_t ignore_index, double label_smoothing,
    int64_t reduction, bool mask_entropy, int64_t heads, bool features_gradient,
    bool head_gradient) {
  const c10::cuda::CUDAGuard guard(features.device());
  LinearTensorCall tensors(collect(features, head_weight, head_bias, target, weight, reversal,
                                   entropy_weight, confusion_weight, ignore_index, label_smoothing,
                                   reduction, mask_entropy, heads, features_gradient,
                                   head_gradient));
  TORCH_CHECK_VALUE(
      denominators.dim() == 2 && denominators.size(0) == heads && denominators.size(1) == 2,
      "denominators has shape ", denominators.sizes(), ", expected (", heads, ", 2)");
  TORCH_CHECK_VALUE(denominators.device() == features.device(), "denominators is on ",
                    denominators.device(), ", features on ", features.device());
  const at::Tensor divisors = denominators.to(accumulation_dtype(features)).contiguous();
  const at::Tensor upstream = prepare_upstream(grad_loss, tensors.arguments().loss);
  BiasLossCall& call = tensors.loss();
  call.denominators = divisors.data_ptr();
  call.upstream = upstream.const_data_ptr();
  if (features.size(0) == 0) {
    tensors.weight_gradient.zero_();
    tensors.bias_gradient.zero_();
  } else if (features_gradient || head_gradient) {
    tensors.launch();
  }
  return {tensors.features_gradient, tensors.weight_gradient, tensors.bias_gradient};
}

}  // namespace
}  // namespace lnl::cuda

TORCH_LIBRARY_IMPL(lnl_ext, CUDA, m) {
  m.impl("linear_bias_loss", &lnl::cuda::linear_bias_loss);
  m.impl("linear_bias_loss_backward", &lnl::cuda::linear_bias_loss_backward);
}
