// The interface of the linear head's kernels: as bias_loss_launch.h, no torch header and no CUDA
// header.
#pragma once

#include "bias_loss_launch.h"

namespace lnl::cuda {

struct LinearLaunchFacts {
  // False: head_weight and the sums of its gradient do not fit on chip, or there are more than 64
  // columns. launch_linear_bias_loss refuses such a call; see launch_linear_denominators.
  bool on_chip = false;
  int threads = 0;                    // of a block
  int blocks_per_multiprocessor = 0;  // that its shared memory allows
  int tile_rows = 0;                  // rows of features that a block holds at a time
  int tile_columns = 0;               // columns of logits that a thread works on at a time
  unsigned blocks = 0;
  std::size_t shared_memory = 0;  // dynamic bytes of a block
  std::size_t workspace = 0;      // bytes that launch_linear_bias_loss needs
};

LinearLaunchFacts linear_launch_facts(const LinearBiasLossCall& call, const Device& device);

// Enqueues a forward or backward call whose facts say on_chip. Nothing waits for the device.
// Returns a cudaError_t.
int launch_linear_bias_loss(const LinearBiasLossCall& call, const Device& device, void* workspace,
                            CUstream_st* stream);

// A loss whose logits are made in chunks of rows: first the denominators of the whole (for a mean;
// loss.labels, weight and denominators are read), then launch_bias_loss for every chunk with
// BiasLossCall::partials, then the sum of all chunks' partials into loss, cross_entropy and
// entropy. The first needs linear_denominators_workspace bytes.
std::size_t linear_denominators_workspace(const BiasLossCall& loss, const Device& device);
int launch_linear_denominators(const BiasLossCall& loss, const Device& device, void* workspace,
                               CUstream_st* stream);
int launch_linear_fold(const BiasLossCall& loss, std::int64_t blocks, CUstream_st* stream);

// to += row, for every one of `rows` rows [columns] of `to`, which is of the accumulation dtype of
// the row's.
int launch_add_row(void* to, const void* row, std::int64_t rows, std::int64_t columns, DType dtype,
                   CUstream_st* stream);

}  // namespace lnl::cuda
