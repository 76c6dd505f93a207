// Runs a case on the emulator: device buffers, the calls of csrc/cuda/bias_loss_launch.h, results.
#include "device_inputs.h"

namespace lnl::tests {

Results run_kernels(const Case& c, const Inputs& inputs) {
  const DType wide = accumulation_of(c.dtype);
  const bool none = c.reduction == Reduction::kNone;
  const std::size_t outputs = none ? c.sites() : 1;
  const cuda::Device device = device_of(c);

  Numbers logits("logits", c.dtype, inputs.logits, c.misaligned,
                 c.in_place ? Access::kReadWrite : Access::kReadOnly);
  DeviceInputs device_inputs(c, inputs);
  BiasLossCall& call = device_inputs.call;
  call.logits = logits.data();

  Numbers loss("loss", wide, outputs), cross_entropy("cross entropy", wide, outputs),
      entropy("entropy", wide, outputs);
  // A gradient may be over the logits only where they are not read again.
  const bool given = c.in_place && c.reduction == Reduction::kMean && c.target == Target::kLabels;
  const std::vector<double> known = given ? oracle(c, inputs).denominators : std::vector<double>();
  const Numbers denominators =
      given ? Numbers("denominators", wide, known)
            : Numbers("denominators", wide, static_cast<std::size_t>(2 * c.heads));
  const bool gradient_there = c.in_place && c.gradient;
  const bool head_there = c.in_place && !c.gradient && c.head_gradient;
  const Numbers own_gradient("gradient", c.dtype, c.gradient ? c.elements() : 0,
                             c.misaligned_gradient);
  const Numbers own_head_gradient("head gradient", c.dtype, c.head_gradient ? c.elements() : 0,
                                  c.misaligned_head_gradient);
  const Numbers& gradient = gradient_there ? logits : own_gradient;
  const Numbers& head_gradient = head_there ? logits : own_head_gradient;
  const auto with_gradients = [&](bool wanted) {
    call.gradient = wanted && c.gradient ? gradient.data() : nullptr;
    call.head_gradient = wanted && c.head_gradient ? head_gradient.data() : nullptr;
  };
  const auto launch = [&] {
    Buffer workspace("workspace", cuda::launch_facts(call, device).workspace, Access::kReadWrite);
    check(cuda::launch_bias_loss(call, device, workspace.data(), nullptr));
  };

  call.loss = loss.data();
  call.cross_entropy = cross_entropy.data();
  call.entropy = entropy.data();
  call.denominators = denominators.data();
  call.denominators_given = given;
  with_gradients(!c.separate_backward);
  launch();
  Results results;
  results.loss = loss.values("loss");
  results.cross_entropy = cross_entropy.values("cross_entropy");
  results.entropy = entropy.values("entropy");
  if (c.reduction == Reduction::kMean) results.denominators = denominators.values("denominators");
  if (c.separate_backward) {
    Numbers upstream("upstream", wide, inputs.upstream);
    call.loss = call.cross_entropy = call.entropy = nullptr;
    call.upstream = upstream.data();
    with_gradients(true);
    launch();
  }
  results.gradient = gradient.values("gradient");
  results.head_gradient = head_gradient.values("head_gradient");
  return results;
}

}  // namespace lnl::tests
