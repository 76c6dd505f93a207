// large_test for the linear head: more than 2^31 elements of features on chip, hardly touched, and
// of each launch only the last blocks, whose rows lie beyond what 32 bits can count.
#include <cstdio>
#include <string>

#include "../cuda/linear_bias_loss_launch.h"
#include "../emulator/emulator.h"
#include "../emulator/include/cuda_bf16.h"
#include "linear_case.h"
#include "reserved.h"

namespace {

using namespace lnl;
using tests::Reserved;

__nv_bfloat16 narrow(double value) { return __float2bfloat16_rn(static_cast<float>(value)); }

// The last `tail` rows carry numbers, the others zeros; all of them are in the last tile.
int check(std::int64_t rows, std::int64_t heads, std::int64_t classes, std::int64_t width,
          std::int64_t tail) {
  tests::LinearCase c;
  c.loss.dtype = DType::kBFloat16;
  c.loss.reduction = Reduction::kSum;
  c.loss.entropy_weight = 0.3;
  c.loss.reversal = 0.5;
  c.loss.rows = tail;
  c.loss.heads = heads;
  c.loss.classes = classes;
  c.width = width;
  const tests::LinearInputs inputs = tests::make_linear_inputs(c);
  const tests::LinearResults wanted = tests::linear_oracle(c, inputs);

  const std::int64_t columns = c.columns(), first = rows - tail;
  const Reserved features(rows * width * 2), gradient(rows * width * 2), labels(rows * heads * 8);
  const Reserved weight(columns * width * 2), bias(columns * 2);
  const Reserved weight_gradient(columns * width * 2), bias_gradient(columns * 2);
  for (std::int64_t i = 0; i < tail * width; ++i) {
    features.as<__nv_bfloat16>()[first * width + i] = narrow(inputs.features[i]);
  }
  for (std::int64_t i = 0; i < tail * heads; ++i) {
    labels.as<std::int64_t>()[first * heads + i] = inputs.loss.labels[i];
  }
  for (std::int64_t i = 0; i < columns * width; ++i) {
    weight.as<__nv_bfloat16>()[i] = narrow(inputs.weight[i]);
  }
  for (std::int64_t i = 0; i < columns; ++i) bias.as<__nv_bfloat16>()[i] = narrow(inputs.bias[i]);

  LinearBiasLossCall call;
  call.loss.dtype = c.loss.dtype;
  call.loss.rows = rows;
  call.loss.heads = heads;
  call.loss.classes = classes;
  call.loss.labels = labels.as<std::int64_t>();
  call.loss.entropy_weight = Coefficient::of(c.loss.entropy_weight);
  call.loss.reversal = Coefficient::of(c.loss.reversal);
  call.loss.reduction = c.loss.reduction;
  float values[3];
  call.loss.loss = &values[0];
  call.loss.cross_entropy = &values[1];
  call.loss.entropy = &values[2];
  call.width = width;
  call.features = features.as<void>();
  call.head_weight = weight.as<void>();
  call.head_bias = bias.as<void>();
  call.features_gradient = gradient.as<void>();
  call.weight_gradient = weight_gradient.as<void>();
  call.bias_gradient = bias_gradient.as<void>();
  const cuda::Device device{1 << 26, 227 * 1024};  // so many that no block takes a second turn
  const cuda::LinearLaunchFacts facts = cuda::linear_launch_facts(call, device);
  if (!facts.on_chip) {
    std::printf("FAILED: does not fit on chip\n");
    return 1;
  }
  const Reserved workspace(facts.workspace);
  // The last blocks of the sum over all tiles have 32 elements each: weights, then biases.
  constexpr std::int64_t kLast = 3;
  emulator::settings().only = [](emulator::Dim3 block, emulator::Dim3 grid) {
    return block.x + (grid.x < 4096 ? kLast : 1) >= grid.x;
  };
  const int error = cuda::launch_linear_bias_loss(call, device, workspace.as<void>(), nullptr);
  emulator::settings().only = nullptr;

  tests::LinearResults got = wanted;
  got.loss.loss = {values[0]};
  got.loss.cross_entropy = {values[1]};
  got.loss.entropy = {values[2]};
  for (std::int64_t i = 0; i < tail * width; ++i) {
    got.features_gradient[i] = __bfloat162float(gradient.as<__nv_bfloat16>()[first * width + i]);
  }
  const std::int64_t all = columns * (width + 1);
  for (std::int64_t i = ((all + 31) / 32 - kLast) * 32; i < columns * width; ++i) {
    got.weight_gradient[i] = __bfloat162float(weight_gradient.as<__nv_bfloat16>()[i]);
  }
  for (std::int64_t i = 0; i < columns; ++i) {
    got.bias_gradient[i] = __bfloat162float(bias_gradient.as<__nv_bfloat16>()[i]);
  }
  std::string problems = tests::compare_linear(c, wanted, got);
  if (error != 0) problems += "error " + std::to_string(error) + "\n";
  std::printf("%s %lld x %lld features, %u blocks\n%s", problems.empty() ? "ok" : "FAILED",
              static_cast<long long>(rows), static_cast<long long>(width), facts.blocks,
              problems.c_str());
  return !problems.empty();
}

}  // namespace

int main() {
  constexpr std::int64_t one = 1;
  int failures = check((one << 22) + 3, 1, 12, 520, 3);
  failures += check((one << 30) + 2, 4, 2, 8, 2);  // also the labels do not fit 32 bits
  return failures > 0;
}
