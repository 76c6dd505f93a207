// Inputs of the linear head's cases and its definition: the products in extended precision around
// the oracle of the loss.
#include <cmath>
#include <limits>
#include <random>
#include <sstream>

#include "linear_case.h"

namespace lnl::tests {

namespace {

using Real = long double;

// Rounding errors of sums of float32 products, relative to the sums of their magnitudes.
double product_tolerance(DType dtype) { return dtype == DType::kFloat64 ? 1e-12 : 5e-6; }

double rounding(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 1e-12;
    case DType::kFloat32:
      return 5e-6;
    case DType::kFloat16:
      return 1e-3;
    case DType::kBFloat16:
      return 8e-3;
  }
  return 0;
}

}  // namespace

std::string LinearCase::name() const {
  std::ostringstream out;
  out << loss.name() << " D" << width;
  if (bias) out << " bias";
  if (unaligned) out << " unaligned";
  if (chunk > 0) out << " chunk=" << chunk;
  if (not_a_number) out << " nan";
  return out.str();
}

LinearInputs make_linear_inputs(const LinearCase& c) {
  LinearInputs inputs;
  inputs.loss = make_inputs(c.loss);
  std::mt19937_64 random(c.loss.seed + 1000);
  std::normal_distribution<double> normal;
  const DType dtype = c.loss.dtype;
  const double scale = 1.5 / std::sqrt(static_cast<double>(c.width));
  for (std::int64_t i = 0; i < c.loss.rows * c.width; ++i) {
    inputs.features.push_back(rounded(dtype, normal(random)));
  }
  for (std::int64_t i = 0; i < c.columns() * c.width; ++i) {
    inputs.weight.push_back(rounded(dtype, scale * normal(random)));
  }
  for (std::int64_t m = 0; m < c.columns() && c.bias; ++m) {
    inputs.bias.push_back(rounded(dtype, normal(random)));
  }
  if (c.not_a_number) inputs.features[c.width / 2] = std::numeric_limits<double>::quiet_NaN();
  for (std::int64_t row = 0; row < c.loss.rows; ++row) {
    for (std::int64_t m = 0; m < c.columns(); ++m) {
      Real sum = c.bias ? inputs.bias[m] : 0;
      for (std::int64_t d = 0; d < c.width; ++d) {
        sum +=
            static_cast<Real>(inputs.features[row * c.width + d]) * inputs.weight[m * c.width + d];
      }
      inputs.loss.logits[row * c.columns() + m] = static_cast<double>(sum);
    }
  }
  return inputs;
}

LinearResults linear_oracle(const LinearCase& c, const LinearInputs& inputs) {
  Case loss = c.loss;
  const bool reversed = loss.reversal >= 0;
  loss.gradient = c.loss.gradient || !reversed;
  LinearResults results;
  results.loss = oracle(loss, inputs.loss);
  const std::vector<double> to_features = results.loss.gradient;
  const std::vector<double> to_head = reversed ? results.loss.head_gradient : to_features;
  results.loss.gradient.clear();
  results.loss.head_gradient.clear();
  const std::int64_t rows = c.loss.rows, columns = c.columns(), width = c.width;
  // Every element of a row of the logits' gradient is as inexact as the largest one is, or as the
  // terms that cancel in it.
  const bool dense =
      loss.target != Target::kLabels || loss.smoothing > 0 || loss.confusion_weight >= 0;
  const auto largest_of_row = [&](const std::vector<double>& gradient, std::int64_t row) {
    const auto first = gradient.begin() + row * columns;
    const double top = largest(std::vector<double>(first, first + columns));
    return static_cast<Real>(dense ? std::fmax(top, results.loss.largest_term) : top);
  };
  if (c.loss.gradient) {
    for (std::int64_t row = 0; row < rows; ++row) {
      const Real top = largest_of_row(to_features, row);
      for (std::int64_t d = 0; d < width; ++d) {
        Real sum = 0, terms = 0;
        for (std::int64_t m = 0; m < columns; ++m) {
          const Real weight = inputs.weight[m * width + d];
          sum += to_features[row * columns + m] * weight;
          terms += top * std::fabs(weight);
        }
        results.features_gradient.push_back(static_cast<double>(sum));
        results.features_terms.push_back(static_cast<double>(terms));
      }
    }
  }
  if (c.loss.head_gradient) {
    std::vector<Real> tops;
    for (std::int64_t row = 0; row < rows; ++row) tops.push_back(largest_of_row(to_head, row));
    for (std::int64_t m = 0; m < columns; ++m) {
      Real bias = 0, bias_terms = 0;
      for (std::int64_t row = 0; row < rows; ++row) {
        bias += to_head[row * columns + m];
        bias_terms += tops[row];
      }
      if (c.bias) {
        results.bias_gradient.push_back(static_cast<double>(bias));
        results.bias_terms.push_back(static_cast<double>(bias_terms));
      }
      for (std::int64_t d = 0; d < width; ++d) {
        Real sum = 0, terms = 0;
        for (std::int64_t row = 0; row < rows; ++row) {
          const Real feature = inputs.features[row * width + d];
          sum += to_head[row * columns + m] * feature;
          terms += std::isnan(feature) ? 0 : tops[row] * std::fabs(feature);
        }
        results.weight_gradient.push_back(static_cast<double>(sum));
        results.weight_terms.push_back(static_cast<double>(terms));
      }
    }
  }
  return results;
}

std::string compare_linear(const LinearCase& c, const LinearResults& wanted,
                           const LinearResults& got) {
  std::string out;
  const double products = product_tolerance(c.loss.dtype);
  const double relative = rounding(c.loss.dtype);
  const double smallest = c.loss.dtype == DType::kFloat16 ? 3.1e-8 : 1e-37;
  const auto check = [&](const char* what, const std::vector<double>& a,
                         const std::vector<double>& b, double factor, double scale) {
    out += differences(what, a, b, factor, std::vector<double>(a.size(), factor * scale));
  };
  // The logits' rounding errors are those of numbers of about 1 to 10.
  const double scale = 1 + largest(wanted.loss.cross_entropy) + largest(wanted.loss.entropy);
  check("loss", wanted.loss.loss, got.loss.loss, products, scale);
  check("cross_entropy", wanted.loss.cross_entropy, got.loss.cross_entropy, products, scale);
  check("entropy", wanted.loss.entropy, got.loss.entropy, products, scale);
  if (c.loss.reduction == Reduction::kMean) {
    check("denominators", wanted.loss.denominators, got.loss.denominators, 1e-6, 0);
  }
  const auto check_gradient = [&](const char* what, const std::vector<double>& a,
                                  const std::vector<double>& b, std::vector<double> terms) {
    for (double& term : terms) term = products * term + smallest;
    out += differences(what, a, b, relative, terms);
  };
  check_gradient("features_gradient", wanted.features_gradient, got.features_gradient,
                 wanted.features_terms);
  check_gradient("weight_gradient", wanted.weight_gradient, got.weight_gradient,
                 wanted.weight_terms);
  check_gradient("bias_gradient", wanted.bias_gradient, got.bias_gradient, wanted.bias_terms);
  return out;
}

}  // namespace lnl::tests
