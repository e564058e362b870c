// Runs CUDA kernels on the host, from their own source: what csrc/cuda/warp.h calls where nvcc does not compile.
//
// A thread is a fiber; blocks run one after another. A fiber runs until it meets the others of its warp (shuffle,
// ldmatrix, mma) or of its block (barrier), and who runs next is the caller's choice of an order: a kernel must give
// the same bits in all of them. Found, and reported by an exception that `launch` throws:
//   - an access outside the registered buffers and the block's shared memory, or not aligned; a write to an input
//   - two threads that touch the same bytes of shared memory, one of them writing, without a barrier in between: the
//     block's, or among lanes of a warp the warp's (shuffles and products order no memory)
//   - lanes of a warp that meet at different places, threads that wait for others that have ended
//   - an asynchronous copy that nobody waited for at the end of the block
// Shared memory starts as NaN, and so does the target of an asynchronous copy from its start until the thread that
// made it has waited *and* the block has met at a barrier. How often each element of an output was written is counted.
//
// Sums of products are exact, then cut to float32 towards zero, as tensor cores do; approximate functions err by up to
// their documented bound. (Tensor cores also cut single products, below the last bit of the largest one.)
#pragma once

#include <sys/mman.h>

#include <cmath>
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

namespace setemb::cuda::emulator {

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// --- numbers

inline float float_of_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const int exponent = h >> 10 & 31;
  const uint32_t mantissa = h & 1023;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {
    const float tiny = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -tiny : tiny;
  }
  return bit_cast<float>(sign | static_cast<uint32_t>(exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t half_of(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (std::isnan(v)) return 0x7fff;
  const float magnitude = std::fabs(v);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

inline uint16_t bfloat16_of(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if (std::isnan(v)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t tf32_of(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if (!std::isfinite(v)) return bits;
  return (bits + 0x1000) & 0xffffe000;
}

// v (1 + error), the error anything within [-bound, bound] but always the same for the same v.
inline double perturbed(double v, float argument, double bound) {
  uint32_t hash = bit_cast<uint32_t>(argument) * 2654435761u;
  hash ^= hash >> 15;
  hash *= 2246822519u;
  hash ^= hash >> 13;
  return v + bound * (static_cast<double>(hash) / 2147483648.0 - 1.0);
}

inline float flush(double v) {
  const float f = static_cast<float>(v);
  return std::fabs(f) < 0x1p-126f ? std::copysign(0.0f, f) : f;
}

inline float exp2_fast(float v) {
  const double exact = std::exp2(static_cast<double>(v));
  if (v == 0 || !std::isfinite(v)) return static_cast<float>(exact);
  return flush(perturbed(exact, v, exact * 0x1p-22));
}

inline float log2_fast(float v) {
  if (std::fabs(v) < 0x1p-126f) return -INFINITY;
  const double exact = std::log2(static_cast<double>(v));
  if (v == 1 || !std::isfinite(exact)) return static_cast<float>(exact);
  return static_cast<float>(perturbed(exact, v, v > 0.5f && v < 2 ? 0x1p-22 : std::fabs(exact) * 0x1p-22));
}

inline float reciprocal_fast(float v) {
  const double exact = 1.0 / flush(v);
  if (!std::isfinite(exact)) return static_cast<float>(exact);
  return flush(perturbed(exact, v, exact * 0x1p-23));
}

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

// --- memory

inline bool in_shared(const void* p, std::size_t bytes) {
  const Machine& m = machine();
  const char* c = static_cast<const char*>(p);
  return c >= m.shared && c + bytes <= m.shared + m.shared_bytes;
}

inline std::string described(const char* what, const void* p, std::size_t bytes) {
  char text[128];
  std::snprintf(text, sizeof(text), "%s of %zu bytes at %p", what, bytes, p);
  return text;
}

inline void check_alignment(const char* what, const void* p, std::size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(described(what, p, bytes) + " is not aligned");
}

inline void touch_shared(const void* p, std::size_t bytes, bool writes) {
  Machine& m = machine();
  const std::size_t offset = static_cast<std::size_t>(static_cast<const char*>(p) - m.shared);
  const int warp = m.current / 32;
  const uint32_t me = 1u << warp, lane = 1u << m.current % 32;
  for (std::size_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i) {
    Touch& t = m.touches[i];
    const bool written = t.write_epoch == m.epoch && (t.writers & ~me);
    const bool read = t.read_epoch == m.epoch && (t.readers & ~me);
    if (written || (writes && read)) {
      fail("race at byte " + std::to_string(2 * i) + " of shared memory: " + (writes ? "written" : "read") +
           " after another warp has " + (written ? "written" : "read") + " it, without a barrier in between");
    }
    if (t.warp != warp || t.warp_epoch != m.warps[warp].epoch) {
      t.warp = warp, t.warp_epoch = m.warps[warp].epoch;
      t.writing_lanes = t.reading_lanes = 0;
    }
    if (t.writing_lanes & ~lane || (writes && t.reading_lanes & ~lane)) {
      fail("race at byte " + std::to_string(2 * i) + " of shared memory: " + (writes ? "written" : "read") +
           " after another lane has " + (t.writing_lanes & ~lane ? "written" : "read") +
           " it, without a barrier of the warp in between");
    }
    (writes ? t.writing_lanes : t.reading_lanes) |= lane;
    uint32_t& epoch = writes ? t.write_epoch : t.read_epoch;
    uint32_t& warps = writes ? t.writers : t.readers;
    warps = epoch == m.epoch ? warps | me : me;
    epoch = m.epoch;
  }
}

inline Buffer* buffer_of(const void* p, std::size_t bytes) {
  const char* c = static_cast<const char*>(p);
  for (Buffer& b : machine().buffers) {
    if (c >= b.begin && c + bytes <= b.end) return &b;
  }
  return nullptr;
}

inline void check_load(const void* p, std::size_t bytes, std::size_t alignment) {
  check_alignment("load", p, alignment);
  if (in_shared(p, bytes)) return touch_shared(p, bytes, false);
  if (buffer_of(p, bytes) == nullptr) fail(described("load", p, bytes) + " is outside all buffers");
}

inline void check_store(void* p, std::size_t bytes, std::size_t alignment) {
  check_alignment("store", p, alignment);
  if (in_shared(p, bytes)) return touch_shared(p, bytes, true);
  Buffer* b = buffer_of(p, bytes);
  if (b == nullptr) fail(described("store", p, bytes) + " is outside all buffers");
  if (!b->writable) fail(described("store", p, bytes) + " is to an input");
  const std::size_t first = static_cast<std::size_t>(static_cast<char*>(p) - b->begin);
  for (std::size_t i = first / b->element; i < (first + bytes + b->element - 1) / b->element; ++i) {
    if (b->writes[i] < 255) ++b->writes[i];
  }
}

// Not counted as a write, and no race.
inline void check_atomic(void* p, std::size_t bytes) {
  check_alignment("atomic", p, bytes);
  const Buffer* b = buffer_of(p, bytes);
  if (b == nullptr || !b->writable) fail(described("atomic", p, bytes) + " is outside all outputs");
}

inline int processors() { return 1; }  // few, so that blocks have several tiles
inline int thread_index() { return machine().current; }
inline int block_index() { return machine().block; }
inline int block_count() { return machine().blocks; }
inline char* shared_memory() { return machine().shared; }

// --- meetings

inline void sync_threads() {
  Machine& m = machine();
  if (m.done) fail("waits at a barrier that others will not reach: they have ended");
  Fiber& fiber = m.fibers[m.current];
  fiber.state = State::kWaiting;
  if (++m.at_barrier == m.threads) {
    m.at_barrier = 0;
    ++m.epoch;
    for (WarpState& warp : m.warps) ++warp.epoch;
    for (int i = 0; i < m.threads; ++i) {
      for (const Copy& copy : m.fibers[i].landed) std::memcpy(copy.target, copy.bytes, 16);
      m.fibers[i].landed.clear();
      m.fibers[i].state = State::kReady;
    }
  }
  to_scheduler();
}

// The last of a warp's lanes to come does what `meeting` says with the operands of all.
inline void meet(int place, Meeting meeting, const void* in, void* out, int tag) {
  Machine& m = machine();
  WarpState& warp = m.warps[m.current / 32];
  if (warp.arrived == 0) {
    warp.place = place;
    warp.meeting = meeting;
    warp.tag = tag;
  } else if (warp.place != place || warp.meeting != meeting || warp.tag != tag) {
    fail("lanes of a warp meet at different places");
  }
  warp.in[m.current % 32] = in;
  warp.out[m.current % 32] = out;
  Fiber& fiber = m.fibers[m.current];
  fiber.state = State::kWaiting;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    meeting(warp.in, warp.out, tag);
    const int first = m.current / 32 * 32;
    for (int i = first; i < first + 32; ++i) m.fibers[i].state = State::kReady;
    if (m.order != Order::kRandom) return;
  }
  to_scheduler();
}

inline void sync_warp(int place) {
  const auto order = [](const void* const*, void* const*, int) { ++machine().warps[machine().current / 32].epoch; };
  meet(place, order, nullptr, nullptr, 0);
}

inline uint32_t shuffle_xor(uint32_t v, int lanes, int place) {
  uint32_t result;
  const auto exchange = [](const void* const* in, void* const* out, int tag) {
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(out[i]) = *static_cast<const uint32_t*>(in[i ^ (tag & 31)]);
  };
  meet(place, exchange, &v, &result, lanes);
  return result;
}

inline uint32_t shuffle(uint32_t v, int lane, int place) {
  struct Operand {
    uint32_t value;
    int lane;
  } operand{v, lane};
  uint32_t result;
  const auto exchange = [](const void* const* in, void* const* out, int) {
    for (int i = 0; i < 32; ++i) {
      const int source = static_cast<const Operand*>(in[i])->lane & 31;
      *static_cast<uint32_t*>(out[i]) = static_cast<const Operand*>(in[source])->value;
    }
  };
  meet(place, exchange, &operand, &result, 0);
  return result;
}

inline uint32_t vote(bool v, int place) {
  uint32_t result;
  const auto collect = [](const void* const* in, void* const* out, int) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(*static_cast<const bool*>(in[i])) << i;
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(out[i]) = bits;
  };
  meet(place, collect, &v, &result, 0);
  return result;
}

// --- asynchronous copies

inline void copy_async(void* shared, const void* global, bool inside) {
  Machine& m = machine();
  check_alignment("asynchronous copy", shared, 16);
  if (!in_shared(shared, 16)) fail(described("asynchronous copy", shared, 16) + " is not to shared memory");
  touch_shared(shared, 16, true);
  Copy copy{static_cast<char*>(shared), {}};
  if (inside) {
    check_alignment("asynchronous copy", global, 16);
    if (buffer_of(global, 16) == nullptr) fail(described("asynchronous copy", global, 16) + " is outside all buffers");
    std::memcpy(copy.bytes, global, 16);
  }
  std::memset(shared, 0xff, 16);
  m.fibers[m.current].open.push_back(copy);
}

inline void copy_commit() {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

inline void copy_wait(int pending) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  while (static_cast<int>(fiber.groups.size()) > pending) {
    for (const Copy& copy : fiber.groups.front()) fiber.landed.push_back(copy);
    fiber.groups.erase(fiber.groups.begin());
  }
}

// --- tensor cores

// Word q of row g of a matrix of 8 rows x 4 words; row i is where rows[i] points.
inline uint32_t word_of(const void* const* rows, int g, int q) {
  uint32_t word;
  std::memcpy(&word, static_cast<const char*>(rows[g]) + 4 * q, 4);
  return word;
}

inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed, int place) {
  check_alignment("ldmatrix", row, 16);
  if (!in_shared(row, 16)) fail(described("ldmatrix", row, 16) + " is not of shared memory");
  touch_shared(row, 16, false);
  const auto exchange = [](const void* const* in, void* const* outs, int transposing) {
    Machine& m = machine();
    for (int j = 0; j < 4; ++j) {
      const void* const* rows = in + 8 * j;
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, q = lane % 4;
        uint32_t word = word_of(rows, g, q);
        if (transposing) {
          const auto half = [&](int r) { return word_of(rows, r, g / 2) >> 16 * (g % 2) & 0xffff; };
          word = half(2 * q) | half(2 * q + 1) << 16;
        }
        static_cast<uint32_t*>(outs[lane])[j] = word;
      }
      ++m.shared_phases;
      for (int a = 0; a < 8; ++a) {  // two rows in the same four banks, at different addresses
        bool conflict = false;
        for (int b = 0; b < a; ++b) {
          const auto first = reinterpret_cast<uintptr_t>(rows[a]) / 16,
                     second = reinterpret_cast<uintptr_t>(rows[b]) / 16;
          conflict |= first % 8 == second % 8 && first != second;
        }
        m.shared_conflicts += conflict;
      }
    }
  };
  meet(place, exchange, row, out, transposed);
}

// A word of shared memory for each lane: those of one address at once, those of others only from another bank.
inline uint32_t load_together(const uint32_t* p, int place) {
  check_load(p, 4, 4);
  if (!in_shared(p, 4)) fail(described("load of a warp", p, 4) + " is not of shared memory");
  const auto read = [](const void* const* in, void* const* out, int) {
    Machine& m = machine();
    ++m.shared_phases;
    for (int a = 0; a < 32; ++a) {
      std::memcpy(out[a], in[a], 4);
      bool conflict = false;
      for (int b = 0; b < a; ++b) {
        const auto first = reinterpret_cast<uintptr_t>(in[a]) / 4, second = reinterpret_cast<uintptr_t>(in[b]) / 4;
        conflict |= first % 32 == second % 32 && first != second;
      }
      m.shared_conflicts += conflict;
    }
  };
  uint32_t result;
  meet(place, read, p, &result, 0);
  return result;
}

// Towards zero.
inline float truncated(double v) {
  const float nearest = static_cast<float>(v);
  if (!std::isfinite(v)) return nearest;
  return std::fabs(static_cast<double>(nearest)) > std::fabs(v) ? std::nextafter(nearest, 0.0f) : nearest;
}

inline void multiply_add(const char* instruction, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         int place) {
  struct Operand {
    const uint32_t *a, *b;
    const float* c;
  } operand{a, b, c};
  const int kind = std::strstr(instruction, ".bf16.") ? 0 : std::strstr(instruction, ".f16.") ? 1 : 2;
  const auto exchange = [](const void* const* in, void* const* out, int tag) {
    const int numbers = tag == 2 ? 1 : 2;  // in a word
    const auto unpack = [&](uint32_t word, int i) -> double {
      if (tag == 0) return bit_cast<float>(word >> 16 * i << 16);
      if (tag == 1) return float_of_half(static_cast<uint16_t>(word >> 16 * i));
      return bit_cast<float>(word & 0xffffe000);
    };
    double rows[16][16], columns[8][16];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* o = static_cast<const Operand*>(in[lane]);
      const int g = lane / 4, q = lane % 4;
      for (int i = 0; i < numbers; ++i) {
        rows[g][numbers * q + i] = unpack(o->a[0], i);
        rows[g + 8][numbers * q + i] = unpack(o->a[1], i);
        rows[g][numbers * (q + 4) + i] = unpack(o->a[2], i);
        rows[g + 8][numbers * (q + 4) + i] = unpack(o->a[3], i);
        columns[g][numbers * q + i] = unpack(o->b[0], i);
        columns[g][numbers * (q + 4) + i] = unpack(o->b[1], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* result = static_cast<float*>(out[lane]);
      for (int i = 0; i < 4; ++i) {
        const double* row = rows[lane / 4 + i / 2 * 8];
        const double* column = columns[2 * (lane % 4) + i % 2];
        double sum = result[i];
        for (int k = 0; k < 8 * numbers; ++k) sum += row[k] * column[k];
        result[i] = truncated(sum);
      }
    }
    ++machine().products;
  };
  meet(place, exchange, &operand, c, kind);
}

}  // namespace setemb::cuda::emulator

// --- what Python calls, by ctypes

extern "C" {

// Which threads run first: 0 those of the lowest index, 1 of the highest, else any, by this number as a seed.
__attribute__((used, visibility("default"))) inline void emulator_order(uint32_t order) {
  using namespace setemb::cuda::emulator;
  machine().order = order == 0 ? Order::kForward : order == 1 ? Order::kReverse : Order::kRandom;
  machine().seed = order;
}

// Let kernels read a buffer, or also write it.
__attribute__((used, visibility("default"))) inline void emulator_register(const void* begin, std::size_t bytes,
                                                                           std::size_t element, int writable) {
  using namespace setemb::cuda::emulator;
  const char* c = static_cast<const char*>(begin);
  machine().buffers.push_back(
      {c, c + bytes, element, writable != 0, std::vector<unsigned char>(writable ? bytes / element : 0)});
}

__attribute__((used, visibility("default"))) inline void emulator_reset() {
  using namespace setemb::cuda::emulator;
  Machine& m = machine();
  m.buffers.clear();
  m.shared_phases = m.shared_conflicts = m.products = 0;
}

// How often the elements of a registered buffer were written: the least and the most.
__attribute__((used, visibility("default"))) inline void emulator_writes(const void* begin, int* least, int* most) {
  *least = 255, *most = 0;
  for (const auto& b : setemb::cuda::emulator::machine().buffers) {
    if (b.begin != begin) continue;
    for (const int n : b.writes) {
      if (n < *least) *least = n;
      if (n > *most) *most = n;
    }
  }
}

// Reads of shared memory: eight rows of ldmatrix, or a word of each lane; how many rows or words waited for another;
// products.
__attribute__((used, visibility("default"))) inline void emulator_counts(long* phases, long* conflicts,
                                                                         long* products) {
  const auto& m = setemb::cuda::emulator::machine();
  *phases = m.shared_phases, *conflicts = m.shared_conflicts, *products = m.products;
}

}  // extern "C"

// The body of an extern "C" function that launches kernels: returns 0, or 1 with what went wrong in `message`.
template <class F>
int emulator_guarded(char* message, std::size_t size, F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return 1;
  }
}
