// fault_test [TEXT]: the test of the tester: kernels with one fault must be caught. Prints what
// caught it. With TEXT only cases with that in their name are run.
#include <cstdio>
#include <string>

#include "../emulator/emulator.h"
#include "bias_loss_case.h"

int main(int argc, char** argv) {
  using namespace lnl;
  using emulator::Schedule;
  for (const Schedule schedule : {Schedule::kForward, Schedule::kRandom}) {
    emulator::settings().schedule = schedule;
    for (tests::Case c : tests::all_cases()) {
      const bool dense =
          c.target != tests::Target::kLabels || c.smoothing > 0 || c.confusion_weight >= 0;
      if (c.dtype != DType::kFloat32 || dense) continue;
      if (argc > 1 && c.name().find(argv[1]) == std::string::npos) continue;
      c.few_blocks = !c.many_blocks;  // shared memory is used again
      try {
        const tests::Inputs inputs = tests::make_inputs(c);
        const tests::Results got = tests::run_kernels(c, inputs);
        const std::string problems = tests::compare(c, tests::oracle(c, inputs), got);
        if (problems.empty()) continue;
        std::printf("caught by the oracle in %s\n%s", c.name().c_str(), problems.c_str());
      } catch (const emulator::Fault& fault) {
        std::printf("caught by the emulator in %s\n%s\n", c.name().c_str(), fault.what());
      }
      return 0;
    }
  }
  std::printf("NOT CAUGHT\n");
  return 1;
}
