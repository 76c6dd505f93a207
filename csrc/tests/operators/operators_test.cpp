// Calls the CPU operators through torch's dispatcher over shapes, layouts, dtypes and reductions:
// for the sanitizers, with a rough check of values and gradients. The exact ones are python_tests'.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdio>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "capability.h"

namespace {

using at::Tensor;
using Coefficient = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Forward = Results(const Tensor&, const Tensor&, const Coefficient&, const Coefficient&,
                        const Coefficient&, const Coefficient&, int64_t, double, int64_t, bool,
                        int64_t, bool, bool);

constexpr double kReversal = 0.5;
constexpr double kEntropyWeight = 0.25;
constexpr int64_t kSum = 2;

struct Case {
  std::vector<int64_t> shape;  // [N, heads * C, *S]
  int64_t heads;
  at::ScalarType dtype;
  bool channels_last;
  bool probabilities;
  int64_t reduction;
};

Results call(const Case& c, const Tensor& logits, const Tensor& target) {
  static const auto operation =
      c10::Dispatcher::singleton().findSchemaOrThrow("lnl_ext::bias_loss", "").typed<Forward>();
  return operation.call(logits, target, std::nullopt, at::scalar_tensor(kReversal),
                        at::scalar_tensor(kEntropyWeight), at::scalar_tensor(1.0), -100, 0.0,
                        c.reduction, false, c.heads, true, true);
}

// [N, K * C, *S] -> [N, K, *S, C], in float64.
Tensor by_class(const Tensor& logits, int64_t heads) {
  return logits.to(at::kDouble).unflatten(1, {heads, -1}).movedim(2, -1);
}

// The largest error of the sums, and of the gradient to the features, relative to their size.
double error(const Case& c, const Tensor& logits, const Tensor& target, const Results& results) {
  const Tensor z = by_class(logits, c.heads);
  const Tensor log_p = at::log_softmax(z, -1);
  const Tensor p = log_p.exp();
  const Tensor q = c.probabilities
                       ? by_class(target, c.heads)
                       : at::one_hot(target.reshape(z.sizes().slice(0, z.dim() - 1)), z.size(-1));
  const Tensor entropy = -(p * log_p).sum(-1, true);
  const Tensor cross_entropy = -(q * log_p).sum();
  Tensor gradient = -kReversal * (p * q.sum(-1, true) - q) +
                    kEntropyWeight * p * (log_p + entropy) + (p - 1.0 / z.size(-1));
  const Tensor got = by_class(std::get<4>(results), c.heads);
  const double scale = gradient.numel() > 0 ? gradient.abs().max().item<double>() + 1.0 : 1.0;
  double worst = (std::get<1>(results) - cross_entropy).abs().item<double>() / (1.0 + z.numel()) +
                 (std::get<2>(results) - entropy.sum()).abs().item<double>() / (1.0 + z.numel());
  if (gradient.numel() > 0) {
    worst += (got - gradient).abs().max().item<double>() / scale;
  }
  return worst;
}

double tolerance(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 1e-12;
    case at::kFloat:
      return 1e-5;
    default:
      return 1e-2;  // one rounding to bfloat16 is 2^-9
  }
}

std::string describe(const Case& c) {
  std::string text = "shape";
  for (const int64_t size : c.shape) {
    text += " " + std::to_string(size);
  }
  return text + ", heads " + std::to_string(c.heads) + ", " + c10::toString(c.dtype) +
         (c.channels_last ? ", channels_last" : "") + (c.probabilities ? ", probabilities" : "") +
         ", reduction " + std::to_string(c.reduction);
}

bool check(const Case& c) {
  Tensor logits = 3 * at::randn(c.shape, at::kDouble).to(c.dtype);
  if (c.channels_last) {
    logits = logits.movedim(1, -1).contiguous().movedim(-1, 1);
  }
  const int64_t classes = c.shape[1] / c.heads;
  std::vector<int64_t> sites = c.shape;
  sites[1] = c.heads;
  if (c.heads == 1) {
    sites.erase(sites.begin() + 1);
  }
  const Tensor target =
      c.probabilities
          ? at::softmax(at::randn(c.shape, at::kDouble).unflatten(1, {c.heads, classes}), 2)
                .flatten(1, 2)
                .to(c.dtype)
          : at::randint(classes, sites, at::kLong);
  const Results results = call(c, logits, target);

  // Calls from several threads at once find the same, bit for bit.
  std::vector<Results> concurrent(2);
  std::vector<std::thread> threads;
  for (Results& result : concurrent) {
    threads.emplace_back([&] { result = call(c, logits, target); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const Results& result : concurrent) {
    if (!at::equal(std::get<4>(result), std::get<4>(results)) ||
        !at::equal(std::get<5>(result), std::get<5>(results))) {
      std::printf("FAILED: calls from several threads differ: %s\n", describe(c).c_str());
      return false;
    }
  }
  if (c.reduction != kSum) {
    return true;  // scaled by site counts or left apart: what the memory accesses are, not values
  }
  const double found = error(c, logits, target, results);
  if (!(found <= tolerance(c.dtype))) {
    std::printf("FAILED: error %.3g: %s\n", found, describe(c).c_str());
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::printf("usage: operators_test default|avx2|avx512, as in ATEN_CPU_CAPABILITY\n");
    return 2;
  }
  if (!lnl::testing::supported(argv[1])) {
    std::printf("this processor has no %s\n", argv[1]);
    return lnl::testing::kSkipped;
  }
  at::manual_seed(0);
  const std::vector<std::pair<std::vector<int64_t>, int64_t>> shapes = {
      {{5, 1}, 1},         {{37, 2}, 1},       {{129, 12}, 1},       {{9, 65}, 1},
      {{3, 1000}, 1},      {{2, 4099}, 1},     {{0, 7}, 1},          {{11, 15}, 5},
      {{3, 8, 14, 14}, 1}, {{2, 24, 7, 5}, 3}, {{1, 3, 129}, 1},     {{2, 70, 33}, 1},
      {{2, 5, 0}, 1},      {{1, 6, 1, 1}, 2},  {{2, 8, 4, 16, 4}, 1}};
  int failures = 0;
  int cases = 0;
  for (const auto& [shape, heads] : shapes) {
    for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16}) {
      for (const bool channels_last : {false, true}) {
        for (const bool probabilities : {false, true}) {
          for (const int64_t reduction : {int64_t{0}, int64_t{1}, kSum}) {
            ++cases;
            failures += !check({shape, heads, dtype, channels_last, probabilities, reduction});
          }
        }
      }
    }
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
