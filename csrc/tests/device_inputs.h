// Device memory for the tests: numbers of a dtype, and the inputs that all calls of the kernels
// share.
#pragma once

#include <cstring>
#include <memory>
#include <optional>

#include "../emulator/emulator.h"
#include "../emulator/include/cuda_bf16.h"
#include "../emulator/include/cuda_fp16.h"
#include "../emulator/memory.h"
#include "bias_loss_case.h"

namespace lnl::tests {

using emulator::Access;
using emulator::Buffer;

inline void encode(DType dtype, double value, unsigned char* to) {
  const float single = static_cast<float>(value);
  switch (dtype) {
    case DType::kFloat64:
      std::memcpy(to, &value, 8);
      return;
    case DType::kFloat32:
      std::memcpy(to, &single, 4);
      return;
    case DType::kFloat16: {
      const __half half = __float2half_rn(single);
      std::memcpy(to, &half, 2);
      return;
    }
    case DType::kBFloat16: {
      const __nv_bfloat16 half = __float2bfloat16_rn(single);
      std::memcpy(to, &half, 2);
      return;
    }
  }
}

inline double decode(DType dtype, const unsigned char* from) {
  switch (dtype) {
    case DType::kFloat64: {
      double value;
      std::memcpy(&value, from, 8);
      return value;
    }
    case DType::kFloat32: {
      float value;
      std::memcpy(&value, from, 4);
      return value;
    }
    case DType::kFloat16: {
      __half value;
      std::memcpy(&value, from, 2);
      return __half2float(value);
    }
    case DType::kBFloat16: {
      __nv_bfloat16 value;
      std::memcpy(&value, from, 2);
      return __bfloat162float(value);
    }
  }
  return 0;
}

// Device memory of numbers of a dtype, `before` of them ahead of the first.
class Numbers {
 public:
  Numbers(const std::string& name, DType dtype, const std::vector<double>& values,
          std::int64_t before = 0, Access access = Access::kReadOnly)
      : dtype_(dtype), count_(values.size()), before_(before) {
    const std::size_t size = size_of(dtype);
    std::vector<unsigned char> bytes((count_ + before) * size, 0);
    for (std::size_t i = 0; i < count_; ++i) encode(dtype, values[i], &bytes[(i + before) * size]);
    buffer_.emplace(name, bytes.size(), access, bytes.data());
  }
  Numbers(const std::string& name, DType dtype, std::size_t count, std::int64_t before = 0)
      : dtype_(dtype), count_(count), before_(before) {
    buffer_.emplace(name, (count + before) * size_of(dtype), Access::kReadWrite);
  }
  void* data() const {
    return static_cast<unsigned char*>(buffer_->data()) + before_ * size_of(dtype_);
  }
  std::vector<double> values(const char* what) const {
    if (!buffer_->is_written(before_ * size_of(dtype_)))
      throw emulator::Fault(std::string("unwritten output: ") + what);
    std::vector<double> result(count_);
    const auto* bytes = static_cast<const unsigned char*>(data());
    for (std::size_t i = 0; i < count_; ++i)
      result[i] = decode(dtype_, bytes + i * size_of(dtype_));
    return result;
  }

 private:
  DType dtype_;
  std::size_t count_;
  std::int64_t before_ = 0;
  std::optional<Buffer> buffer_;
};

inline void check(int error) {
  if (error != 0) throw emulator::Fault("a launcher returned error " + std::to_string(error));
}

// Targets, weights and coefficients on the device, and a call that is filled in with them. It has
// no logits yet.
class DeviceInputs {
 public:
  DeviceInputs(const Case& c, const Inputs& inputs) : wide_(accumulation_of(c.dtype)) {
    call.dtype = c.dtype;
    call.rows = c.rows;
    call.heads = c.heads;
    call.classes = c.classes;
    call.positions = c.positions;
    call.channels_last = c.channels_last;
    if (c.target == Target::kLabels) {
      std::vector<std::int64_t> labels = inputs.labels;
      if (c.misaligned_labels) labels.insert(labels.begin(), 0);
      labels_.emplace("labels", labels.size() * 8, Access::kReadOnly, labels.data());
      call.labels = static_cast<const std::int64_t*>(labels_->data()) + c.misaligned_labels;
    } else {
      call.wide_probabilities = c.target == Target::kWideProbabilities;
      probabilities_.emplace("probabilities", call.wide_probabilities ? wide_ : c.dtype,
                             inputs.probabilities);
      call.probabilities = probabilities_->data();
    }
    if (c.weighted) {
      weight_.emplace("weight", wide_, inputs.weight);
      call.weight = weight_->data();
    }
    call.reversal = coefficient(c, c.reversal);
    call.entropy_weight = coefficient(c, c.entropy_weight);
    call.confusion_weight = coefficient(c, c.confusion_weight);
    call.ignore_index = kIgnoreIndex;
    call.label_smoothing = c.smoothing;
    call.reduction = c.reduction;
    call.mask_entropy = c.mask_entropy;
  }
  DeviceInputs(const DeviceInputs&) = delete;
  DeviceInputs& operator=(const DeviceInputs&) = delete;

  BiasLossCall call;

 private:
  Coefficient coefficient(const Case& c, double value) {
    Coefficient result;
    result.present = value >= 0;
    if (!result.present) return result;
    if (c.coefficients_on_device) {
      coefficients_.push_back(
          std::make_unique<Numbers>("coefficient", wide_, std::vector<double>{value}));
      result.device = coefficients_.back()->data();
      result.dtype = wide_;
    } else {
      result.host = value;
    }
    return result;
  }

  DType wide_;
  std::optional<Buffer> labels_;
  std::optional<Numbers> probabilities_, weight_;
  std::vector<std::unique_ptr<Numbers>> coefficients_;
};

// A device with few multiprocessors, or with one and one block on it, which then takes several
// turns, or with many.
inline cuda::Device device_of(const Case& c) {
  emulator::settings().shared_memory = c.shared_memory;
  emulator::settings().bulk_copies = c.bulk_copies;
  return {c.few_blocks ? 1 : c.many_blocks ? 40 : 2, c.shared_memory, c.few_blocks ? 1 : 16};
}

}  // namespace lnl::tests
