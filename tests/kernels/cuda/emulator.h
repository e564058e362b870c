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

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "emulator_warp.h"

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
