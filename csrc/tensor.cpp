#include "tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace lnl {

namespace {

using torch::headeronly::ScalarType;

std::int32_t code_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return aoti_torch_dtype_float64();
    case DType::kFloat16:
      return aoti_torch_dtype_float16();
    case DType::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::kFloat32:
      break;
  }
  return aoti_torch_dtype_float32();
}

Tensor allocate(const Sizes& sizes, const Sizes& strides, std::int32_t dtype,
                const TensorFacts& like) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()),
                                                  sizes.data(), strides.data(), dtype,
                                                  like.device_type, like.device_index, &handle));
  return Tensor(handle);
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

}  // namespace

std::ostream& operator<<(std::ostream& stream, const ShapeText& shape) {
  stream << '(';
  for (std::size_t i = 0; i < shape.sizes.size(); ++i) {
    stream << (i > 0 ? ", " : "") << shape.sizes[i];
  }
  return stream << (shape.sizes.size() == 1 ? ",)" : ")");
}

std::ostream& operator<<(std::ostream& stream, const DTypeText& dtype) {
  return stream << "torch." << name_of(dtype.of.dtype);
}

std::ostream& operator<<(std::ostream& stream, const DeviceText& device) {
  if (device.of.on_cpu()) return stream << "cpu";
  if (device.of.device_type == aoti_torch_device_type_cuda()) {
    return stream << "cuda:" << device.of.device_index;
  }
  return stream << "another kind of device";
}

TensorFacts::TensorFacts(const Tensor& tensor) : dtype(tensor.scalar_type()) {
  const auto of = tensor.sizes(), by = tensor.strides();
  sizes.assign(of.begin(), of.end());
  strides.assign(by.begin(), by.end());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
}

std::int64_t TensorFacts::numel() const {
  std::int64_t count = 1;
  for (const std::int64_t size : sizes) count *= size;
  return count;
}

bool TensorFacts::is_floating() const {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

bool TensorFacts::on_cpu() const { return device_type == aoti_torch_device_type_cpu(); }

DType dtype_of(const TensorFacts& facts) {
  switch (facts.dtype) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

Sizes dense_strides(const Sizes& sizes, bool channels_last) {
  Sizes strides(sizes.size());
  std::int64_t stride = 1;
  if (channels_last) {
    strides[1] = 1;
    stride = std::max<std::int64_t>(sizes[1], 1);
  }
  for (std::size_t i = sizes.size(); i-- > 0;) {
    if (channels_last && i == 1) continue;
    strides[i] = stride;
    stride *= std::max<std::int64_t>(sizes[i], 1);
  }
  return strides;
}

bool has_strides(const TensorFacts& facts, const Sizes& strides) {
  if (facts.numel() == 0) return true;
  for (std::size_t i = 0; i < strides.size(); ++i) {
    if (facts.sizes[i] != 1 && facts.strides[i] != strides[i]) return false;
  }
  return true;
}

bool is_dense(const TensorFacts& facts) {
  if (facts.numel() == 0) return true;
  std::vector<std::pair<std::int64_t, std::int64_t>> dimensions;  // stride, size
  for (std::size_t i = 0; i < facts.sizes.size(); ++i) {
    if (facts.sizes[i] != 1) dimensions.emplace_back(facts.strides[i], facts.sizes[i]);
  }
  std::sort(dimensions.begin(), dimensions.end());
  std::int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

Tensor empty(const Sizes& sizes, const Sizes& strides, DType dtype, const TensorFacts& like) {
  return allocate(sizes, strides, code_of(dtype), like);
}

Tensor empty(const Sizes& sizes, DType dtype, const TensorFacts& like) {
  return allocate(sizes, dense_strides(sizes), code_of(dtype), like);
}

Tensor empty_bytes(std::int64_t bytes, const TensorFacts& like) {
  return allocate({bytes}, {1}, aoti_torch_dtype_uint8(), like);
}

Tensor view(const Tensor& tensor, const Sizes& sizes, const Sizes& strides, std::int64_t offset) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), static_cast<std::int64_t>(sizes.size()),
                                     sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

Tensor rows_of(const Tensor& matrix, std::int64_t first, std::int64_t count, std::int64_t columns) {
  return view(matrix, {count, columns}, {columns, 1}, first * columns);
}

Tensor transpose_of(const Tensor& matrix, std::int64_t rows, std::int64_t columns) {
  return view(matrix, {columns, rows}, {1, columns}, 0);
}

void copy_to(const Tensor& to, const Tensor& from) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
}

void zero(const Tensor& tensor) { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(tensor.get())); }

Tensor laid_out(const Tensor& tensor, const TensorFacts& facts, DType dtype, const Sizes& strides) {
  if (facts.is_floating() && dtype_of(facts) == dtype && has_strides(facts, strides)) return tensor;
  Tensor made = empty(facts.sizes, strides, dtype, facts);
  copy_to(made, tensor);
  return made;
}

Tensor contiguous_labels(const Tensor& tensor, const TensorFacts& facts) {
  Tensor made = allocate(facts.sizes, dense_strides(facts.sizes), aoti_torch_dtype_int64(), facts);
  copy_to(made, tensor);
  return made;
}

void sum_rows(const Tensor& out, const Tensor& matrix) {
  Tensor result = out;
  const std::int64_t rows = 0;
  torch::stable::sum_out(result, matrix, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1));
}

}  // namespace lnl
