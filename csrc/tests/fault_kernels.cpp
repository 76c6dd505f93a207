// The launchers for float32 alone, from a copy of csrc/cuda with one fault put in.
#include "bias_loss_kernels.cuh"

namespace lnl::cuda {

LaunchFacts launch_facts(const BiasLossCall& call, const Device& device) {
  LaunchFacts facts;
  facts.workspace = make_plan<float>(call, device).total;
  return facts;
}

int launch_bias_loss(const BiasLossCall& call, const Device& device, void* workspace,
                     CUstream_st* stream) {
  return launch_call<float>(call, device, workspace, stream);
}

}  // namespace lnl::cuda
