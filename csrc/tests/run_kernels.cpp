// Runs a case on the emulator: device buffers, the calls of csrc/cuda/bias_loss_launch.h, results.
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <sstream>

#include "../emulator/emulator.h"
#include "../emulator/include/cuda_bf16.h"
#include "../emulator/include/cuda_fp16.h"
#include "../emulator/memory.h"
#include "bias_loss_case.h"

namespace lnl::tests {

namespace {

using emulator::Access;
using emulator::Buffer;

std::size_t size_of(cuda::Dtype dtype) {
  return dtype == cuda::Dtype::kFloat64 ? 8 : dtype == cuda::Dtype::kFloat32 ? 4 : 2;
}

cuda::Dtype accumulation(cuda::Dtype dtype) {
  return dtype == cuda::Dtype::kFloat64 ? dtype : cuda::Dtype::kFloat32;
}

void encode(cuda::Dtype dtype, double value, unsigned char* to) {
  const float single = static_cast<float>(value);
  switch (dtype) {
    case cuda::Dtype::kFloat64:
      std::memcpy(to, &value, 8);
      return;
    case cuda::Dtype::kFloat32:
      std::memcpy(to, &single, 4);
      return;
    case cuda::Dtype::kFloat16: {
      const __half half = __float2half_rn(single);
      std::memcpy(to, &half, 2);
      return;
    }
    case cuda::Dtype::kBFloat16: {
      const __nv_bfloat16 half = __float2bfloat16_rn(single);
      std::memcpy(to, &half, 2);
      return;
    }
  }
}

double decode(cuda::Dtype dtype, const unsigned char* from) {
  switch (dtype) {
    case cuda::Dtype::kFloat64: {
      double value;
      std::memcpy(&value, from, 8);
      return value;
    }
    case cuda::Dtype::kFloat32: {
      float value;
      std::memcpy(&value, from, 4);
      return value;
    }
    case cuda::Dtype::kFloat16: {
      __half value;
      std::memcpy(&value, from, 2);
      return __half2float(value);
    }
    case cuda::Dtype::kBFloat16: {
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
  Numbers(const std::string& name, cuda::Dtype dtype, const std::vector<double>& values,
          std::int64_t before = 0)
      : dtype_(dtype), count_(values.size()), before_(before) {
    const std::size_t size = size_of(dtype);
    std::vector<unsigned char> bytes((count_ + before) * size, 0);
    for (std::size_t i = 0; i < count_; ++i) encode(dtype, values[i], &bytes[(i + before) * size]);
    buffer_.emplace(name, bytes.size(), Access::kReadOnly, bytes.data());
  }
  Numbers(const std::string& name, cuda::Dtype dtype, std::size_t count)
      : dtype_(dtype), count_(count) {
    buffer_.emplace(name, count * size_of(dtype), Access::kReadWrite);
  }
  void* data() const {
    return static_cast<unsigned char*>(buffer_->data()) + before_ * size_of(dtype_);
  }
  std::vector<double> values(const char* what) const {
    if (!buffer_->is_written()) throw emulator::Fault(std::string("unwritten output: ") + what);
    std::vector<double> result(count_);
    const auto* bytes = static_cast<const unsigned char*>(data());
    for (std::size_t i = 0; i < count_; ++i)
      result[i] = decode(dtype_, bytes + i * size_of(dtype_));
    return result;
  }

 private:
  cuda::Dtype dtype_;
  std::size_t count_;
  std::int64_t before_ = 0;
  std::optional<Buffer> buffer_;
};

void check(int error) {
  if (error != 0) throw emulator::Fault("a launcher returned error " + std::to_string(error));
}

}  // namespace

double rounded(cuda::Dtype dtype, double value) {
  unsigned char bytes[8];
  encode(dtype, value, bytes);
  return decode(dtype, bytes);
}

Results run_kernels(const Case& c, const Inputs& inputs) {
  const cuda::Dtype wide = accumulation(c.dtype);
  const bool none = c.reduction == cuda::Reduction::kNone;
  const std::size_t outputs = none ? c.sites() : 1;
  emulator::settings().shared_memory = c.shared_memory;
  const cuda::Device device{c.few_blocks ? 1 : 2, c.shared_memory, c.few_blocks ? 1 : 16};

  Numbers logits("logits", c.dtype, inputs.logits, c.misaligned);
  std::optional<Buffer> labels;
  std::optional<Numbers> probabilities, weight;
  cuda::BiasLossCall call;
  call.dtype = c.dtype;
  call.rows = c.rows;
  call.heads = c.heads;
  call.classes = c.classes;
  call.positions = c.positions;
  call.channels_last = c.channels_last;
  call.logits = logits.data();
  if (c.target == Target::kLabels) {
    labels.emplace("labels", inputs.labels.size() * 8, Access::kReadOnly, inputs.labels.data());
    call.labels = static_cast<const std::int64_t*>(labels->data());
  } else {
    call.wide_probabilities = c.target == Target::kWideProbabilities;
    probabilities.emplace("probabilities", call.wide_probabilities ? wide : c.dtype,
                          inputs.probabilities);
    call.probabilities = probabilities->data();
  }
  if (c.weighted) {
    weight.emplace("weight", wide, inputs.weight);
    call.weight = weight->data();
  }
  std::vector<std::unique_ptr<Numbers>> coefficients;
  const auto coefficient = [&](double value) {
    cuda::Coefficient result;
    result.present = value >= 0;
    if (!result.present) return result;
    if (c.coefficients_on_device) {
      coefficients.push_back(
          std::make_unique<Numbers>("coefficient", wide, std::vector<double>{value}));
      result.device = coefficients.back()->data();
    } else {
      result.host = value;
    }
    return result;
  };
  call.reversal = coefficient(c.reversal);
  call.entropy_weight = coefficient(c.entropy_weight);
  call.confusion_weight = coefficient(c.confusion_weight);
  call.ignore_index = kIgnoreIndex;
  call.label_smoothing = c.smoothing;
  call.reduction = c.reduction;
  call.mask_entropy = c.mask_entropy;

  Numbers loss("loss", wide, outputs), cross_entropy("cross entropy", wide, outputs),
      entropy("entropy", wide, outputs);
  Numbers denominators("denominators", wide, static_cast<std::size_t>(2 * c.heads));
  Numbers gradient("gradient", c.dtype, c.gradient ? c.elements() : 0);
  Numbers head_gradient("head gradient", c.dtype, c.head_gradient ? c.elements() : 0);
  const auto with_gradients = [&](bool wanted) {
    call.gradient = wanted && c.gradient ? gradient.data() : nullptr;
    call.head_gradient = wanted && c.head_gradient ? head_gradient.data() : nullptr;
  };
  const auto launch = [&] {
    Buffer workspace("workspace", cuda::launch_facts(call, device).workspace, Access::kReadWrite);
    check(cuda::launch_bias_loss(call, device, workspace.data(), nullptr));
  };

  call.loss = loss.data();
  call.cross_entropy = cross_entropy.data();
  call.entropy = entropy.data();
  call.denominators = denominators.data();
  with_gradients(!c.separate_backward);
  launch();
  Results results;
  results.loss = loss.values("loss");
  results.cross_entropy = cross_entropy.values("cross_entropy");
  results.entropy = entropy.values("entropy");
  if (c.reduction == cuda::Reduction::kMean)
    results.denominators = denominators.values("denominators");
  if (c.separate_backward) {
    Numbers upstream("upstream", wide, inputs.upstream);
    call.loss = call.cross_entropy = call.entropy = nullptr;
    call.upstream = upstream.data();
    with_gradients(true);
    launch();
  }
  results.gradient = gradient.values("gradient");
  results.head_gradient = head_gradient.values("head_gradient");
  return results;
}

}  // namespace lnl::tests
