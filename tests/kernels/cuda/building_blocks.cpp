// Small kernels that use each building block of csrc/cuda/warp.h once, right or (by `fault`) wrong.
#include "launch.h"
#include "warp.h"

namespace setemb::cuda {
namespace {

struct Product {
  const void *a, *b;  // [16, 32 bytes], [8, 32 bytes]; or, transposed, b [16, 8]
  float* c;           // [16, 8]
};

// c = a b^T of one tile, by asynchronous copies, ldmatrix and mma.
template <class T, bool transposed>
void product(Product p) {
  const int lane = lane_index();
  char* a = shared_memory();
  char* b = a + 16 * 32;
  copy_async(a + 16 * lane, static_cast<const char*>(p.a) + 16 * lane);
  copy_commit();
  if (lane < 16) copy_async(b + 16 * lane, static_cast<const char*>(p.b) + 16 * lane);
  copy_commit();
  copy_wait<0>();
  sync_threads();
  uint32_t a_words[4], b_words[4];
  load_matrices(a_words, a + lane % 16 * 32 + lane / 16 * 16);
  if constexpr (transposed) {
    load_matrices_transposed(b_words, b + lane % 16 * 16);
  } else {
    load_matrices(b_words, b + lane % 8 * 32 + lane / 8 % 2 * 16);
  }
  float c[4] = {0, 0, 0, 0};
  const uint32_t columns[2] = {b_words[0], b_words[1]};
  multiply_add<T>(c, a_words, columns);
  const int g = lane / 4, q = lane % 4;
  for (int i = 0; i < 4; ++i) store(p.c + (g + i / 2 * 8) * 8 + 2 * q + i % 2, c[i]);
}

enum Fault {
  kNone,
  kNoBarrier,
  kNoWait,
  kNotCommitted,
  kReadsPastTheEnd,
  kWritesPastTheEnd,
  kWritesInput,
  kMisaligned,
  kDivergent,
  kEndsEarly,
  kWritesTwice,
  kSharedPastTheEnd,
  kLanes,
  kLanesWithoutBarrier,
  kMeetInBranches,
};

struct Reversal {
  const float* in;  // [n]
  float* out;       // [n] in reverse order within blocks of 128
  int fault;
};

// Through shared memory, by blocks of 64 threads, each copying two.
void reverse(Reversal p) {
  const int t = thread_index(), first = block_index() * 128;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  if (t < 32) copy_async(shared + 4 * t, p.in + first + 4 * t + (p.fault == kReadsPastTheEnd ? 4 : 0));
  if (p.fault != kNotCommitted) copy_commit();
  if (p.fault != kNoWait) copy_wait<0>();
  if (p.fault == kEndsEarly && t == 5) return;
  if (p.fault == kDivergent && t == 5) sync_warp();
  if (p.fault == kDivergent) shuffle_xor(1.0f, 1);
  if (p.fault != kNoBarrier) sync_threads();
  if (p.fault == kSharedPastTheEnd && t == 0) load(shared + 128);
  for (int i = t; i < 128; i += 64) {
    float* target = p.out + first + i + (p.fault == kWritesPastTheEnd ? 1 : 0);
    if (p.fault == kWritesInput) target = const_cast<float*>(p.in) + first + i;
    store(target, load(shared + 127 - i));
    if (p.fault == kWritesTwice && i == 7) store(target, load(shared + 127 - i));
  }
  if (p.fault == kLanes || p.fault == kLanesWithoutBarrier) {
    sync_threads();
    store(shared + t, 0.0f);
    if (p.fault == kLanes) sync_warp();
    load(shared + (t ^ 1));
  }
  if (p.fault == kMeetInBranches) {
    if (t == 5) {
      shuffle_xor(1.0f, 1);
    } else {
      shuffle_xor(1.0f, 1);
    }
  }
  if (p.fault == kMisaligned) load(reinterpret_cast<const Chunk*>(p.in + 1));
}

struct Rounding {
  const float* in;
  float *bfloat, *half, *tf32, *exp2, *log2, *reciprocal;
};

void rounding(Rounding p) {
  const int i = block_index() * 32 + thread_index();
  const float v = load(p.in + i);
  store(p.bfloat + i, to_float(from_float<bfloat16>(v)));
  store(p.half + i, to_float(from_float<float16>(v)));
  store(p.tf32 + i, float_of(to_tf32(v)));
  store(p.exp2 + i, exp2_fast(v));
  store(p.log2 + i, log2_fast(v));
  store(p.reciprocal + i, reciprocal_fast(v));
}

struct Exchange {
  uint32_t* out;  // [3, 32]
};

void exchange(Exchange p) {
  const uint32_t lane = static_cast<uint32_t>(lane_index());
  store(p.out + lane, shuffle_xor(lane, 5));
  store(p.out + 32 + lane, shuffle(lane * lane, 7));
  store(p.out + 64 + lane, vote(lane % 3 == 1));
}

struct Together {
  const uint32_t* in;  // [512]
  uint32_t* out;       // [32]
  int stride;
};

// out[i] = in[stride i], by way of shared memory.
void together(Together p) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const int lane = lane_index();
  for (int i = lane; i < 512; i += kWarp) store(shared + i, load(p.in + i));
  sync_warp();
  store(p.out + lane, load_together(shared + p.stride * lane));
}

}  // namespace
}  // namespace setemb::cuda

using namespace setemb::cuda;

extern "C" {

int run_product(const void* a, const void* b, float* c, int64_t kind, int64_t transposed, char* message, size_t size) {
  return emulator_guarded(message, size, [&] {
    void (*kernel)(Product) = kind == 0   ? (transposed ? product<bfloat16, true> : product<bfloat16, false>)
                              : kind == 1 ? (transposed ? product<float16, true> : product<float16, false>)
                                          : product<tf32, false>;
    launch("product", kernel, {a, b, c}, 1, 32, 24 * 32, nullptr);
  });
}

int run_reverse(const float* in, float* out, int64_t blocks, int64_t fault, char* message, size_t size) {
  return emulator_guarded(
      message, size, [&] { launch("reverse", reverse, {in, out, static_cast<int>(fault)}, blocks, 64, 512, nullptr); });
}

int run_rounding(const float* in, float* bfloat, float* half, float* tf32, float* exp2, float* log2, float* reciprocal,
                 int64_t n, char* message, size_t size) {
  return emulator_guarded(message, size, [&] {
    launch("rounding", rounding, {in, bfloat, half, tf32, exp2, log2, reciprocal}, n / 32, 32, 0, nullptr);
  });
}

int run_together(const uint32_t* in, uint32_t* out, int64_t stride, char* message, size_t size) {
  return emulator_guarded(
      message, size, [&] { launch("together", together, {in, out, static_cast<int>(stride)}, 1, 32, 2048, nullptr); });
}

int run_exchange(uint32_t* out, char* message, size_t size) {
  return emulator_guarded(message, size, [&] { launch("exchange", exchange, {out}, 1, 32, 0, nullptr); });
}
}
