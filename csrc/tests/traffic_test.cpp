// What the kernels ask of memory, against the closed form: logits read once and each gradient
// written once, in 32-byte sectors of which nothing is wasted where rows begin on them.
#include <cstdio>
#include <map>
#include <string>

#include "../emulator/emulator.h"
#include "../emulator/memory.h"
#include "bias_loss_case.h"

namespace {

using namespace lnl;
using cuda::Dtype;

constexpr double kMostWaste = 1.05;

int failures = 0;

void expect(bool holds, const tests::Case& c, const char* what, double wanted, double got) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %s is %g, expected %g\n", c.name().c_str(), what, got, wanted);
}

void check(const tests::Case& c) {
  const tests::Inputs inputs = tests::make_inputs(c);
  emulator::start_counting();
  tests::run_kernels(c, inputs);
  std::map<std::string, emulator::Traffic> traffic = emulator::stop_counting();
  const double bytes = static_cast<double>(c.elements()) * (c.dtype == Dtype::kFloat32 ? 4 : 2);
  const double sectors = bytes / 32;
  const auto& logits = traffic["logits"];
  expect(logits.read_bytes == bytes, c, "bytes of logits read", bytes,
         static_cast<double>(logits.read_bytes));
  expect(logits.read_sectors <= kMostWaste * sectors, c, "sectors of logits read", sectors,
         static_cast<double>(logits.read_sectors));
  for (const char* name : {"gradient", "head gradient"}) {
    const auto& gradient = traffic[name];
    expect(gradient.written_bytes == bytes, c, name, bytes,
           static_cast<double>(gradient.written_bytes));
    expect(gradient.written_sectors <= kMostWaste * sectors, c, name, sectors,
           static_cast<double>(gradient.written_sectors));
    expect(gradient.read_bytes == 0, c, name, 0, static_cast<double>(gradient.read_bytes));
  }
  // Once for the denominators of a mean, once by each thread that shares a site.
  const double labels = static_cast<double>(c.sites()) * 8;
  const double read = static_cast<double>(traffic["labels"].read_bytes);
  expect(read >= labels, c, "bytes of labels read", labels, read);
  std::printf("%-60s %6.3f %6.3f sectors read, written per ideal; %5.2f and %5.2f per request\n",
              c.name().c_str(), static_cast<double>(logits.read_sectors) / sectors,
              static_cast<double>(traffic["gradient"].written_sectors) / sectors,
              static_cast<double>(logits.read_sectors) / static_cast<double>(logits.read_requests),
              static_cast<double>(traffic["gradient"].written_sectors) /
                  static_cast<double>(traffic["gradient"].written_requests));
}

}  // namespace

int main() {
  struct Shape {
    std::int64_t rows, classes, positions;
    bool channels_last;
  };
  const Shape shapes[] = {
      {512, 12, 1, false}, {256, 32, 1, false}, {96, 64, 1, false},  {40, 256, 1, false},
      {16, 992, 1, false}, {6, 2048, 1, false}, {4, 12, 256, true},  {2, 8, 1024, false},
      {2, 16, 512, false}, {1, 32, 512, false}, {1, 64, 256, false}, {1, 160, 256, false},
  };
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const Shape& shape : shapes) {
      tests::Case c;
      c.dtype = dtype;
      c.rows = shape.rows;
      c.classes = shape.classes;
      c.positions = shape.positions;
      c.channels_last = shape.channels_last;
      c.entropy_weight = 0.3;
      c.reversal = 0.5;
      check(c);
    }
  }
  std::printf("%d failed\n", failures);
  return failures > 0;
}
