// fault_test for the linear head's kernel. Prints what caught the fault.
#include <cstdio>
#include <string>

#include "../emulator/emulator.h"
#include "linear_case.h"

int main() {
  using namespace lnl;
  using emulator::Schedule;
  for (const Schedule schedule : {Schedule::kForward, Schedule::kRandom}) {
    emulator::settings().schedule = schedule;
    for (tests::LinearCase c : tests::all_linear_cases()) {
      if (c.loss.dtype != DType::kFloat32 || c.chunk > 0) continue;
      for (const bool few_blocks : {true, false}) {
        c.loss.few_blocks = few_blocks;
        try {
          const tests::LinearInputs inputs = tests::make_linear_inputs(c);
          const tests::LinearResults got = tests::run_linear_kernels(c, inputs);
          const std::string problems =
              tests::compare_linear(c, tests::linear_oracle(c, inputs), got);
          if (problems.empty()) continue;
          std::printf("caught by the oracle in %s\n%s", c.name().c_str(), problems.c_str());
        } catch (const emulator::Fault& fault) {
          std::printf("caught by the emulator in %s\n%s\n", c.name().c_str(), fault.what());
        }
        return 0;
      }
    }
  }
  std::printf("NOT CAUGHT\n");
  return 1;
}
