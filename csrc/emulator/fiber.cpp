#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && defined(__linux__)
// ucontext saves the signal mask with a system call at every switch; this is ten times as fast.
extern "C" void lnl_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl lnl_emulator_switch
.type lnl_emulator_switch, @function
lnl_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lnl_emulator_switch, . - lnl_emulator_switch
.section .note.GNU-stack,"",@progbits
.text
)");
#else
#include <ucontext.h>
#define LNL_EMULATOR_UCONTEXT
#endif

namespace lnl::emulator {

namespace {
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStack = 512 * 1024;
#else
constexpr std::size_t kStack = 128 * 1024;
#endif
}  // namespace

struct Fiber::State {
  unsigned char* memory = nullptr;  // a guard page, then the stack
  std::size_t page = 0;
#if defined(LNL_EMULATOR_UCONTEXT)
  ucontext_t own, resumer;
#else
  void* own = nullptr;
  void* resumer = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  void* resumer_fake_stack = nullptr;
  const void* resumer_bottom = nullptr;
  std::size_t resumer_size = 0;
#endif
};

namespace {
Fiber* current = nullptr;
}

Fiber::Fiber() : state_(std::make_unique<State>()) {
  state_->page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, state_->page + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  state_->memory = static_cast<unsigned char*>(memory);
  mprotect(memory, state_->page, PROT_NONE);
}

Fiber::~Fiber() { munmap(state_->memory, state_->page + kStack); }

void Fiber::prepare(void (*entry)()) {
  unsigned char* stack = state_->memory + state_->page;
#if defined(LNL_EMULATOR_UCONTEXT)
  getcontext(&state_->own);
  state_->own.uc_stack.ss_sp = stack;
  state_->own.uc_stack.ss_size = kStack;
  state_->own.uc_link = nullptr;
  makecontext(&state_->own, entry, 0);
#else
  // Six saved registers, the address to return to, and the alignment a called function expects.
  auto** top = reinterpret_cast<void**>(stack + kStack - 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  state_->own = top;
#endif
#if defined(__SANITIZE_ADDRESS__)
  state_->fake_stack = nullptr;
#endif
}

void Fiber::resume() {
  current = this;
  State& state = *state_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&state.resumer_fake_stack, state.memory + state.page, kStack);
#endif
#if defined(LNL_EMULATOR_UCONTEXT)
  swapcontext(&state.resumer, &state.own);
#else
  lnl_emulator_switch(&state.resumer, state.own);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(state.resumer_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

void Fiber::suspend() {
  State& state = *current->state_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&state.fake_stack, state.resumer_bottom, state.resumer_size);
#endif
#if defined(LNL_EMULATOR_UCONTEXT)
  swapcontext(&state.own, &state.resumer);
#else
  lnl_emulator_switch(&state.own, state.resumer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(state.fake_stack, &state.resumer_bottom, &state.resumer_size);
#endif
}

void Fiber::started() {
#if defined(__SANITIZE_ADDRESS__)
  State& state = *current->state_;
  __sanitizer_finish_switch_fiber(nullptr, &state.resumer_bottom, &state.resumer_size);
#endif
}

}  // namespace lnl::emulator
