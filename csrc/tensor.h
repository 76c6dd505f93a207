// The little that the operators need of tensors, on torch's stable interface, and errors. Whatever
// a user can do wrong is checked before torch is called: torch prints a trace where a call of its C
// functions fails.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "types.h"

namespace lnl {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<std::int64_t>;

// Raises RuntimeError with these words unless `condition` holds.
template <typename... Words>
void check(bool condition, const Words&... words) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// As Python prints them: (8, 5), torch.float32, cuda:0.
struct ShapeText {
  const Sizes& sizes;
};
std::ostream& operator<<(std::ostream& stream, const ShapeText& shape);

// What the checks ask of a tensor, once.
struct TensorFacts {
  Sizes sizes, strides;
  torch::headeronly::ScalarType dtype;
  std::int32_t device_type, device_index;

  explicit TensorFacts(const Tensor& tensor);

  std::int64_t dim() const { return static_cast<std::int64_t>(sizes.size()); }
  std::int64_t numel() const;
  bool is_floating() const;  // of a dtype that the kernels read
  bool on_cpu() const;
  bool same_device(const TensorFacts& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  ShapeText shape() const { return {sizes}; }
};
struct DTypeText {
  const TensorFacts& of;
};
struct DeviceText {
  const TensorFacts& of;
};
std::ostream& operator<<(std::ostream& stream, const DTypeText& dtype);
std::ostream& operator<<(std::ostream& stream, const DeviceText& device);

// Of one of the four floating dtypes.
DType dtype_of(const TensorFacts& facts);

// Strides of a dense tensor; with `channels_last` dimension 1 is the innermost.
Sizes dense_strides(const Sizes& sizes, bool channels_last = false);

// Whether the strides are these, but for dimensions whose strides do not matter.
bool has_strides(const TensorFacts& facts, const Sizes& strides);

// Whether every element of a piece of memory belongs to one place of the tensor.
bool is_dense(const TensorFacts& facts);

// Uninitialised, on the device of `like`.
Tensor empty(const Sizes& sizes, const Sizes& strides, DType dtype, const TensorFacts& like);
Tensor empty(const Sizes& sizes, DType dtype, const TensorFacts& like);
Tensor empty_bytes(std::int64_t bytes, const TensorFacts& like);

// A view of the same memory.
Tensor view(const Tensor& tensor, const Sizes& sizes, const Sizes& strides, std::int64_t offset);
// Rows [first, first + count) of a dense matrix of `columns` columns, or its transpose.
Tensor rows_of(const Tensor& matrix, std::int64_t first, std::int64_t count, std::int64_t columns);
Tensor transpose_of(const Tensor& matrix, std::int64_t rows, std::int64_t columns);

void copy_to(const Tensor& to, const Tensor& from);  // of any dtypes and strides
void zero(const Tensor& tensor);

// The tensor itself where it has this dtype and these strides, else a copy that has.
Tensor laid_out(const Tensor& tensor, const TensorFacts& facts, DType dtype, const Sizes& strides);

// A dense copy of labels, which are int64.
Tensor contiguous_labels(const Tensor& tensor, const TensorFacts& facts);

// As torch.sum over the rows of a matrix, written to `out` [columns].
void sum_rows(const Tensor& out, const Tensor& matrix);

}  // namespace lnl
