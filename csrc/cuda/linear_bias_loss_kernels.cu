// The launchers of linear_bias_loss_launch.h for every dtype. As bias_loss_kernels.cu, it includes
// no torch header.
#include "linear_bias_loss_launchers.cuh"

namespace lnl::cuda {

LinearLaunchFacts linear_launch_facts(const LinearBiasLossCall& call, const Device& device) {
  const LinearPlan plan = with_dtype(
      call.loss.dtype, [&](auto type) { return make_linear_plan<decltype(type)>(call, device); });
  LinearLaunchFacts facts;
  facts.on_chip = plan.on_chip;
  facts.threads = plan.threads;
  facts.blocks_per_multiprocessor = plan.resident;
  facts.tile_rows = plan.rows;
  facts.tile_columns = plan.tile_columns;
  facts.blocks = plan.loss.blocks;
  facts.shared_memory = plan.layout.total;
  facts.workspace = plan.workspace;
  return facts;
}

int launch_linear_bias_loss(const LinearBiasLossCall& call, const Device& device, void* workspace,
                            CUstream_st* stream) {
  return with_dtype(call.loss.dtype, [&](auto type) {
    return static_cast<int>(launch_linear<decltype(type)>(call, device, workspace, stream));
  });
}

namespace {

template <typename A>
Plan denominator_plan(const BiasLossCall& loss, const Device& device) {
  Plan plan;
  plan_denominators<A>(loss, device, plan);
  return plan;
}

// function(A()) for the accumulation type A of a dtype; the kernels around the main one need no
// other.
template <typename Function>
auto with_accumulation(DType dtype, Function function) {
  return dtype == DType::kFloat64 ? function(double()) : function(float());
}

}  // namespace

std::size_t linear_denominators_workspace(const BiasLossCall& loss, const Device& device) {
  return with_accumulation(
      loss.dtype, [&](auto type) { return denominator_plan<decltype(type)>(loss, device).total; });
}

int launch_linear_denominators(const BiasLossCall& loss, const Device& device, void* workspace,
                               CUstream_st* stream) {
  return with_accumulation(loss.dtype, [&](auto type) {
    using A = decltype(type);
    return static_cast<int>(launch_denominators<A>(loss, denominator_plan<A>(loss, device),
                                                   static_cast<unsigned char*>(workspace), stream));
  });
}

int launch_linear_fold(const BiasLossCall& loss, std::int64_t blocks, CUstream_st* stream) {
  return with_accumulation(loss.dtype, [&](auto type) {
    Plan plan;
    plan.blocks = static_cast<unsigned>(blocks);
    return static_cast<int>(launch_fold<decltype(type)>(
        loss, plan, static_cast<unsigned char*>(loss.partials), true, stream));
  });
}

int launch_add_row(void* to, const void* row, std::int64_t rows, std::int64_t columns, DType dtype,
                   CUstream_st* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = add_row<T>;
    const auto blocks = static_cast<unsigned>(divide_up(columns, 256));
    const auto turns = static_cast<unsigned>(rows < 1024 ? rows : 1024);
    LNL_LAUNCH(kernel, dim3(blocks, turns), dim3(256), 0, stream, static_cast<Accumulation<T>*>(to),
               static_cast<const T*>(row), rows, columns);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace lnl::cuda
