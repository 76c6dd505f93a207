// The linear head's launchers for float32 on chip alone (which is quick to compile), from a copy of
// csrc/cuda with one fault put in. linear_fault_test has no case in chunks.
#include "linear_bias_loss_launchers.cuh"

namespace lnl::cuda {

LinearLaunchFacts linear_launch_facts(const LinearBiasLossCall& call, const Device& device) {
  const LinearPlan plan = make_linear_plan<float>(call, device);
  LinearLaunchFacts facts;
  facts.on_chip = plan.on_chip;
  facts.workspace = plan.workspace;
  return facts;
}

int launch_linear_bias_loss(const LinearBiasLossCall& call, const Device& device, void* workspace,
                            CUstream_st* stream) {
  return launch_linear<float>(call, device, workspace, stream);
}

std::size_t linear_denominators_workspace(const BiasLossCall&, const Device&) { return 0; }

int launch_linear_denominators(const BiasLossCall&, const Device&, void*, CUstream_st*) {
  return cudaErrorInvalidValue;
}

int launch_linear_fold(const BiasLossCall&, std::int64_t, CUstream_st*) {
  return cudaErrorInvalidValue;
}

}  // namespace lnl::cuda
