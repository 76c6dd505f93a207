// What the torch side and the kernels agree on: raw pointers, numbers and a stream, no torch header
// and no CUDA header, so that either side compiles fast and the emulator can stand in for the
// device.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace lnl::cuda {

enum class Dtype : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

// A number that is either known on the host or read by the kernel, so that nobody waits for it.
struct Coefficient {
  bool present = false;
  const void* device = nullptr;  // of the accumulation dtype; wins over host
  double host = 0.0;
};

// The facts of a device that decide grid sizes and what fits on chip.
struct Device {
  int multiprocessors = 1;
  int shared_memory = 48 * 1024;       // most dynamic bytes one block may opt in to
  int blocks_per_multiprocessor = 16;  // a grid has no more; its blocks take several turns
};

// One call. "Accumulation dtype" is float64 for float64 logits and float32 for every other.
struct BiasLossCall {
  Dtype dtype = Dtype::kFloat32;
  std::int64_t rows = 0;       // N
  std::int64_t heads = 1;      // K
  std::int64_t classes = 1;    // C
  std::int64_t positions = 1;  // S
  bool channels_last = false;  // memory [N, S, K, C]; else [N, K, C, S]; the same for S = 1

  const void* logits = nullptr;
  const std::int64_t* labels = nullptr;  // [N, K, S], or null with probabilities
  const void* probabilities = nullptr;   // in the memory order of logits
  bool wide_probabilities = false;       // of the accumulation dtype, not of that of logits
  const void* weight = nullptr;          // [C] of the accumulation dtype, or null
  Coefficient reversal, entropy_weight, confusion_weight;
  std::int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  Reduction reduction = Reduction::kMean;
  bool mask_entropy = false;

  // Forward: loss is set, and upstream is null. Backward: loss is null, upstream may be set and
  // denominators are read. All of the accumulation dtype.
  void* loss = nullptr;            // [] or [N, S]
  void* cross_entropy = nullptr;   // likewise
  void* entropy = nullptr;         // likewise
  void* denominators = nullptr;    // [K, 2]
  const void* upstream = nullptr;  // [] or, for Reduction::kNone, [N, S]

  // The call is one of several that together make one reduced loss: it writes its sums here, for
  // launch_linear_fold, reads denominators, and leaves loss (which is set), cross_entropy and
  // entropy alone. [LaunchFacts::blocks, K, 3] of the accumulation dtype.
  void* partials = nullptr;

  // One of them may be the logits' own memory: no thread reads a logit that another may have
  // overwritten.
  void* gradient = nullptr;       // dtype and memory order of logits; null: not wanted
  void* head_gradient = nullptr;  // likewise
};

// What a call comes to on a device: the main kernel and how it is launched.
struct LaunchFacts {
  const char* kernel = "";
  int threads = 0;                // of a block
  unsigned blocks = 0;            // of one head for sites_*; 0: nothing to do
  std::size_t shared_memory = 0;  // dynamic bytes of a block
  bool dense = false;             // the variant for targets of every class
  bool reads_logits_once = true;  // false: too many classes to stay on chip
  std::size_t workspace = 0;      // bytes that launch_bias_loss needs
};

LaunchFacts launch_facts(const BiasLossCall& call, const Device& device);

// Enqueues a forward or backward call. Nothing waits for the device. Returns a cudaError_t.
int launch_bias_loss(const BiasLossCall& call, const Device& device, void* workspace,
                     CUstream_st* stream);

// gradient *= *factor, without touching gradient where the factor is 1. Returns a cudaError_t.
int launch_scale_gradient(void* gradient, std::int64_t elements, Dtype dtype, const void* factor,
                          const Device& device, CUstream_st* stream);

}  // namespace lnl::cuda
