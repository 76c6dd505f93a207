// Switching between stacks of one operating system thread.
#pragma once

#include <cstddef>
#include <memory>

namespace lnl::emulator {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the fiber begin with entry() when it is next resumed; entry must not return.
  void prepare(void (*entry)());
  void resume();          // from the scheduler
  static void suspend();  // from the fiber: back to whoever resumed it
  static void started();  // first statement of an entry

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lnl::emulator
