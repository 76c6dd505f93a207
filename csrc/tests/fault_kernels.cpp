// The launchers for float32 labels alone (which is quick to compile), from a copy of csrc/cuda with
// one fault put in.
#include "bias_loss_kernels.cuh"

namespace lnl::cuda {

LaunchFacts launch_facts(const BiasLossCall& call, const Device& device) {
  return facts_of(make_plan<float>(call, device));
}

int launch_bias_loss(const BiasLossCall& call, const Device& device, void* workspace,
                     CUstream_st* stream) {
  const Plan plan = make_plan<float>(call, device);
  auto* bytes = static_cast<unsigned char*>(workspace);
  if (call.loss != nullptr && call.reduction == Reduction::kMean) {
    launch_denominators<float>(call, plan, bytes, stream);
  }
  if (plan.blocks > 0) {
    launch_main<float, false>(plan, make_problem<float>(call, plan, bytes), stream);
  }
  return call.loss != nullptr ? launch_fold<float>(call, plan, bytes, stream) : cudaSuccess;
}

}  // namespace lnl::cuda
