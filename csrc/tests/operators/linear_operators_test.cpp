// Calls the CPU operators of a linear head through torch's dispatcher over shapes, dtypes, targets
// and reductions: for the sanitizers, with a rough check of values and gradients. The exact ones
// are python_tests'.
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
using Optional = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;
using Forward = Results(const Tensor&, const Tensor&, const Optional&, const Tensor&,
                        const Optional&, const Optional&, const Optional&, const Optional&, int64_t,
                        double, int64_t, bool, int64_t, bool, bool);
using Backward = Gradients(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                           const Tensor&, const Optional&, const Tensor&, const Optional&,
                           const Optional&, const Optional&, int64_t, double, int64_t, bool,
                           int64_t, bool, bool);

constexpr double kReversal = 0.5;
constexpr double kEntropyWeight = 0.25;
constexpr int64_t kNone = 0;
constexpr int64_t kSum = 2;

struct Case {
  int64_t rows, width, classes, heads;
  at::ScalarType dtype;
  bool bias;
  bool probabilities;
  bool reversed;
  int64_t reduction;
};

struct Inputs {
  Tensor features, head_weight, target;
  Optional head_bias;
};

Optional coefficient(bool present, double value) {
  return present ? Optional(at::scalar_tensor(value)) : std::nullopt;
}

Results call(const Case& c, const Inputs& in) {
  static const auto operation = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("lnl_ext::linear_bias_loss", "")
                                    .typed<Forward>();
  return operation.call(in.features, in.head_weight, in.head_bias, in.target, std::nullopt,
                        coefficient(c.reversed, kReversal), at::scalar_tensor(kEntropyWeight),
                        coefficient(c.reversed, 1.0), -100, 0.0, c.reduction, false, c.heads, true,
                        true);
}

Gradients call_backward(const Case& c, const Inputs& in, const Results& results) {
  static const auto operation = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("lnl_ext::linear_bias_loss_backward", "")
                                    .typed<Backward>();
  return operation.call(at::ones_like(std::get<0>(results)), in.features, in.head_weight,
                        in.head_bias, in.target, std::nullopt, std::get<3>(results),
                        coefficient(c.reversed, kReversal), at::scalar_tensor(kEntropyWeight),
                        coefficient(c.reversed, 1.0), -100, 0.0, c.reduction, false, c.heads, true,
                        true);
}

double difference(const Tensor& got, const Tensor& expected) {
  if (expected.numel() == 0) {
    return 0.0;
  }
  return (got.to(at::kDouble) - expected).abs().max().item<double>() /
         (1.0 + expected.abs().max().item<double>());
}

// The largest error of the sums and of all gradients, relative to their size.
double error(const Case& c, const Inputs& in, const Results& results) {
  const Tensor x = in.features.to(at::kDouble), w = in.head_weight.to(at::kDouble);
  Tensor logits = x.matmul(w.t());
  if (in.head_bias.has_value()) {
    logits = logits + in.head_bias->to(at::kDouble);
  }
  const Tensor log_p = at::log_softmax(logits.unflatten(1, {c.heads, c.classes}), -1);
  const Tensor p = log_p.exp();
  const Tensor q = c.probabilities ? in.target.to(at::kDouble).unflatten(1, {c.heads, c.classes})
                                   : at::one_hot(in.target.reshape({c.rows, c.heads}), c.classes);
  const Tensor entropy = -(p * log_p).sum(-1, true);
  const Tensor of_cross_entropy = p * q.sum(-1, true) - q;
  const Tensor of_entropy = kEntropyWeight * p * (log_p + entropy);
  const Tensor for_features =
      (c.reversed ? -kReversal * of_cross_entropy + of_entropy + (p - 1.0 / c.classes)
                  : of_cross_entropy + of_entropy)
          .flatten(1);
  const Tensor for_head = c.reversed ? of_cross_entropy.flatten(1) : for_features;
  const double scale = 1.0 + static_cast<double>(p.numel());
  double worst = (std::get<1>(results) + (q * log_p).sum()).abs().item<double>() / scale +
                 (std::get<2>(results) - entropy.sum()).abs().item<double>() / scale +
                 difference(std::get<4>(results), for_features.matmul(w)) +
                 difference(std::get<5>(results), for_head.t().matmul(x));
  if (in.head_bias.has_value()) {
    worst += difference(std::get<6>(results), for_head.sum(0));
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
      return 2e-2;  // one rounding to bfloat16 of each of three gradients is 2^-9
  }
}

std::string describe(const Case& c) {
  return std::to_string(c.rows) + " rows, width " + std::to_string(c.width) + ", classes " +
         std::to_string(c.classes) + ", heads " + std::to_string(c.heads) + ", " +
         c10::toString(c.dtype) + (c.bias ? ", bias" : "") +
         (c.probabilities ? ", probabilities" : "") + (c.reversed ? ", reversed" : "") +
         ", reduction " + std::to_string(c.reduction);
}

bool same(const Results& a, const Results& b) {
  return at::equal(std::get<4>(a), std::get<4>(b)) && at::equal(std::get<5>(a), std::get<5>(b)) &&
         at::equal(std::get<6>(a), std::get<6>(b));
}

bool check(const Case& c) {
  const int64_t outputs = c.heads * c.classes;
  Inputs in;
  in.features = at::randn({c.rows, c.width}, at::kDouble).to(c.dtype);
  in.head_weight = at::randn({outputs, c.width}, at::kDouble).to(c.dtype);
  if (c.bias) {
    in.head_bias = at::randn({outputs}, at::kDouble).to(c.dtype);
  }
  in.target = c.probabilities ? at::softmax(at::randn({c.rows, c.heads, c.classes}, at::kDouble), 2)
                                    .flatten(1)
                                    .to(c.dtype)
                              : at::randint(c.classes,
                                            c.heads == 1 ? at::IntArrayRef({c.rows})
                                                         : at::IntArrayRef({c.rows, c.heads}),
                                            at::kLong);
  const Results results = call(c, in);

  // Calls from several threads at once find the same, bit for bit.
  std::vector<Results> concurrent(2);
  std::vector<std::thread> threads;
  for (Results& result : concurrent) {
    threads.emplace_back([&] { result = call(c, in); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const Results& result : concurrent) {
    if (!same(result, results)) {
      std::printf("FAILED: calls from several threads differ: %s\n", describe(c).c_str());
      return false;
    }
  }
  const auto [for_features, for_weight, for_bias] = call_backward(c, in, results);
  // Without a reduction the forward's gradients are those of the sum, as the backward's of ones.
  const double between = difference(for_features, std::get<4>(results).to(at::kDouble)) +
                         difference(for_weight, std::get<5>(results).to(at::kDouble)) +
                         difference(for_bias, std::get<6>(results).to(at::kDouble));
  const double found = c.reduction == kSum ? error(c, in, results) : 0.0;
  if (!(between <= tolerance(c.dtype)) || !(found <= tolerance(c.dtype))) {
    std::printf("FAILED: error %.3g, backward %.3g: %s\n", found, between, describe(c).c_str());
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::printf("usage: linear_operators_test default|avx2|avx512, as in ATEN_CPU_CAPABILITY\n");
    return 2;
  }
  if (!lnl::testing::supported(argv[1])) {
    std::printf("this processor has no %s\n", argv[1]);
    return lnl::testing::kSkipped;
  }
  at::manual_seed(0);
  struct Shape {
    int64_t rows, width, classes, heads;
  };
  // Widths beside the multiple that the kernels pad to, rows beside their blocks, several parts of
  // a weight's gradient, and from 65 outputs on torch's own products.
  const std::vector<Shape> shapes = {
      {5, 1, 2, 1},  {37, 17, 3, 1}, {129, 32, 12, 1}, {65, 513, 5, 1}, {9, 40, 64, 1},
      {11, 7, 5, 3}, {700, 9, 2, 4}, {6, 30, 65, 1},   {3, 1100, 3, 1}, {13, 12, 300, 2},
      {0, 6, 3, 1},  {4, 0, 3, 1},   {1, 16, 1, 1},    {2, 5, 4099, 1}, {2100, 3, 12, 1}};
  int failures = 0;
  int cases = 0;
  for (const Shape& s : shapes) {
    for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16}) {
      for (const bool bias : {false, true}) {
        for (const bool probabilities : {false, true}) {
          for (const bool reversed : {false, true}) {
            for (const int64_t reduction : {kNone, int64_t{1}, kSum}) {
              ++cases;
              failures += !check({s.rows, s.width, s.classes, s.heads, dtype, bias, probabilities,
                                  reversed, reduction});
            }
          }
        }
      }
    }
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
