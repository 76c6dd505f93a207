// The definition, site by site. In extended precision, and with the forms of log
// and exp that stay exact near 1, so that it is right for certain sites too.
#include <cmath>
#include <limits>

#include "bias_loss_case.h"

namespace lnl::tests {

namespace {

using Real = long double;
constexpr Real kNaN = std::numeric_limits<Real>::quiet_NaN();

struct HeadSums {
  Real cross_entropy = 0, entropy = 0, confusion = 0;
};

// One site's probabilities, targets and values.
struct Site {
  std::vector<Real> log_p, p, y;
  Real weight = 0;  // sum of y
  Real cross_entropy = 0, entropy = 0, confusion = 0;
  bool counted = true;
};

Site solve(const Case& c, const Inputs& inputs, std::int64_t row, std::int64_t head,
           std::int64_t position) {
  Site site;
  const auto count = static_cast<std::size_t>(c.classes);
  const std::int64_t target = (row * c.heads + head) * c.positions + position;
  std::int64_t label = -1;
  if (c.target == Target::kLabels) {
    label = inputs.labels[target];
    site.counted = label != kIgnoreIndex;
  }
  const bool bad = site.counted && c.target == Target::kLabels && (label < 0 || label >= c.classes);
  Real top = -std::numeric_limits<Real>::infinity();
  bool left_out = false;
  std::vector<Real> z(count);
  for (std::size_t i = 0; i < count; ++i) {
    z[i] = inputs.logits[c.element(row, head, static_cast<std::int64_t>(i), position)];
    top = std::fmax(top, z[i]);
  }
  Real others = top - top;  // NaN for a row of only -inf and for +inf, as log_softmax has it
  for (std::size_t i = 0; i < count; ++i) {
    if (z[i] == top && !left_out) {
      left_out = true;
    } else {
      others += std::exp(z[i] - top);
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    const Real log_p = z[i] - top - std::log1p(others);
    const Real p = std::exp(log_p);
    Real q = static_cast<std::int64_t>(i) == label ? 1 : 0;
    if (c.target != Target::kLabels) {
      q = inputs.probabilities[c.element(row, head, static_cast<std::int64_t>(i), position)];
    }
    Real y = (1 - static_cast<Real>(c.smoothing)) * q + static_cast<Real>(c.smoothing) / c.classes;
    if (c.weighted) y *= inputs.weight[i];
    site.log_p.push_back(log_p);
    site.p.push_back(p);
    site.y.push_back(y);
    site.weight += y;
    const bool absent = c.target == Target::kLabels && c.smoothing == 0 && y == 0 && !std::isnan(p);
    site.cross_entropy -= absent ? 0 : y * log_p;
    site.entropy -= p == 0 ? 0 : p * log_p;
    site.confusion -= log_p / c.classes;
  }
  if (bad) site.weight = site.cross_entropy = kNaN;
  return site;
}

}  // namespace

Results oracle(const Case& c, const Inputs& inputs) {
  Results results;
  const bool none = c.reduction == Reduction::kNone;
  const bool mean = c.reduction == Reduction::kMean;
  const std::size_t outputs = none ? c.sites() : 1;
  std::vector<Real> loss(outputs), cross_entropy(outputs), entropy(outputs);
  if (c.gradient) results.gradient.resize(c.elements());
  if (c.head_gradient) results.head_gradient.resize(c.elements());
  const Real lambda = c.entropy_weight < 0 ? 0 : static_cast<Real>(c.entropy_weight);
  const Real kappa = c.confusion_weight < 0 ? 0 : static_cast<Real>(c.confusion_weight);
  const Real direction = c.reversal < 0 ? 1 : -static_cast<Real>(c.reversal);

  for (std::int64_t head = 0; head < c.heads; ++head) {
    Real weights = 0, counted = 0;
    HeadSums sums;
    std::vector<Site> sites;
    for (std::int64_t row = 0; row < c.rows; ++row) {
      for (std::int64_t position = 0; position < c.positions; ++position) {
        Site site = solve(c, inputs, row, head, position);
        const std::int64_t label =
            c.target == Target::kLabels
                ? inputs.labels[(row * c.heads + head) * c.positions + position]
                : 0;
        if (c.target != Target::kLabels) {
          weights += 1;
        } else if (site.counted) {
          const bool known = label >= 0 && label < c.classes;
          weights += c.weighted && known ? static_cast<Real>(inputs.weight[label]) : 1;
        }
        counted += site.counted;
        if (!site.counted) site.cross_entropy = 0;
        if (!site.counted && c.mask_entropy) site.entropy = site.confusion = 0;
        sums.cross_entropy += site.cross_entropy;
        sums.entropy += site.entropy;
        sums.confusion += site.confusion;
        if (none) {
          const std::size_t output = row * c.positions + position;
          cross_entropy[output] += site.cross_entropy;
          entropy[output] += site.entropy;
          loss[output] += site.cross_entropy;
          if (lambda != 0) loss[output] -= lambda * site.entropy;
          if (kappa != 0) loss[output] += kappa * site.confusion;
        }
        sites.push_back(std::move(site));
      }
    }
    const Real per_weight = weights;
    const Real per_site = c.mask_entropy && c.target == Target::kLabels ? counted : c.sites();
    results.denominators.push_back(static_cast<double>(per_weight));
    results.denominators.push_back(static_cast<double>(per_site));
    if (!none) {
      const Real ce = sums.cross_entropy / (mean ? per_weight : 1);
      const Real h = sums.entropy / (mean ? per_site : 1);
      const Real confusion = sums.confusion / (mean ? per_site : 1);
      cross_entropy[0] += ce;
      entropy[0] += h;
      loss[0] += ce;
      if (lambda != 0) loss[0] -= lambda * h;
      if (kappa != 0) loss[0] += kappa * confusion;
    }
    std::size_t index = 0;
    for (std::int64_t row = 0; row < c.rows; ++row) {
      for (std::int64_t position = 0; position < c.positions; ++position, ++index) {
        const Site& site = sites[index];
        Real upstream = 1;
        if (c.separate_backward)
          upstream = inputs.upstream[none ? row * c.positions + position : 0];
        const Real ce_scale = site.counted ? upstream / (mean ? per_weight : 1) : 0;
        const bool h_counted = site.counted || !c.mask_entropy;
        const Real h_scale = h_counted ? upstream / (mean ? per_site : 1) : 0;
        // Entropy and its gradient leave out classes with p = 0.
        Real entropy_here = 0;
        for (std::size_t i = 0; i < site.p.size(); ++i) {
          entropy_here -= site.p[i] == 0 ? 0 : site.p[i] * site.log_p[i];
        }
        for (std::size_t i = 0; i < site.p.size(); ++i) {
          const Real p = site.p[i];
          Real other_targets = 0;
          for (std::size_t k = 0; k < site.y.size() && p > 0.5L; ++k) {
            if (k != i) other_targets += site.y[k];
          }
          // p * W - y, without the cancellation where p is nearly 1.
          const Real dce = p > 0.5L ? site.weight * std::expm1(site.log_p[i]) + other_targets
                                    : p * site.weight - site.y[i];
          const Real factor = std::fmax(Real(1), std::fabs(direction)) * ce_scale * site.weight;
          results.largest_term =
              std::fmax(results.largest_term,
                        static_cast<double>(p * (std::fabs(factor) + std::fabs(kappa * h_scale))));
          const Real dh = p == 0 ? 0 : -p * (site.log_p[i] + entropy_here);
          const std::int64_t element = c.element(row, head, static_cast<std::int64_t>(i), position);
          if (c.gradient) {
            // Terms of weight 0 are not added: those of sites that do not count may be NaN.
            Real sum = site.counted ? ce_scale * direction * dce : 0;
            if (h_counted && lambda != 0) sum -= h_scale * lambda * dh;
            if (h_counted && kappa != 0) sum += h_scale * kappa * (p - Real(1) / c.classes);
            results.gradient[element] = static_cast<double>(sum);
          }
          if (c.head_gradient && site.counted) {
            results.head_gradient[element] = static_cast<double>(ce_scale * dce);
          }
        }
      }
    }
  }
  for (std::size_t i = 0; i < outputs; ++i) {
    results.loss.push_back(static_cast<double>(loss[i]));
    results.cross_entropy.push_back(static_cast<double>(cross_entropy[i]));
    results.entropy.push_back(static_cast<double>(entropy[i]));
  }
  return results;
}

}  // namespace lnl::tests
