// What a warp of a CUDA kernel is made of: loads, stores, shuffles, barriers, asynchronous copies and tensor-core
// products (sm_80 and up). The only place with PTX.
//
// Each has two bodies: for nvcc the instruction, for any other compiler the emulator of tests/kernels/cuda, which runs
// the same kernel source on the host and checks what hardware does not: ranges, alignment, races, writes. So a kernel
// reads and writes memory by `load` and `store` only, and includes nothing but this file and `launch.h`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SETEMB_DEVICE __device__ __forceinline__
#define SETEMB_HOST_DEVICE __host__ __device__ __forceinline__
#define SETEMB_KERNEL(threads, blocks_a_processor) __global__ void __launch_bounds__(threads, blocks_a_processor)
#define SETEMB_UNROLL _Pragma("unroll")
#define SETEMB_NO_UNROLL _Pragma("unroll 1")
#define SETEMB_PLACE
#define SETEMB_SAME_PLACE
#else
#include "emulator.h"
#define SETEMB_DEVICE inline
#define SETEMB_HOST_DEVICE inline
#define SETEMB_KERNEL(threads, blocks_a_processor) void
#define SETEMB_UNROLL
#define SETEMB_NO_UNROLL
#define SETEMB_PLACE , int place = __builtin_LINE()  // where lanes of a warp meet, which the emulator compares
#define SETEMB_SAME_PLACE , place
#endif

namespace setemb::cuda {

constexpr int kWarp = 32;

// --- numbers

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct tf32;  // the operand of a product: a float of which 10 bits of mantissa count

// 16 bytes, what one instruction moves at most. `ldmatrix` and asynchronous copies work on these.
struct alignas(16) Chunk {
  uint32_t word[4];
};

SETEMB_DEVICE uint32_t bits_of(float v) {
#if defined(__CUDACC__)
  return __float_as_uint(v);
#else
  return emulator::bit_cast<uint32_t>(v);
#endif
}

SETEMB_DEVICE float float_of(uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  return emulator::bit_cast<float>(bits);
#endif
}

SETEMB_DEVICE float to_float(float v) { return v; }
SETEMB_DEVICE float to_float(bfloat16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }
SETEMB_DEVICE float to_float(float16 v) {
#if defined(__CUDACC__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
#else
  return emulator::float_of_half(v.bits);
#endif
}

// To the nearest, ties to even; infinite where out of range.
template <class T>
SETEMB_DEVICE T from_float(float v);

template <>
SETEMB_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
SETEMB_DEVICE bfloat16 from_float<bfloat16>(float v) {
#if defined(__CUDACC__)
  bfloat16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
  return out;
#else
  return {emulator::bfloat16_of(v)};
#endif
}
template <>
SETEMB_DEVICE float16 from_float<float16>(float v) {
#if defined(__CUDACC__)
  float16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
  return out;
#else
  return {emulator::half_of(v)};
#endif
}

// Two neighbours in a word, the first in the lower half, as tensor cores take them.
template <class T>
SETEMB_DEVICE uint32_t pack_two(float first, float second) {
  static_assert(sizeof(T) == 2);
  return static_cast<uint32_t>(from_float<T>(first).bits) | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

// The nearest number with 10 bits of mantissa, ties away from 0: what a tensor core would otherwise cut off.
SETEMB_DEVICE uint32_t to_tf32(float v) {
#if defined(__CUDACC__)
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(v));
  return out;
#else
  return emulator::tf32_of(v);
#endif
}

// Relative error 2^-22; numbers below 2^-126 become 0.
SETEMB_DEVICE float exp2_fast(float v) {
#if defined(__CUDACC__)
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
#else
  return emulator::exp2_fast(v);
#endif
}

// Absolute error 2^-22 for v within (0.5, 2), relative 2^-22 elsewhere.
SETEMB_DEVICE float log2_fast(float v) {
#if defined(__CUDACC__)
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
#else
  return emulator::log2_fast(v);
#endif
}

// To the last bit or so, of a normal v.
SETEMB_DEVICE float log2_exact(float v) {
#if defined(__CUDACC__)
  return log2f(v);
#else
  return std::log2(v);
#endif
}

// Relative error 2^-23 for |v| within [2^-126, 2^126].
SETEMB_DEVICE float reciprocal_fast(float v) {
#if defined(__CUDACC__)
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
#else
  return emulator::reciprocal_fast(v);
#endif
}

// a b + c, rounded once: where two kernels are to give the same bits, and the compiler would choose for each alone.
SETEMB_DEVICE float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDACC__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// v, of which the compiler knows nothing: what is computed from it is computed anew, rather than kept in registers.
SETEMB_DEVICE float opaque(float v) {
#if defined(__CUDACC__)
  asm volatile("" : "+f"(v));
#endif
  return v;
}

SETEMB_DEVICE int opaque(int v) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// --- where a thread is

SETEMB_DEVICE int thread_index() {
#if defined(__CUDACC__)
  return static_cast<int>(threadIdx.x);
#else
  return emulator::thread_index();
#endif
}
SETEMB_DEVICE int lane_index() { return thread_index() % kWarp; }
SETEMB_DEVICE int warp_index() { return thread_index() / kWarp; }

SETEMB_DEVICE int block_index() {
#if defined(__CUDACC__)
  return static_cast<int>(blockIdx.x);
#else
  return emulator::block_index();
#endif
}

SETEMB_DEVICE int block_count() {
#if defined(__CUDACC__)
  return static_cast<int>(gridDim.x);
#else
  return emulator::block_count();
#endif
}

// The block's dynamic shared memory, aligned to 128 bytes.
SETEMB_DEVICE char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) char setemb_shared_memory[];
  return setemb_shared_memory;
#else
  return emulator::shared_memory();
#endif
}

// --- memory, global or shared, aligned to sizeof(T)

template <class T>
SETEMB_DEVICE T load(const T* p) {
#if !defined(__CUDACC__)
  emulator::check_load(p, sizeof(T), alignof(T));
#endif
  return *p;
}

// The same of shared memory, by all lanes of a warp at once: the emulator counts those that wait for a bank.
SETEMB_DEVICE uint32_t load_together(const uint32_t* p SETEMB_PLACE) {
#if defined(__CUDACC__)
  return *p;
#else
  return emulator::load_together(p, place);
#endif
}

template <class T>
SETEMB_DEVICE void store(T* p, T v) {
#if !defined(__CUDACC__)
  emulator::check_store(p, sizeof(T), alignof(T));
#endif
  *p = v;
}

SETEMB_DEVICE void atomic_max(uint64_t* p, uint64_t v) {
#if defined(__CUDACC__)
  atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
#else
  emulator::check_atomic(p, sizeof(v));
  if (v > *p) *p = v;
#endif
}

// --- all threads of a block, or of a warp, at once

SETEMB_DEVICE void sync_threads() {
#if defined(__CUDACC__)
  __syncthreads();
#else
  emulator::sync_threads();
#endif
}

#if defined(__CUDACC__)
SETEMB_DEVICE void sync_warp() { __syncwarp(); }
#else
SETEMB_DEVICE void sync_warp(int place = __builtin_LINE()) { emulator::sync_warp(place); }
#endif

// The value of the lane whose index differs in the bits of `lanes`.
SETEMB_DEVICE uint32_t shuffle_xor(uint32_t v, int lanes SETEMB_PLACE) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(0xffffffffu, v, lanes);
#else
  return emulator::shuffle_xor(v, lanes, place);
#endif
}
SETEMB_DEVICE float shuffle_xor(float v, int lanes SETEMB_PLACE) {
  return float_of(shuffle_xor(bits_of(v), lanes SETEMB_SAME_PLACE));
}

// The value of one lane.
SETEMB_DEVICE uint32_t shuffle(uint32_t v, int lane SETEMB_PLACE) {
#if defined(__CUDACC__)
  return __shfl_sync(0xffffffffu, v, lane);
#else
  return emulator::shuffle(v, lane, place);
#endif
}
SETEMB_DEVICE float shuffle(float v, int lane SETEMB_PLACE) {
  return float_of(shuffle(bits_of(v), lane SETEMB_SAME_PLACE));
}

// Bit i: of lane i.
SETEMB_DEVICE uint32_t vote(bool v SETEMB_PLACE) {
#if defined(__CUDACC__)
  return __ballot_sync(0xffffffffu, v);
#else
  return emulator::vote(v, place);
#endif
}

// --- asynchronous copies of 16 bytes, global to shared
//
// What was copied may be read after copy_wait by its thread *and* a barrier; until then the target holds nothing.

// 16 zero bytes where not `inside`; the source is not read then.
SETEMB_DEVICE void copy_async(void* shared, const void* global, bool inside = true) {
#if defined(__CUDACC__)
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(inside ? 16 : 0)
               : "memory");
#else
  emulator::copy_async(shared, global, inside);
#endif
}

// Ends a group of copies (which may be empty).
SETEMB_DEVICE void copy_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::copy_commit();
#endif
}

// Waits for all but the newest `pending` groups of this thread.
template <int pending>
SETEMB_DEVICE void copy_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
  emulator::copy_wait(pending);
#endif
}

// --- tensor cores
//
// With g = lane / 4 and q = lane % 4, and words of 32 bits: two neighbours along k in 16 bits, or one float.
//   a, 16 rows x 8 words along k:  a[0] = (g, q), a[1] = (g + 8, q), a[2] = (g, q + 4), a[3] = (g + 8, q + 4)
//   b, 8 columns x 8 words along k:  b[0] = (column g, q), b[1] = (column g, q + 4)
//   c, 16 rows x 8 columns of float:  c[0], c[1] = (g, 2 q), (g, 2 q + 1);  c[2], c[3] = the same of row g + 8

// Four matrices of 8 rows x 16 bytes. `row` is, in lane i, row i % 8 of matrix i / 8, in shared memory. out[j]: of
// matrix j, word q of row g.
SETEMB_DEVICE void load_matrices(uint32_t (&out)[4], const void* row SETEMB_PLACE) {
#if defined(__CUDACC__)
  const uint32_t source = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(source)
               : "memory");
#else
  emulator::load_matrices(out, row, false, place);
#endif
}

// The same of matrices of 16-bit numbers, each transposed: out[j] holds rows 2 q and 2 q + 1 of column g.
SETEMB_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row SETEMB_PLACE) {
#if defined(__CUDACC__)
  const uint32_t source = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(source)
               : "memory");
#else
  emulator::load_matrices(out, row, true, place);
#endif
}

// c += a b^T over 8 words along k: m16n8k16 of T = bfloat16 or float16, m16n8k8 of T = tf32.
template <class T>
SETEMB_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] SETEMB_PLACE);

#if defined(__CUDACC__)
#define SETEMB_MMA(type, instruction)                                                                               \
  template <>                                                                                                       \
  SETEMB_DEVICE void multiply_add<type>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {            \
    asm volatile("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
  }
#else
#define SETEMB_MMA(type, instruction)                                                                               \
  template <>                                                                                                       \
  SETEMB_DEVICE void multiply_add<type>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int place) { \
    emulator::multiply_add(instruction, c, a, b, place);                                                            \
  }
#endif
SETEMB_MMA(bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
SETEMB_MMA(float16, "m16n8k16.row.col.f32.f16.f16.f32")
SETEMB_MMA(tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef SETEMB_MMA

}  // namespace setemb::cuda
