#include <cmath>
#include <sstream>

#include "device_inputs.h"

namespace lnl::tests {

namespace {

// Relative error of one value: sums of float32 terms, and exp without its last two corrections for
// 16-bit logits.
double value_tolerance(DType dtype) {
  return dtype == DType::kFloat64 ? 1e-13 : dtype == DType::kFloat32 ? 1e-6 : 4e-6;
}

// Relative error of one gradient: the above and one rounding to the dtype.
double gradient_tolerance(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 1e-12;
    case DType::kFloat32:
      return 4e-6;
    case DType::kFloat16:
      return 6e-4;
    case DType::kBFloat16:
      return 4.5e-3;
  }
  return 0;
}

void compare_numbers(std::ostringstream& out, const char* what, const std::vector<double>& wanted,
                     const std::vector<double>& got, double relative, double absolute) {
  out << differences(what, wanted, got, relative, std::vector<double>(wanted.size(), absolute));
}

}  // namespace

std::string differences(const char* what, const std::vector<double>& wanted,
                        const std::vector<double>& got, double relative,
                        const std::vector<double>& absolute) {
  std::ostringstream out;
  if (wanted.size() != got.size()) {
    out << what << ": " << got.size() << " numbers instead of " << wanted.size() << '\n';
    return out.str();
  }
  std::size_t wrong = 0, first = 0;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const bool same = (std::isnan(wanted[i]) && std::isnan(got[i])) || wanted[i] == got[i] ||
                      std::abs(wanted[i] - got[i]) <= relative * std::abs(wanted[i]) + absolute[i];
    if (!same && wrong++ == 0) first = i;
  }
  if (wrong > 0) {
    out << what << '[' << first << "]: " << got[first] << " instead of " << wanted[first] << ", "
        << wrong << " of " << wanted.size() << " wrong\n";
  }
  return out.str();
}

double largest(const std::vector<double>& values) {
  double result = 0;
  for (const double value : values) {
    if (std::isfinite(value)) result = std::fmax(result, std::abs(value));
  }
  return result;
}

double rounded(DType dtype, double value) {
  unsigned char bytes[8];
  encode(dtype, value, bytes);
  return decode(dtype, bytes);
}

std::string compare(const Case& c, const Results& wanted, const Results& got, double roundings) {
  std::ostringstream out;
  const double value = roundings * value_tolerance(c.dtype);
  // H - weight * CE and the like cancel: the terms bound the error of their difference.
  const double scale = largest(wanted.cross_entropy) + largest(wanted.entropy);
  compare_numbers(out, "loss", wanted.loss, got.loss, value, value * scale);
  compare_numbers(out, "cross_entropy", wanted.cross_entropy, got.cross_entropy, value, 1e-37);
  compare_numbers(out, "entropy", wanted.entropy, got.entropy, value, 1e-37);
  if (c.reduction == Reduction::kMean) {
    compare_numbers(out, "denominators", wanted.denominators, got.denominators, value, 0);
  }
  // dCE and dH cancel within one gradient, and p * sum(y) and y where every class has a target;
  // what float16 cannot hold is rounded to its multiples of 2^-24.
  const double relative = gradient_tolerance(c.dtype);
  const double smallest = c.dtype == DType::kFloat16 ? 3.1e-8 : 1e-37;
  const bool dense = c.target != Target::kLabels || c.smoothing > 0 || c.confusion_weight >= 0;
  const double absolute = smallest + (dense ? value * wanted.largest_term : 0);
  compare_numbers(out, "gradient", wanted.gradient, got.gradient, relative,
                  0.3 * value * largest(wanted.gradient) + absolute);
  compare_numbers(out, "head_gradient", wanted.head_gradient, got.head_gradient, relative,
                  absolute);
  return out.str();
}

}  // namespace lnl::tests
