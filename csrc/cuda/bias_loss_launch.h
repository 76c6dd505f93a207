// The interface of the kernels: as types.h, no torch header and no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../types.h"

struct CUstream_st;

namespace lnl::cuda {

// The facts of a device that decide grid sizes and what fits on chip.
struct Device {
  int multiprocessors = 1;
  int shared_memory = 48 * 1024;       // most dynamic bytes one block may opt in to
  int blocks_per_multiprocessor = 16;  // a grid has no more; its blocks take several turns
};

// Sums that a block makes for each head: CE, H and the confusion term, and of labels the weights of
// those that count and the number of those that do not.
constexpr int kPartials = 5;

// What a call comes to on a device: the main kernel and how it is launched.
struct LaunchFacts {
  const char* kernel = "";
  int threads = 0;                // of a block
  unsigned blocks = 0;            // of one head for sites_*; 0: nothing to do
  std::int64_t unit = 0;          // rows, or sites of a head, that a block works on at a time
  std::size_t shared_memory = 0;  // dynamic bytes of a block
  std::int64_t in_flight = 0;     // bytes of logits that a block has asked for at a time
  bool dense = false;             // the variant for targets of every class
  bool reads_logits_once = true;  // false: too many classes to stay on chip
  std::size_t workspace = 0;      // bytes that launch_bias_loss needs
};

// The facts of a CUDA device, which the runtime answers from memory, and the words for a
// cudaError_t.
Device device_facts(int index);
const char* error_text(int error);

LaunchFacts launch_facts(const BiasLossCall& call, const Device& device);

// Enqueues a forward or backward call. Nothing waits for the device. Returns a cudaError_t.
int launch_bias_loss(const BiasLossCall& call, const Device& device, void* workspace,
                     CUstream_st* stream);

// gradient *= factor, without touching gradient where the factor is 1. Returns a cudaError_t.
int launch_scale_gradient(void* gradient, std::int64_t elements, DType dtype,
                          const Coefficient& factor, const Device& device, CUstream_st* stream);

}  // namespace lnl::cuda
