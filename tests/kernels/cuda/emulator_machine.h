// Of the emulator (see emulator.h): fibers, the machine whose blocks they are of, and a launch.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "emulator_numbers.h"

namespace setemb::cuda::emulator {

// --- fibers

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

#if defined(__x86_64__)
extern "C" void setemb_emulator_switch(void** from, void* to);
asm(R"(
.text
.weak setemb_emulator_switch
.type setemb_emulator_switch, @function
setemb_emulator_switch:
  endbr64
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
.size setemb_emulator_switch, .-setemb_emulator_switch
)");
#endif

constexpr std::size_t kStack = 256 << 10;
constexpr std::size_t kGuard = 64 << 10;

struct Copy {
  char* target;
  char bytes[16];
};

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  Context context;
  char* stack = nullptr;
  State state = State::kDone;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;                 // not yet committed
  std::vector<Copy> landed;               // waited for, not yet past a barrier
};

using Meeting = void (*)(const void* const* in, void* const* out, int tag);

struct WarpState {
  int arrived = 0;
  uint32_t epoch = 1;  // barriers of the warp and of the block
  Meeting meeting = nullptr;
  int place = 0;  // line of the kernel
  int tag = 0;
  const void* in[32];
  void* out[32];
};

struct Buffer {
  const char* begin;
  const char* end;
  std::size_t element;
  bool writable;
  std::vector<unsigned char> writes;
};

struct Touch {  // of two bytes of shared memory, since which barrier and by which warps
  uint32_t write_epoch = 0, read_epoch = 0;
  uint32_t writers = 0, readers = 0;
  // of the last of these warps, by which lanes since which barrier; with a write an earlier warp is an error already
  int warp = -1;
  uint32_t warp_epoch = 0;
  uint32_t writing_lanes = 0, reading_lanes = 0;
};

enum class Order { kForward, kReverse, kRandom };

struct Machine {
  // settings
  Order order = Order::kForward;
  uint32_t seed = 0;
  std::vector<Buffer> buffers;
  // the block that runs
  std::vector<Fiber> fibers;
  std::vector<WarpState> warps;
  Context scheduler;
  std::function<void()> body;
  int threads = 0, current = 0, block = 0, blocks = 0;
  int at_barrier = 0, done = 0;
  uint32_t epoch = 1;
  std::vector<char> shared_storage;
  char* shared = nullptr;
  std::size_t shared_bytes = 0;
  std::vector<Touch> touches;
  std::string error;
  std::mt19937 random;
  // counted over all launches since reset
  long shared_phases = 0, shared_conflicts = 0, products = 0, exponentials = 0;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void switch_context(Context& from, Context& to) {
#if defined(__x86_64__)
  setemb_emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

inline void to_scheduler() {
  Machine& m = machine();
  switch_context(m.fibers[m.current].context, m.scheduler);
}

// Ends the block: the fiber is left where it is, as no exception may cross to another stack.
[[noreturn]] inline void fail(const std::string& what) {
  Machine& m = machine();
  m.error = "block " + std::to_string(m.block) + ", thread " + std::to_string(m.current) + ": " + what;
  for (;;) to_scheduler();
}

inline void fiber_main() {
  Machine& m = machine();
  m.body();
  Fiber& fiber = m.fibers[m.current];
  for (const auto& group : fiber.groups) {
    if (!group.empty()) fail("ends with asynchronous copies that nobody waited for");
  }
  if (!fiber.open.empty()) fail("ends with asynchronous copies that were not committed");
  if (m.at_barrier) fail("ends while others wait at a barrier");
  fiber.state = State::kDone;
  ++m.done;
  for (;;) to_scheduler();
}

inline void start_fiber(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for a stack");
    mprotect(memory, 4096, PROT_NONE);
    fiber.stack = static_cast<char*>(memory);
  }
  fiber.groups.clear();
  fiber.open.clear();
  fiber.landed.clear();
  fiber.state = State::kReady;
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // no return from fiber_main; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context.stack_pointer = top;
#else
  getcontext(&fiber.context.context);
  fiber.context.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.context.uc_stack.ss_size = kStack;
  fiber.context.context.uc_link = nullptr;
  makecontext(&fiber.context.context, &fiber_main, 0);
#endif
}

// The thread that runs next, or -1 if none can.
inline int choose() {
  Machine& m = machine();
  const auto ready = [&](int i) { return m.fibers[i].state == State::kReady; };
  if (m.order == Order::kRandom) {
    const int start = static_cast<int>(m.random() % m.threads);
    for (int i = 0; i < m.threads; ++i) {
      if (ready((start + i) % m.threads)) return (start + i) % m.threads;
    }
  } else if (m.order == Order::kReverse) {
    for (int i = m.threads - 1; i >= 0; --i) {
      if (ready(i)) return i;
    }
  } else {
    for (int i = 0; i < m.threads; ++i) {
      if (ready(i)) return i;
    }
  }
  return -1;
}

inline void run_block() {
  Machine& m = machine();
  m.at_barrier = m.done = 0;
  m.epoch = 1;
  m.touches.assign((m.shared_bytes + 1) / 2, Touch());
  std::memset(m.shared_storage.data(), 0xff, m.shared_storage.size());
  m.warps.assign(m.threads / 32, WarpState());
  for (int i = 0; i < m.threads; ++i) start_fiber(m.fibers[i]);
  while (m.done < m.threads && m.error.empty()) {
    const int next = choose();
    if (next < 0) {
      m.error = "block " + std::to_string(m.block) + ": all threads wait: " + std::to_string(m.at_barrier) +
                " at a barrier, " + std::to_string(m.done) + " have ended";
      break;
    }
    m.current = next;
    switch_context(m.scheduler, m.fibers[next].context);
  }
  const char* guard = m.shared + m.shared_bytes;
  for (std::size_t i = 0; i < kGuard && m.error.empty(); ++i) {
    if (static_cast<unsigned char>(guard[i]) != 0xff) m.error = "written past the end of shared memory";
  }
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), const Params& params, int blocks, int threads,
            std::size_t shared_bytes) {
  Machine& m = machine();
  if (threads % 32 || threads < 32 || threads > 1024) throw std::runtime_error("emulator: threads");
  m.threads = threads;
  m.blocks = blocks;
  if (static_cast<int>(m.fibers.size()) < threads) m.fibers.resize(threads);
  m.shared_bytes = shared_bytes;
  m.shared_storage.resize(128 + shared_bytes + kGuard);
  m.shared = m.shared_storage.data();
  m.shared += (128 - reinterpret_cast<uintptr_t>(m.shared) % 128) % 128;
  m.random.seed(m.seed);
  m.error.clear();
  m.body = [kernel, params] { kernel(params); };
  for (int i = 0; i < blocks && m.error.empty(); ++i) {
    m.block = m.order == Order::kReverse ? blocks - 1 - i : i;
    run_block();
  }
  if (!m.error.empty()) throw std::runtime_error(std::string(name) + ": " + m.error);
}

}  // namespace setemb::cuda::emulator
