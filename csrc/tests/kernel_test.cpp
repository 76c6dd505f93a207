// kernel_test SCHEDULE [--noise] [--only TEXT]: every case on the emulator against the oracle.
#include <cstdio>
#include <cstring>
#include <string>

#include "../emulator/emulator.h"
#include "bias_loss_case.h"

int main(int argc, char** argv) {
  using namespace lnl;
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
  int failed = 0, run = 0;
  for (const tests::Case& c : tests::all_cases()) {
    if (!only.empty() && c.name().find(only) == std::string::npos) continue;
    ++run;
    settings.seed = c.seed;
    std::string problems;
    try {
      const tests::Inputs inputs = tests::make_inputs(c);
      problems = tests::compare(c, tests::oracle(c, inputs), tests::run_kernels(c, inputs));
    } catch (const emulator::Fault& fault) {
      problems = std::string("fault: ") + fault.what() + "\n";
    }
    if (!problems.empty() && ++failed <= 25) {
      std::printf("FAILED %s\n%s", c.name().c_str(), problems.c_str());
    }
  }
  std::printf("%d cases, %d failed (%s)\n", run, failed, schedule.c_str());
  return failed > 0 || run == 0;
}
