// The launchers of bias_loss_launch.h for every dtype. This unit and that of the linear head are
// all that nvcc compiles; they include no torch header, so that they build fast and their machine
// code can be looked at alone.
#include "bias_loss_launchers.cuh"

namespace lnl::cuda {

Device device_facts(int index) {
  Device device;
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  return device;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

LaunchFacts launch_facts(const BiasLossCall& call, const Device& device) {
  return facts_of(
      with_dtype(call.dtype, [&](auto type) { return make_plan<decltype(type)>(call, device); }));
}

int launch_bias_loss(const BiasLossCall& call, const Device& device, void* workspace,
                     CUstream_st* stream) {
  return with_dtype(call.dtype, [&](auto type) {
    return static_cast<int>(launch_call<decltype(type)>(call, device, workspace, stream));
  });
}

int launch_scale_gradient(void* gradient, std::int64_t elements, DType dtype,
                          const Coefficient& factor, const Device& device, CUstream_st* stream) {
  return with_dtype(dtype, [&](auto type) {
    return static_cast<int>(
        launch_scale<decltype(type)>(gradient, elements, factor, device, stream));
  });
}

}  // namespace lnl::cuda
