// A linear head that does not fit on chip, in chunks of rows: how many rows have their logits at a
// time, and the loss kernels' call for them. No torch header and no CUDA header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "bias_loss_launch.h"

namespace lnl::cuda {

// A chunk's logits take so many bytes, or are those of so many rows where that is more: a product
// of fewer rows would mostly read head_weight.
struct ChunkLimits {
  std::int64_t bytes = std::int64_t{64} << 20;
  std::int64_t least_rows = 256;
};

// Tests make them smaller.
inline ChunkLimits& chunk_limits() {
  static ChunkLimits limits;
  return limits;
}

// Of `rows` rows of `row_bytes` of logits each; at least 1.
inline std::int64_t chunk_rows(std::int64_t rows, std::int64_t row_bytes) {
  const ChunkLimits& limits = chunk_limits();
  const std::int64_t most = std::max(limits.bytes / row_bytes, limits.least_rows);
  return std::max<std::int64_t>(std::min(most, rows), 1);
}

// The part of `whole` (of all rows, its logits of its dtype) that is rows [row, row + rows).
// Logits, gradients and workspace are the caller's. `partials`, null for an unreduced loss or a
// backward call, are those of all chunks, of which earlier ones have filled `blocks`.
inline BiasLossCall call_of_chunk(const BiasLossCall& whole, std::int64_t row, std::int64_t rows,
                                  void* partials, std::int64_t blocks) {
  const std::int64_t size = whole.dtype == DType::kFloat64 ? 8 : 4;
  const auto advanced = [size](auto* pointer, std::int64_t elements) -> decltype(pointer) {
    if (pointer == nullptr) return nullptr;
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(pointer)>>,
                                    const char, char>;
    return static_cast<Byte*>(pointer) + elements * size;
  };
  BiasLossCall call = whole;
  call.rows = rows;
  if (call.labels != nullptr) call.labels += row * whole.heads;
  call.probabilities = advanced(call.probabilities, row * whole.heads * whole.classes);
  if (whole.reduction == Reduction::kNone) {
    call.loss = advanced(call.loss, row);
    call.cross_entropy = advanced(call.cross_entropy, row);
    call.entropy = advanced(call.entropy, row);
    call.upstream = advanced(call.upstream, row);
  }
  call.partials = advanced(partials, blocks * whole.heads * kPartials);
  return call;
}

}  // namespace lnl::cuda
