// linear_bias_loss on CUDA tensors. A head that fits on chip is one kernel; any other is worked off
// in chunks of rows, whose products are torch's own and whose logits are made, used and forgotten.
// Nothing here waits for the device.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <algorithm>

#include "../backend.h"
#include "device.h"
#include "linear_bias_loss_chunks.h"
#include "linear_bias_loss_launch.h"

namespace lnl::cuda {

namespace {

// A call whose logits are made in chunks of rows, and its tensors.
class ChunkedCall {
 public:
  ChunkedCall(const LinearBiasLossCall& call, const backend::LinearTensors& tensors,
              const TensorFacts& features, const DeviceScope& scope)
      : call_(call),
        tensors_(tensors),
        features_(features),
        scope_(scope),
        dtype_(call.loss.dtype),
        wide_(accumulation_of(dtype_)),
        columns_(call.loss.heads * call.loss.classes) {}

  void launch() {
    const std::int64_t all = call_.loss.rows;
    // The loss kernels' call for all rows: their logits are of the accumulation dtype.
    BiasLossCall whole = call_.loss;
    whole.dtype = wide_;
    whole.wide_probabilities = false;
    const bool forward = whole.loss != nullptr;
    const bool reduced = forward && whole.reduction != Reduction::kNone;
    const bool reversed = whole.reversal.present;
    const bool to_features = call_.features_gradient != nullptr;
    const bool to_head = call_.weight_gradient != nullptr;
    const bool to_bias = call_.bias_gradient != nullptr;
    // What launch_bias_loss is asked for: with a reversal the head has a gradient of its own.
    const bool gradient = to_features || (to_head && !reversed);
    const bool head_gradient = to_head && reversed;

    if (forward && whole.reduction == Reduction::kMean && !whole.denominators_given) {
      const Tensor workspace = bytes(linear_denominators_workspace(whole, scope_.device));
      check_launch(launch_linear_denominators(whole, scope_.device, workspace.mutable_data_ptr(),
                                              scope_.stream));
    }
    const std::int64_t chunk = chunk_rows(all, columns_ * size_of(wide_));
    BiasLossCall largest = whole;
    largest.rows = std::min(chunk, all);
    const std::int64_t most_blocks = launch_facts(largest, scope_.device).blocks;
    const std::int64_t chunks = (all + chunk - 1) / chunk;
    const Tensor partials = empty(
        {reduced ? std::max<std::int64_t>(chunks * most_blocks, 1) : 0, whole.heads, kPartials},
        wide_, features_);
    const Tensor logits = matrix(largest.rows, columns_, wide_);
    const Tensor beside = matrix(gradient && head_gradient ? largest.rows : 0, columns_, wide_);
    // The products' factors are of the tensors' dtype, as torch's own linear layer has them.
    const Tensor narrow_factors = matrix(narrow() ? largest.rows : 0, columns_, dtype_);
    // A chunk's share of the weights' gradient is added in float32 also for 16-bit tensors.
    const bool summed_wide = to_head && narrow();
    const Tensor weight_sum =
        summed_wide ? matrix(columns_, call_.width, wide_) : tensors_.weight_gradient;
    const Tensor weight_share =
        matrix(summed_wide && chunks > 1 ? columns_ : 0, call_.width, wide_);
    const Tensor bias_sums = matrix(to_bias ? chunks : 0, columns_, wide_);
    if (to_head && all == 0) zero(weight_sum);

    std::int64_t blocks = 0;
    for (std::int64_t row = 0; row < all; row += chunk) {
      const std::int64_t rows = std::min(chunk, all - row);
      const Tensor part = rows_of(tensors_.features, row, rows, call_.width);
      const Tensor part_logits = rows_of(logits, 0, rows, columns_);
      make_logits(part_logits, part, rows);

      BiasLossCall call =
          call_of_chunk(whole, row, rows, reduced ? partials.mutable_data_ptr() : nullptr, blocks);
      call.logits = part_logits.const_data_ptr();
      // A kernel reads a row before it writes its gradient: that can take the logits' place.
      const Tensor part_head = gradient ? beside : part_logits;
      if (gradient) call.gradient = part_logits.mutable_data_ptr();
      if (head_gradient) call.head_gradient = part_head.mutable_data_ptr();
      const LaunchFacts facts = launch_facts(call, scope_.device);
      check(facts.blocks <= most_blocks, "lnl_ext: a chunk needs more blocks than the largest");
      blocks += facts.blocks;
      const Tensor workspace = bytes(facts.workspace);
      check_launch(
          launch_bias_loss(call, scope_.device, workspace.mutable_data_ptr(), scope_.stream));

      const auto factors = [&](const Tensor& made) {
        const Tensor of_rows = rows_of(made, 0, rows, columns_);
        if (!narrow()) return of_rows;
        const Tensor rounded = rows_of(narrow_factors, 0, rows, columns_);
        copy_to(rounded, of_rows);
        return rounded;
      };
      if (to_features) {
        multiply(rows_of(tensors_.features_gradient, row, rows, call_.width), factors(part_logits),
                 tensors_.head_weight);
      }
      if (!to_head) continue;
      const Tensor of_head = reversed ? rows_of(part_head, 0, rows, columns_) : part_logits;
      if (to_bias) sum_rows(view(bias_sums, {columns_}, {1}, row / chunk * columns_), of_head);
      const Tensor by_column = transpose_of(factors(of_head), rows, columns_);
      if (row == 0) {
        multiply_wide(weight_sum, by_column, part);
      } else if (narrow()) {
        multiply_wide(weight_share, by_column, part);
        add_row(weight_sum, weight_share, 1, columns_ * call_.width, wide_);
      } else {
        TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(weight_sum.get(), weight_sum.get(),
                                                         by_column.get(), part.get(), 1.0, 1.0));
      }
    }
    if (reduced) {
      BiasLossCall call = whole;
      call.partials = partials.mutable_data_ptr();
      check_launch(launch_linear_fold(call, blocks, scope_.stream));
    }
    if (summed_wide) copy_to(tensors_.weight_gradient, weight_sum);
    if (to_bias) {
      const Tensor sum = empty({columns_}, wide_, features_);
      sum_rows(sum, bias_sums);
      copy_to(tensors_.bias_gradient, sum);
    }
  }

 private:
  bool narrow() const { return dtype_ != wide_; }
  Tensor bytes(std::size_t count) const {
    return empty_bytes(static_cast<std::int64_t>(count), features_);
  }
  Tensor matrix(std::int64_t rows, std::int64_t columns, DType dtype) const {
    return empty({rows, columns}, dtype, features_);
  }

  // Products past the dispatcher: neither autograd nor autocast has a say in the operator's own.
  static void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
  }
  // In the accumulation dtype.
  void multiply_wide(const Tensor& out, const Tensor& a, const Tensor& b) const {
    if (!narrow()) return multiply(out, a, b);
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_mm_dtype_out(out.get(), a.get(), b.get(), aoti_torch_dtype_float32()));
  }
  void add_row(const Tensor& to, const Tensor& row, std::int64_t rows, std::int64_t columns,
               DType dtype) const {
    check_launch(launch_add_row(to.mutable_data_ptr(), row.const_data_ptr(), rows, columns, dtype,
                                scope_.stream));
  }
  void make_logits(const Tensor& out, const Tensor& features, std::int64_t rows) const {
    multiply_wide(out, features, transpose_of(tensors_.head_weight, columns_, call_.width));
    if (tensors_.head_bias.has_value()) add_row(out, *tensors_.head_bias, rows, columns_, dtype_);
  }

  const LinearBiasLossCall& call_;
  const backend::LinearTensors& tensors_;
  const TensorFacts& features_;
  const DeviceScope& scope_;
  DType dtype_, wide_;
  std::int64_t columns_;
};

}  // namespace

}  // namespace lnl::cuda

namespace lnl::backend {

std::int64_t linear_bias_loss(const LinearBiasLossCall& call, LinearTensors& tensors,
                              const TensorFacts& features) {
  cuda::check_limits(call.loss);
  const cuda::DeviceScope scope(features);
  const cuda::LinearLaunchFacts facts = cuda::linear_launch_facts(call, scope.device);
  if (facts.on_chip) {
    const Tensor workspace = empty_bytes(static_cast<std::int64_t>(facts.workspace), features);
    cuda::check_launch(cuda::launch_linear_bias_loss(call, scope.device,
                                                     workspace.mutable_data_ptr(), scope.stream));
  } else {
    cuda::ChunkedCall(call, tensors, features, scope).launch();
  }
  return -1;
}

}  // namespace lnl::backend
