// kernel_test SCHEDULE [--noise] [--only TEXT]: every case on the emulator against the oracle,
// those of the loss and those of the linear head.
#include <cstdio>
#include <cstring>
#include <string>

#include "../emulator/emulator.h"
#include "bias_loss_case.h"
#include "linear_case.h"

namespace {

using namespace lnl;

std::string problems_of(const tests::Case& c) {
  const tests::Inputs inputs = tests::make_inputs(c);
  return tests::compare(c, tests::oracle(c, inputs), tests::run_kernels(c, inputs));
}
std::string problems_of(const tests::LinearCase& c) {
  const tests::LinearInputs inputs = tests::make_linear_inputs(c);
  return tests::compare_linear(c, tests::linear_oracle(c, inputs),
                               tests::run_linear_kernels(c, inputs));
}

std::uint64_t seed_of(const tests::Case& c) { return c.seed; }
std::uint64_t seed_of(const tests::LinearCase& c) { return c.loss.seed; }

int failed = 0, run = 0;

template <typename AnyCase>
void run_all(const std::vector<AnyCase>& cases, const std::string& only) {
  for (const AnyCase& c : cases) {
    if (!only.empty() && c.name().find(only) == std::string::npos) continue;
    ++run;
    emulator::settings().seed = seed_of(c);
    std::string problems;
    try {
      problems = problems_of(c);
    } catch (const emulator::Fault& fault) {
      problems = std::string("fault: ") + fault.what() + "\n";
    }
    if (!problems.empty() && ++failed <= 25) {
      std::printf("FAILED %s\n%s", c.name().c_str(), problems.c_str());
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  auto& settings = emulator::settings();
  std::string schedule = argc > 1 ? argv[1] : "forward", only;
  for (int i = 2; i < argc; ++i) {
    if (std::strcmp(argv[i], "--noise") == 0) settings.noise = true;
    if (std::strcmp(argv[i], "--only") == 0 && i + 1 < argc) only = argv[++i];
  }
  const char* names[] = {"forward", "reverse", "random", "priority"};
  bool known = false;
  for (int i = 0; i < 4; ++i) {
    if (schedule != names[i]) continue;
    settings.schedule = static_cast<emulator::Schedule>(i);
    known = true;
  }
  if (!known) {
    std::fprintf(stderr, "unknown schedule %s\n", schedule.c_str());
    return 2;
  }
  run_all(tests::all_cases(), only);
  run_all(tests::all_linear_cases(), only);
  std::printf("%d cases, %d failed (%s)\n", run, failed, schedule.c_str());
  return failed > 0 || run == 0;
}
