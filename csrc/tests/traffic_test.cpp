// What the kernels ask of memory, against the closed form: logits read once and each gradient
// written once, in 32-byte sectors of which nothing is wasted where rows begin on them; where they
// do not, no more sectors than the requests of whole warps span.
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <string>

#include "../emulator/emulator.h"
#include "../emulator/memory.h"
#include "bias_loss_case.h"
#include "device_inputs.h"

namespace {

using namespace lnl;
using tests::Target;

constexpr double kMostWaste = 1.05;

int failures = 0;

void expect(bool holds, const std::string& where, const char* what, double wanted, double got) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %s is %g, expected %g\n", where.c_str(), what, got, wanted);
}

cuda::LaunchFacts facts_of(const tests::Case& c) {
  BiasLossCall call;
  call.dtype = c.dtype;
  call.rows = c.rows, call.heads = c.heads, call.classes = c.classes, call.positions = c.positions;
  call.channels_last = c.channels_last;
  const std::int64_t label = 0;
  if (c.target == Target::kLabels) call.labels = &label;
  call.wide_probabilities = c.target == Target::kWideProbabilities;
  call.label_smoothing = c.smoothing;
  call.confusion_weight.present = c.confusion_weight >= 0;
  return cuda::launch_facts(call, tests::device_of(c));
}

bool is(const cuda::LaunchFacts& facts, const char* kernel) {
  return std::strcmp(facts.kernel, kernel) == 0;
}

// Sectors of one pass over [N, K, C, S] whose requests are of single elements of so many lanes:
// request v of a tile is of the sites `lane + v * request_stride`.
std::uint64_t sectors_by_element(const tests::Case& c, int lanes, int request_stride,
                                 int requests) {
  const auto size = static_cast<std::int64_t>(size_of(c.dtype));
  std::uint64_t sectors = 0;
  for (std::int64_t head = 0; head < c.heads; ++head) {
    for (std::int64_t tile = 0; tile < c.sites(); tile += lanes * requests) {
      for (int v = 0; v < requests; ++v) {
        for (std::int64_t k = 0; k < c.classes; ++k) {
          std::set<std::int64_t> touched;
          for (int lane = 0; lane < lanes; ++lane) {
            const std::int64_t site = tile + lane + v * request_stride;
            if (site >= c.sites()) continue;
            const std::int64_t element = c.element(site / c.positions, head, k, site % c.positions);
            touched.insert(element * size / 32);
          }
          sectors += touched.size();
        }
      }
    }
  }
  return sectors;
}

// The most sectors of one pass.
double most_sectors(const tests::Case& c, const cuda::LaunchFacts& facts) {
  const double ideal =
      static_cast<double>(c.elements()) * static_cast<double>(size_of(c.dtype)) / 32;
  const bool wide = c.dtype == DType::kFloat64, narrow = size_of(c.dtype) == 2;
  if (is(facts, "sites_small") && c.positions % (wide ? 2 : 4) != 0) {
    return static_cast<double>(sectors_by_element(c, 32, 32, wide ? 2 : 4));
  }
  if (is(facts, "sites_large") && (c.positions * size_of(c.dtype)) % 32 != 0) {
    // Of each class 128 bytes of adjacent sites at once, or of 16-bit single elements 64.
    return static_cast<double>(sectors_by_element(c, wide ? 16 : 32, 32, narrow ? 2 : 1));
  }
  return kMostWaste * ideal;
}

void check(const tests::Case& c) {
  const std::string name = c.name();
  const cuda::LaunchFacts facts = facts_of(c);
  const tests::Inputs inputs = tests::make_inputs(c);
  emulator::start_counting();
  tests::run_kernels(c, inputs);
  std::map<std::string, emulator::Traffic> traffic = emulator::stop_counting();
  const auto size = static_cast<double>(size_of(c.dtype));
  const double bytes = static_cast<double>(c.elements()) * size, sectors = bytes / 32;
  const double most = most_sectors(c, facts);
  const bool large = is(facts, "rows_large") || is(facts, "sites_large");
  const auto& logits = traffic["logits"];
  const auto read = static_cast<double>(logits.read_bytes);
  const auto read_sectors = static_cast<double>(logits.read_sectors);
  const double passes = facts.reads_logits_once ? 1 : 2;
  // Off chip, a thread of each site looks the label's logit up.
  const double lookups = facts.reads_logits_once || facts.dense || is(facts, "rows_large")
                             ? 0
                             : static_cast<double>(c.sites() * c.heads);
  expect(read == passes * bytes + lookups * size, name, "bytes of logits read",
         passes * bytes + lookups * size, read);
  expect(read_sectors <= passes * most + lookups, name, "sectors of logits read", passes * most,
         read_sectors);
  for (const char* which : {"gradient", "head gradient"}) {
    const auto& gradient = traffic[which];
    expect(gradient.written_bytes == bytes, name, which, bytes,
           static_cast<double>(gradient.written_bytes));
    expect(static_cast<double>(gradient.written_sectors) <= most, name, which, most,
           static_cast<double>(gradient.written_sectors));
    expect(gradient.read_bytes == 0, name, which, 0, static_cast<double>(gradient.read_bytes));
  }
  if (c.target == Target::kLabels) {
    // By each thread that shares a site.
    const double labels = static_cast<double>(c.sites() * c.heads) * 8;
    const auto got = static_cast<double>(traffic["labels"].read_bytes);
    if (is(facts, "rows_small") || is(facts, "sites_small")) {
      expect(got == labels, name, "bytes of labels read", labels, got);
    }
    expect(got >= labels, name, "bytes of labels read", labels, got);
  } else {
    const double wide = c.dtype == DType::kFloat64 ? 8 : 4;
    const double factor = c.target == Target::kWideProbabilities ? wide / size : 1;
    const double wanted = (large ? 2 : 1) * factor * bytes;
    const auto& probabilities = traffic["probabilities"];
    const auto got = static_cast<double>(probabilities.read_bytes);
    expect(got == wanted, name, "bytes of probabilities read", wanted, got);
    // sites_large takes the two adjacent sites of a lane of 16 bits one after the other, and
    // float32 beside 16-bit logits comes in two accesses of 16 bytes a lane: the second finds its
    // sectors in L1.
    const bool pairs = is(facts, "sites_large") && size == 2;
    const bool halves =
        c.target == Target::kWideProbabilities && !is(facts, "rows_small") && factor > 1;
    const double allowed = (pairs || halves ? 2 : 1) * (large ? 2 : 1) * factor * most;
    expect(static_cast<double>(probabilities.read_sectors) <= allowed, name,
           "sectors of probabilities read", allowed,
           static_cast<double>(probabilities.read_sectors));
  }
  std::printf("%-75s %6.3f %6.3f sectors read, written per ideal; %5.2f and %5.2f per request\n",
              name.c_str(), read_sectors / sectors,
              static_cast<double>(traffic["gradient"].written_sectors) / sectors,
              read_sectors / static_cast<double>(logits.read_requests),
              static_cast<double>(traffic["gradient"].written_sectors) /
                  static_cast<double>(traffic["gradient"].written_requests));
}

// gradient *= factor: nothing but the factor is read where that is 1.
void check_scaling(DType dtype, double factor) {
  constexpr std::int64_t count = 5000;
  const auto size = static_cast<double>(size_of(dtype));
  const std::string name = "scale_gradient by " + std::to_string(factor) + ", " +
                           std::to_string(static_cast<int>(size)) + " bytes";
  const std::vector<double> ones(count, 1.0);
  std::vector<unsigned char> bytes(static_cast<std::size_t>(count * size));
  for (std::int64_t i = 0; i < count; ++i) {
    tests::encode(dtype, 1.5, &bytes[static_cast<std::size_t>(i * size)]);
  }
  const emulator::Buffer gradient("gradient", bytes.size(), emulator::Access::kReadWrite,
                                  bytes.data());
  const tests::Numbers scale("factor", accumulation_of(dtype), std::vector<double>{factor});
  Coefficient factor_on_device;
  factor_on_device.present = true;
  factor_on_device.device = scale.data();
  factor_on_device.dtype = accumulation_of(dtype);
  emulator::start_counting();
  tests::check(
      cuda::launch_scale_gradient(gradient.data(), count, dtype, factor_on_device, {2}, nullptr));
  std::map<std::string, emulator::Traffic> traffic = emulator::stop_counting();
  const double wanted = factor == 1 ? 0 : count * size;
  const auto& touched = traffic["gradient"];
  expect(touched.read_bytes == wanted, name, "bytes of the gradient read", wanted,
         static_cast<double>(touched.read_bytes));
  expect(touched.written_bytes == wanted, name, "bytes of the gradient written", wanted,
         static_cast<double>(touched.written_bytes));
  expect(static_cast<double>(touched.read_sectors) <= kMostWaste * wanted / 32, name,
         "sectors of the gradient read", wanted / 32, static_cast<double>(touched.read_sectors));
  expect(traffic["factor"].read_bytes > 0, name, "bytes of the factor read", 4,
         static_cast<double>(traffic["factor"].read_bytes));
  for (std::int64_t i = 0; i < count; ++i) {
    const double got = tests::decode(
        dtype, static_cast<unsigned char*>(gradient.data()) + static_cast<std::size_t>(i * size));
    if (got != 1.5 * factor) expect(false, name, "a gradient", 1.5 * factor, got);
  }
  std::printf("%s: %g bytes read and written\n", name.c_str(), wanted);
}

}  // namespace

int main() {
  struct Shape {
    std::int64_t rows, classes, positions;
    bool channels_last = false;
    int shared_memory = 227 * 1024;
  };
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  const Shape aligned[] = {
      {512, 12, 1},
      {256, 32, 1},
      {96, 64, 1},
      {40, 256, 1},
      {16, 992, 1},
      {6, 2048, 1},
      {1, 8192, 1},
      {4, 12, 256, true},
      {2, 8, 1024},
      {2, 16, 512},
      {1, 32, 512},
      {1, 64, 256},
      {1, 160, 256},
      {3, 2048, 1, false, 4096},
      {1, 160, 256, false, 24 * 1024},
  };
  // An odd number of positions: nothing begins where the last one ended. So many rows that no lane
  // has a part of its sites only, since the checker tells requests by how often a lane came by.
  const Shape odd[] = {{128, 5, 3}, {128, 8, 7}, {128, 4, 65}, {64, 40, 5}, {64, 64, 3}};
  for (const DType dtype : dtypes) {
    const auto check_shape = [&](const Shape& shape, auto change) {
      tests::Case c;
      c.dtype = dtype;
      c.rows = shape.rows;
      c.classes = shape.classes;
      c.positions = shape.positions;
      c.channels_last = shape.channels_last;
      c.shared_memory = shape.shared_memory;
      c.entropy_weight = 0.3;
      c.reversal = 0.5;
      change(c);
      check(c);
      c.bulk_copies = is(facts_of(c), "rows_large");
      if (c.bulk_copies) check(c);
    };
    for (const Shape& shape : aligned) {
      check_shape(shape, [](tests::Case&) {});
      check_shape(shape, [](tests::Case& c) { c.smoothing = 0.1, c.confusion_weight = 0.2; });
      check_shape(shape, [](tests::Case& c) { c.target = Target::kProbabilities; });
      if (dtype == DType::kBFloat16) {
        check_shape(shape, [](tests::Case& c) { c.target = Target::kWideProbabilities; });
      }
    }
    for (const Shape& shape : odd) {
      check_shape(shape, [](tests::Case&) {});
      check_shape(shape, [](tests::Case& c) { c.target = Target::kProbabilities; });
    }
    check_scaling(dtype, 1.0);
    check_scaling(dtype, -0.5);
  }
  std::printf("%d failed\n", failures);
  return failures > 0;
}
