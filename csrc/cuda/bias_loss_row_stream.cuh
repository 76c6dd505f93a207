// How the rows of rows_large come into shared memory, before and while they are worked on.
#pragma once

#include "bias_loss_reduce.cuh"
#include "bulk_copy.cuh"

namespace lnl::cuda {

constexpr int kGroups = 4;  // of asynchronous copies: what a long row comes in
constexpr int kSlots = 8;   // the most groups under way or at work

// The rows of a block on their way into shared memory, in groups of windows of 16 bytes. A warp
// copies the windows that it will itself read, so that it waits for no other warp: in bulk, or each
// lane its own. While it works on one group the next ones are under way, those of the next row too.
// Rows that fit stay until their gradients are made, each group's place being refilled behind them.
// Longer ones go round kGroups places, and through them a second time for their gradients.
template <typename T>
class RowStream {
 public:
  __device__ RowStream(const Problem<T>& problem, T* stage, BulkBarrier* barriers)
      : problem_(problem),
        stage_(stage),
        barriers_(barriers + threadIdx.x / kWarp * kSlots),
        row_(blockIdx.x),
        passes_(problem.wants_gradient() && !problem.stage ? 2 : 1) {
    const bool begins = LNL_BULK_COPIES && threadIdx.x % kWarp == 0;
#pragma unroll 1
    for (int slot = 0; begins && slot < problem.slots; ++slot) begin_barrier(barriers_ + slot);
    if (begins) order_stores_before_copies();  // those of begin_turn as well
  }

  // A warp's windows of a group, [begin, end), of which a lane has every kWarp-th. A row of fewer
  // windows ends earlier and leaves the others as they are, so that a place is always one warp's.
  struct Piece {
    int begin, end;
  };
  __device__ Piece piece(int group, int before) const {
    const int windows = (problem_.classes + before + kWide<T> - 1) / kWide<T>;
    const int all = problem_.slot_windows;
    const int first = group * all, left = problem_.row_windows - first;
    const int lines = ((left < all ? left : all) + kWarp - 1) / kWarp;  // of windows, for warps
    const int warp = threadIdx.x / kWarp;
    const int end = first + (lines * (warp + 1) >> problem_.warp_bits) * kWarp;
    return {first + (lines * warp >> problem_.warp_bits) * kWarp, end < windows ? end : windows};
  }
  // Where a window of a group lies in shared memory.
  __device__ T* place(int slot, int group, int window) const {
    return stage_ + ((slot - group) * problem_.slot_windows + window) * kWide<T>;
  }
  __device__ int next_slot(int slot) const { return slot + 1 == problem_.slots ? 0 : slot + 1; }

  // Starts to copy the next group, to a slot where the warp has read for the last time.
  __device__ void copy(int slot) {
    if (row_ < problem_.sites * problem_.heads) {
      LNL_BULK_COPIES ? copy_in_bulk(slot) : copy_by_lanes(slot);
    }
    if (!LNL_BULK_COPIES) __pipeline_commit();
    if (++group_ < problem_.groups) return;
    group_ = 0;
    if (++pass_ < passes_) return;
    pass_ = 0;
    row_ += gridDim.x;
  }

  // Waits for the group in a slot, after which `behind` more have been asked for. Each is waited
  // for once, in the order of copy().
  __device__ void wait(int slot, int behind) {
    if (!LNL_BULK_COPIES) {
      __pipeline_wait_prior(behind);
      return;
    }
    wait_for_copy(barriers_ + slot, parity_);
    if (slot + 1 == problem_.slots) parity_ ^= 1;
  }

 private:
  __device__ void copy_by_lanes(int slot) const {
    const T* row = problem_.logits + row_ * problem_.classes;
    const int before = elements_before(row);
    const Piece own = piece(group_, before);
    int window = own.begin + threadIdx.x % kWarp;
    T* to = place(slot, group_, window);
#pragma unroll 1
    for (; window < own.end; window += kWarp, to += kWarp * kWide<T>) {
      copy_window(row, window * kWide<T> - before, problem_.classes, true, to);
    }
  }

  // The whole windows of the warp's piece at once. The first ones of a row and its last one, which
  // may not be whole, come by the lane that will read them; no piece has both.
  __device__ void copy_in_bulk(int slot) const {
    const T* row = problem_.logits + row_ * problem_.classes;
    const int before = elements_before(row), lane = threadIdx.x % kWarp;
    const Piece own = piece(group_, before);
    const int first = (before + kWide<T> - 1) / kWide<T>;     // that is whole
    const int last = (problem_.classes + before) / kWide<T>;  // that is not
    const int begin = own.begin < first ? first : own.begin, end = own.end < last ? own.end : last;
    __syncwarp();  // the warp has read what is there, and knows its barriers
    if (lane == 0) {
      start_copy(place(slot, group_, begin), row + begin * kWide<T> - before,
                 begin < end ? (end - begin) * 16 : 0, barriers_ + slot);
    }
    const int window = own.begin + lane < first ? own.begin + lane : last;
    if (window < own.begin || window >= own.end || (window - own.begin) % kWarp != lane) return;
    copy_window(row, window * kWide<T> - before, problem_.classes, false,
                place(slot, group_, window));
    order_stores_before_copies();
  }

  const Problem<T>& problem_;
  T* stage_;
  BulkBarrier* barriers_;  // of the warp, one a slot
  std::int64_t row_;       // of the next group, and its place there
  int passes_, pass_ = 0, group_ = 0;
  unsigned parity_ = 0;  // of the next group to be waited for
};

}  // namespace lnl::cuda
