// What the linear head's kernel asks of memory, against the closed form: features read once and
// their gradient written once, in 32-byte sectors of which nothing is wasted where rows begin on
// them.
#include <cstdio>
#include <map>
#include <string>

#include "../emulator/emulator.h"
#include "../emulator/memory.h"
#include "linear_case.h"

namespace {

using namespace lnl;

constexpr double kMostWaste = 1.05;

int failures = 0;

void expect(bool holds, const tests::LinearCase& c, const char* what, double wanted, double got) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %s is %g, expected %g\n", c.name().c_str(), what, got, wanted);
}

void check(const tests::LinearCase& c) {
  const tests::LinearInputs inputs = tests::make_linear_inputs(c);
  emulator::start_counting();
  tests::run_linear_kernels(c, inputs);
  std::map<std::string, emulator::Traffic> traffic = emulator::stop_counting();
  const double bytes =
      static_cast<double>(c.loss.rows * c.width) * (c.loss.dtype == DType::kFloat32   ? 4
                                                    : c.loss.dtype == DType::kFloat64 ? 8
                                                                                      : 2);
  const double sectors = bytes / 32;
  const auto& features = traffic["features"];
  const auto& gradient = traffic["features gradient"];
  const auto read = static_cast<double>(features.read_sectors);
  const auto written = static_cast<double>(gradient.written_sectors);
  expect(features.read_bytes == bytes, c, "bytes of features read", bytes,
         static_cast<double>(features.read_bytes));
  expect(read <= kMostWaste * sectors, c, "sectors of features read", sectors, read);
  expect(gradient.written_bytes == bytes, c, "bytes of their gradient written", bytes,
         static_cast<double>(gradient.written_bytes));
  expect(written <= kMostWaste * sectors, c, "sectors of their gradient written", sectors, written);
  expect(gradient.read_bytes == 0, c, "bytes of their gradient read", 0,
         static_cast<double>(gradient.read_bytes));
  std::printf("%-75s %6.3f %6.3f sectors read, written per ideal\n", c.name().c_str(),
              read / sectors, written / sectors);
}

}  // namespace

int main() {
  struct Shape {
    std::int64_t rows, heads, classes, width;
    int shared_memory;
  };
  const Shape shapes[] = {
      {70, 1, 12, 512, 227 * 1024},
      {70, 1, 12, 512, 100 * 1024},
      {37, 1, 64, 64, 227 * 1024},
      {50, 3, 8, 160, 99 * 1024},
  };
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (const Shape& shape : shapes) {
      tests::LinearCase c;
      c.loss.dtype = dtype;
      c.loss.rows = shape.rows;
      c.loss.heads = shape.heads;
      c.loss.classes = shape.classes;
      c.width = dtype == DType::kFloat64 ? shape.width / 2 : shape.width;
      c.loss.shared_memory = shape.shared_memory;
      c.loss.entropy_weight = 0.3;
      c.loss.reversal = 0.5;
      check(c);
    }
  }
  std::printf("%d failed\n", failures);
  return failures > 0;
}
