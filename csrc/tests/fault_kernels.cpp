// The launchers for float32 labels alone (which is quick to compile), from a copy of csrc/cuda with
// one fault put in.
#include "bias_loss_launchers.cuh"

namespace lnl::cuda {

template <>
cudaError_t launch_variant<float>(const Plan& plan, const Problem<float>& problem,
                                  cudaStream_t stream) {
  return launch_main<float, false>(plan, problem, stream);
}

LaunchFacts launch_facts(const BiasLossCall& call, const Device& device) {
  return facts_of(make_plan<float>(call, device));
}

int launch_bias_loss(const BiasLossCall& call, const Device& device, void* workspace,
                     CUstream_st* stream) {
  return launch_call<float>(call, device, workspace, stream);
}

}  // namespace lnl::cuda
