// Runs a linear case on the emulator. On chip everything is the kernels'; in chunks the products
// are made here, as torch makes them for csrc/cuda/linear_bias_loss_cuda.cpp, and the rest is the
// kernels'.
#include "../cuda/linear_bias_loss_chunks.h"
#include "../cuda/linear_bias_loss_launch.h"
#include "device_inputs.h"
#include "linear_case.h"

namespace lnl::tests {

namespace {

// Values, denominators and workspace of a call.
struct Outputs {
  explicit Outputs(const Case& c)
      : wide(accumulation_of(c.dtype)),
        count(c.reduction == Reduction::kNone ? c.sites() : 1),
        loss("loss", wide, count),
        cross_entropy("cross entropy", wide, count),
        entropy("entropy", wide, count),
        denominators("denominators", wide, static_cast<std::size_t>(2 * c.heads)) {}

  void attach(BiasLossCall& call) const {
    call.loss = loss.data();
    call.cross_entropy = cross_entropy.data();
    call.entropy = entropy.data();
    call.denominators = denominators.data();
  }
  void read(const Case& c, Results& results) const {
    results.loss = loss.values("loss");
    results.cross_entropy = cross_entropy.values("cross_entropy");
    results.entropy = entropy.values("entropy");
    if (c.reduction == Reduction::kMean) {
      results.denominators = denominators.values("denominators");
    }
  }

  DType wide;
  std::size_t count;
  Numbers loss, cross_entropy, entropy, denominators;
};

LinearResults run_on_chip(const LinearCase& c, const LinearInputs& inputs) {
  const Case& loss = c.loss;
  const cuda::Device device = device_of(loss);
  const std::int64_t before = c.unaligned ? 1 : 0;
  Numbers features("features", loss.dtype, inputs.features, before);
  Numbers weight("head weight", loss.dtype, inputs.weight, before);
  Numbers bias("head bias", loss.dtype, inputs.bias);
  DeviceInputs device_inputs(loss, inputs.loss);
  LinearBiasLossCall call;
  call.loss = device_inputs.call;
  call.width = c.width;
  call.features = features.data();
  call.head_weight = weight.data();
  call.head_bias = c.bias ? bias.data() : nullptr;

  Numbers features_gradient("features gradient", loss.dtype,
                            loss.gradient ? inputs.features.size() : 0);
  Numbers weight_gradient("weight gradient", loss.dtype,
                          loss.head_gradient ? inputs.weight.size() : 0);
  Numbers bias_gradient("bias gradient", loss.dtype, loss.head_gradient ? inputs.bias.size() : 0);
  const auto with_gradients = [&](bool wanted) {
    call.features_gradient = wanted && loss.gradient ? features_gradient.data() : nullptr;
    call.weight_gradient = wanted && loss.head_gradient ? weight_gradient.data() : nullptr;
    call.bias_gradient = wanted && loss.head_gradient && c.bias ? bias_gradient.data() : nullptr;
  };
  const auto launch = [&] {
    const cuda::LinearLaunchFacts facts = cuda::linear_launch_facts(call, device);
    if (!facts.on_chip) throw emulator::Fault("the case does not fit on chip");
    Buffer workspace("workspace", facts.workspace, Access::kReadWrite);
    check(cuda::launch_linear_bias_loss(call, device, workspace.data(), nullptr));
  };
  LinearResults results;
  const Outputs outputs(loss);
  outputs.attach(call.loss);
  with_gradients(!loss.separate_backward);
  if (outputs.count > 0) launch();
  outputs.read(loss, results.loss);
  if (loss.separate_backward) {
    Numbers upstream("upstream", outputs.wide, inputs.loss.upstream);
    call.loss.loss = call.loss.cross_entropy = call.loss.entropy = nullptr;
    call.loss.upstream = upstream.data();
    with_gradients(true);
    launch();
  }
  results.features_gradient = features_gradient.values("features_gradient");
  results.weight_gradient = weight_gradient.values("weight_gradient");
  results.bias_gradient = bias_gradient.values("bias_gradient");
  return results;
}

// The logits' gradients of all chunks, each in place of the chunk's logits or beside them.
LinearResults run_in_chunks(const LinearCase& c, const LinearInputs& inputs) {
  const Case& loss = c.loss;
  const cuda::Device device = device_of(loss);
  const DType wide = accumulation_of(loss.dtype);
  const auto size = static_cast<std::int64_t>(size_of(wide));
  const bool none = loss.reduction == Reduction::kNone;
  const bool reversed = loss.reversal >= 0;
  DeviceInputs device_inputs(loss, inputs.loss);
  const Outputs outputs(loss);
  BiasLossCall whole = device_inputs.call;
  outputs.attach(whole);
  Numbers upstream("upstream", wide, inputs.loss.upstream);
  std::vector<double> to_features, to_head;

  const auto pass = [&](bool forward, bool gradients) {
    if (!forward) {
      whole.loss = whole.cross_entropy = whole.entropy = nullptr;
      whole.upstream = upstream.data();
    }
    const std::int64_t columns = c.columns();
    std::int64_t most_blocks = 0;
    BiasLossCall first = whole;
    first.rows = c.chunk < loss.rows ? c.chunk : loss.rows;
    most_blocks = cuda::launch_facts(first, device).blocks;
    const std::int64_t chunks = (loss.rows + c.chunk - 1) / c.chunk;
    std::optional<Buffer> partials;
    if (forward && !none) {
      partials.emplace("partials", chunks * most_blocks * loss.heads * cuda::kPartials * size,
                       Access::kReadWrite);
    }
    if (forward && loss.reduction == Reduction::kMean) {
      Buffer workspace("workspace", cuda::linear_denominators_workspace(whole, device),
                       Access::kReadWrite);
      check(cuda::launch_linear_denominators(whole, device, workspace.data(), nullptr));
    }
    std::int64_t blocks = 0;
    for (std::int64_t row = 0; row < loss.rows; row += c.chunk) {
      const std::int64_t rows = c.chunk < loss.rows - row ? c.chunk : loss.rows - row;
      const auto begin = inputs.loss.logits.begin() + row * columns;
      std::vector<unsigned char> bytes(rows * columns * size);
      for (std::int64_t i = 0; i < rows * columns; ++i) {
        encode(wide, begin[i], &bytes[i * size]);
      }
      Buffer logits("logits", bytes.size(), Access::kReadWrite, bytes.data());
      Numbers head("head gradient", wide, gradients && reversed ? rows * columns : 0);
      BiasLossCall call =
          cuda::call_of_chunk(whole, row, rows, partials ? partials->data() : nullptr, blocks);
      call.logits = logits.data();
      if (gradients) call.gradient = logits.data();
      if (gradients && reversed) call.head_gradient = head.data();
      const cuda::LaunchFacts facts = cuda::launch_facts(call, device);
      if (facts.blocks > most_blocks) throw emulator::Fault("a later chunk has more blocks");
      blocks += facts.blocks;
      Buffer workspace("workspace", facts.workspace, Access::kReadWrite);
      check(cuda::launch_bias_loss(call, device, workspace.data(), nullptr));
      if (!gradients) continue;
      for (std::int64_t i = 0; i < rows * columns; ++i) {
        to_features.push_back(
            decode(wide, static_cast<const unsigned char*>(logits.data()) + i * size));
      }
      for (const double value : head.values("head gradient")) to_head.push_back(value);
    }
    if (forward && !none) {
      BiasLossCall call = whole;
      call.partials = partials->data();
      check(cuda::launch_linear_fold(call, blocks, nullptr));
    }
  };
  const bool gradients = loss.gradient || loss.head_gradient;
  LinearResults results;
  pass(true, gradients && !loss.separate_backward);
  outputs.read(loss, results.loss);
  if (loss.separate_backward) pass(false, gradients);
  if (!reversed) to_head = to_features;

  const std::int64_t columns = c.columns();
  for (std::int64_t row = 0; row < loss.rows && loss.gradient; ++row) {
    for (std::int64_t d = 0; d < c.width; ++d) {
      double sum = 0;
      for (std::int64_t m = 0; m < columns; ++m) {
        sum += to_features[row * columns + m] * inputs.weight[m * c.width + d];
      }
      results.features_gradient.push_back(sum);
    }
  }
  for (std::int64_t m = 0; m < columns && loss.head_gradient; ++m) {
    double bias = 0;
    for (std::int64_t row = 0; row < loss.rows; ++row) bias += to_head[row * columns + m];
    if (c.bias) results.bias_gradient.push_back(bias);
    for (std::int64_t d = 0; d < c.width; ++d) {
      double sum = 0;
      for (std::int64_t row = 0; row < loss.rows; ++row) {
        sum += to_head[row * columns + m] * inputs.features[row * c.width + d];
      }
      results.weight_gradient.push_back(sum);
    }
  }
  return results;
}

}  // namespace

LinearResults run_linear_kernels(const LinearCase& c, const LinearInputs& inputs) {
  return c.chunk > 0 ? run_in_chunks(c, inputs) : run_on_chip(c, inputs);
}

}  // namespace lnl::tests
