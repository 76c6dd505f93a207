// large_test [float32]: tensors of more than 2^31 elements, in reserved but hardly touched memory,
// and of each launch only the last block, whose sites lie beyond what 32 bits can count. All of
// bfloat16 and those of float32, or those alone.
#include <cstdio>
#include <cstring>
#include <string>

#include "../emulator/emulator.h"
#include "bias_loss_case.h"
#include "device_inputs.h"
#include "reserved.h"

namespace {

using namespace lnl;
using tests::Reserved;

int failures = 0;

// The last `tail` rows (one position) or positions of the last row carry numbers, the others zeros.
// With little shared memory the logits of many classes are read twice.
void check(DType dtype, const char* kernel, std::int64_t rows, std::int64_t classes,
           std::int64_t positions, std::int64_t tail, int shared_memory = 227 * 1024,
           bool bulk_copies = false) {
  tests::Case small;
  small.dtype = dtype;
  small.reduction = Reduction::kSum;
  small.entropy_weight = 0.3;
  small.classes = classes;
  (positions == 1 ? small.rows : small.positions) = tail;
  const tests::Inputs inputs = tests::make_inputs(small);
  const tests::Results wanted = tests::oracle(small, inputs);

  const std::int64_t elements = rows * classes * positions;
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  const Reserved logits(elements * size), gradient(elements * size), head_gradient(elements * size);
  const Reserved labels(rows * positions * 8);
  const std::int64_t first = rows * positions - tail;
  const auto place = [&](std::int64_t site, std::int64_t c) {
    return positions == 1 ? (first + site) * classes + c
                          : ((rows - 1) * classes + c) * positions + positions - tail + site;
  };
  for (std::int64_t site = 0; site < tail; ++site) {
    labels.as<std::int64_t>()[first + site] = inputs.labels[site];
    for (std::int64_t c = 0; c < classes; ++c) {
      const std::int64_t from = positions == 1 ? site * classes + c : c * tail + site;
      tests::encode(dtype, inputs.logits[from], logits.as<unsigned char>() + place(site, c) * size);
    }
  }
  BiasLossCall call;
  call.dtype = small.dtype;
  call.rows = rows;
  call.classes = classes;
  call.positions = positions;
  call.logits = logits.as<void>();
  call.labels = labels.as<std::int64_t>();
  call.entropy_weight = Coefficient::of(small.entropy_weight);
  call.reduction = small.reduction;
  call.gradient = gradient.as<void>();
  call.head_gradient = head_gradient.as<void>();
  float values[3];
  call.loss = &values[0];
  call.cross_entropy = &values[1];
  call.entropy = &values[2];
  const cuda::Device device{1 << 26, shared_memory};  // so many that no block takes a second turn
  const cuda::LaunchFacts facts = cuda::launch_facts(call, device);
  const Reserved workspace(facts.workspace);
  emulator::settings().bulk_copies = bulk_copies;
  emulator::settings().only = [](emulator::Dim3 block, emulator::Dim3 grid) {
    return block.x + 1 == grid.x;
  };
  const int error = cuda::launch_bias_loss(call, device, workspace.as<void>(), nullptr);
  emulator::settings().only = nullptr;
  tests::Results got = wanted;
  for (std::int64_t site = 0; site < tail; ++site) {
    for (std::int64_t c = 0; c < classes; ++c) {
      const std::int64_t to = positions == 1 ? site * classes + c : c * tail + site;
      const std::int64_t from = place(site, c) * size;
      got.gradient[to] = tests::decode(dtype, gradient.as<unsigned char>() + from);
      got.head_gradient[to] = tests::decode(dtype, head_gradient.as<unsigned char>() + from);
    }
  }
  std::string problems = tests::compare(small, wanted, got);
  if (error != 0) problems += "error " + std::to_string(error) + "\n";
  if (std::strcmp(facts.kernel, kernel) != 0) {
    problems += std::string("launched ") + facts.kernel + "\n";
  }
  if (!problems.empty()) ++failures;
  std::printf("%s %s of %lld elements, %u blocks\n%s", problems.empty() ? "ok" : "FAILED", kernel,
              static_cast<long long>(elements), facts.blocks, problems.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  constexpr std::int64_t one = 1;
  constexpr auto narrow = DType::kBFloat16, wide = DType::kFloat32;
  // One site's classes are more than 2^31 elements apart.
  check(wide, "sites_large", 2, 96, one << 25, 4);
  check(wide, "sites_large", 2, 96, one << 25, 4, 8 * 1024);
  if (argc > 1 && std::strcmp(argv[1], "float32") == 0) return failures > 0;
  check(narrow, "rows_small", (one << 28) + 3, 8, 1, 3);
  check(narrow, "rows_medium", (one << 25) + 1, 64, 1, 1);
  check(narrow, "rows_large", (one << 20) + 1, 2048, 1, 1);
  check(narrow, "rows_large", (one << 20) + 1, 2048, 1, 1, 4 * 1024);
  check(narrow, "rows_large", (one << 20) + 1, 2048, 1, 1, 227 * 1024, true);
  check(narrow, "sites_small", 3, 8, one << 27, 8);
  check(narrow, "sites_large", 2, 96, one << 25, 8);
  check(narrow, "sites_large", 2, 96, one << 25, 8, 8 * 1024);
  check(narrow, "sites_small", 2, 2, (one << 30) + 64, 8);  // also the sites do not fit 32 bits
  return failures > 0;
}
