// cpu_test default|avx2|avx512: the CPU's half of the operators on the cases of the kernels,
// against the same oracle, and from several threads at once: for the sanitizers. Exact comparisons
// are python_tests'.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../backend.h"
#include "../device_inputs.h"
#include "../linear_case.h"
#include "capability.h"

namespace {

using namespace lnl;
using tests::Numbers;

Tensor tensor_of(DType dtype, const Sizes& sizes, const std::vector<double>* values = nullptr) {
  const std::int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16()};
  const Sizes strides = dense_strides(sizes);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(),
      codes[static_cast<int>(dtype)], aoti_torch_device_type_cpu(), -1, &handle));
  const Tensor tensor(handle);
  if (values != nullptr && !values->empty()) {
    const Numbers numbers("values", dtype, *values);
    std::memcpy(tensor.mutable_data_ptr(), numbers.data(), values->size() * size_of(dtype));
  }
  return tensor;
}

std::vector<double> values_of(const Tensor& tensor, DType dtype) {
  const Numbers numbers("values", dtype, static_cast<std::size_t>(tensor.numel()));
  if (tensor.numel() > 0) {
    std::memcpy(numbers.data(), tensor.const_data_ptr(), tensor.numel() * size_of(dtype));
  }
  return numbers.values("values");
}

void check_labels(std::int64_t wrong, bool out_of_range) {
  check((wrong >= 0) == out_of_range, "a wrong label at ", wrong);
}

// The values' memory, and the two passes of a case: run(whether gradients are wanted).
template <typename Run>
void run_passes(const tests::Case& c, const tests::Inputs& inputs, BiasLossCall& call,
                tests::Results& results, const Run& run) {
  const DType wide = accumulation_of(c.dtype);
  const std::size_t outputs = c.reduction == Reduction::kNone ? c.sites() : 1;
  const Numbers loss("loss", wide, outputs), cross_entropy("cross entropy", wide, outputs),
      entropy("entropy", wide, outputs);
  const Numbers denominators("denominators", wide, static_cast<std::size_t>(2 * c.heads));
  call.loss = loss.data();
  call.cross_entropy = cross_entropy.data();
  call.entropy = entropy.data();
  call.denominators = denominators.data();
  if (outputs > 0) run(!c.separate_backward);
  results.loss = loss.values("loss");
  results.cross_entropy = cross_entropy.values("cross_entropy");
  results.entropy = entropy.values("entropy");
  if (c.reduction == Reduction::kMean) results.denominators = denominators.values("denominators");
  if (!c.separate_backward) return;
  const Numbers upstream("upstream", wide, inputs.upstream);
  call.loss = call.cross_entropy = call.entropy = nullptr;
  call.upstream = upstream.data();
  call.denominators_given = true;
  run(true);
}

tests::Results run_cpu(const tests::Case& c, const tests::Inputs& inputs) {
  const TensorFacts facts(tensor_of(c.dtype, {1}));
  tests::DeviceInputs tensors(c, inputs);
  BiasLossCall& call = tensors.call;
  const Numbers logits("logits", c.dtype, inputs.logits, c.misaligned);
  const Numbers gradient("gradient", c.dtype, c.gradient ? c.elements() : 0, c.misaligned_gradient);
  const Numbers head_gradient("head gradient", c.dtype, c.head_gradient ? c.elements() : 0,
                              c.misaligned_head_gradient);
  call.logits = logits.data();
  tests::Results results;
  run_passes(c, inputs, call, results, [&](bool gradients) {
    call.gradient = gradients && c.gradient ? gradient.data() : nullptr;
    call.head_gradient = gradients && c.head_gradient ? head_gradient.data() : nullptr;
    check_labels(backend::bias_loss(call, facts), c.out_of_range);
  });
  results.gradient = gradient.values("gradient");
  results.head_gradient = head_gradient.values("head_gradient");
  return results;
}

tests::LinearResults run_cpu(const tests::LinearCase& c, const tests::LinearInputs& inputs) {
  const tests::Case& loss = c.loss;
  tests::DeviceInputs device_inputs(loss, inputs.loss);
  LinearBiasLossCall call;
  const std::int64_t columns = c.columns();
  const auto empty_unless = [&](bool wanted, const Sizes& sizes) {
    return tensor_of(loss.dtype, wanted ? sizes : Sizes{0});
  };
  backend::LinearTensors tensors;
  tensors.features = tensor_of(loss.dtype, {loss.rows, c.width}, &inputs.features);
  tensors.head_weight = tensor_of(loss.dtype, {columns, c.width}, &inputs.weight);
  if (c.bias) tensors.head_bias = tensor_of(loss.dtype, {columns}, &inputs.bias);
  tensors.features_gradient = empty_unless(loss.gradient, {loss.rows, c.width});
  tensors.weight_gradient = empty_unless(loss.head_gradient, {columns, c.width});
  tensors.bias_gradient = empty_unless(loss.head_gradient && c.bias, {columns});
  if (loss.rows == 0) {  // as the operators do
    zero(tensors.weight_gradient);
    zero(tensors.bias_gradient);
  }
  const TensorFacts facts(tensors.features);
  call.loss = device_inputs.call;
  call.width = c.width;
  call.features = tensors.features.const_data_ptr();
  call.head_weight = tensors.head_weight.const_data_ptr();
  tests::LinearResults results;
  run_passes(loss, inputs.loss, call.loss, results.loss, [&](bool gradients) {
    const auto address = [gradients](const Tensor& tensor, bool wanted) {
      return gradients && wanted ? tensor.mutable_data_ptr() : nullptr;
    };
    call.features_gradient = address(tensors.features_gradient, loss.gradient);
    call.weight_gradient = address(tensors.weight_gradient, loss.head_gradient);
    call.bias_gradient = address(tensors.bias_gradient, loss.head_gradient && c.bias);
    check_labels(backend::linear_bias_loss(call, tensors, facts), loss.out_of_range);
  });
  results.features_gradient = values_of(tensors.features_gradient, loss.dtype);
  results.weight_gradient = values_of(tensors.weight_gradient, loss.dtype);
  results.bias_gradient = values_of(tensors.bias_gradient, loss.dtype);
  return results;
}

// What only CUDA has: numbers on a device, gradients over the logits.
tests::Case on_cpu(tests::Case c) {
  c.coefficients_on_device = c.in_place = false;
  return c;
}

std::string problems_of(const tests::Case& given) {
  const tests::Case c = on_cpu(given);
  const tests::Inputs inputs = tests::make_inputs(c);
  const tests::Results results = run_cpu(c, inputs);
  if (c.out_of_range) return "";
  tests::Results other;
  std::thread([&] { other = run_cpu(c, inputs); }).join();
  // One thread adds up a row, in vectors of 4 to 16 lanes where a warp has 32 and more.
  std::string problems = tests::compare(c, tests::oracle(c, inputs), results, 4);
  problems += tests::differences("another thread's gradient", results.gradient, other.gradient, 0,
                                 std::vector<double>(results.gradient.size(), 0.0));
  return problems;
}

std::string problems_of(const tests::LinearCase& given) {
  tests::LinearCase c = given;
  c.loss = on_cpu(c.loss);
  // As the operators hand them over.
  if (c.loss.target == tests::Target::kProbabilities) {
    c.loss.target = tests::Target::kWideProbabilities;
  }
  const tests::LinearInputs inputs = tests::make_linear_inputs(c);
  const tests::LinearResults results = run_cpu(c, inputs);
  if (c.loss.out_of_range) return "";
  return tests::compare_linear(c, tests::linear_oracle(c, inputs), results);
}

int failed = 0, run = 0;

template <typename AnyCase>
void run_all(const std::vector<AnyCase>& cases) {
  for (const AnyCase& c : cases) {
    ++run;
    std::string problems;
    try {
      problems = problems_of(c);
    } catch (const std::exception& error) {
      problems = std::string(error.what()) + "\n";
    }
    if (!problems.empty() && ++failed <= 25) {
      std::printf("FAILED %s\n%s", c.name().c_str(), problems.c_str());
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::printf("usage: cpu_test default|avx2|avx512, as in ATEN_CPU_CAPABILITY\n");
    return 2;
  }
  if (!lnl::testing::supported(argv[1])) {
    std::printf("this processor has no %s\n", argv[1]);
    return lnl::testing::kSkipped;
  }
  run_all(tests::all_cases());
  run_all(tests::all_linear_cases());
  std::printf("%d cases, %d failures\n", run, failed);
  return failed > 0 || run == 0;
}
