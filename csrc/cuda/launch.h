// How a kernel is started: on a stream, with the error checked; or in the emulator, where nvcc does not compile.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>
#else
#include "emulator.h"
#endif

#include "stream.h"

namespace setemb::cuda {

#if defined(__CUDACC__)
// Throws what went wrong, and leaves no error behind that a later call would report as its own.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(status));
}
#endif

// Of the current device.
inline int processors() {
#if defined(__CUDACC__)
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
#else
  return emulator::processors();
#endif
}

// A kernel takes one struct by value. Blocks and threads have one axis.
template <class Params>
void launch(const char* name, void (*kernel)(Params), const Params& params, long blocks, int threads,
            std::size_t shared_bytes, Stream stream) {
  if (blocks <= 0) return;
  if (blocks > 0x7fffffffL) throw std::runtime_error(std::string(name) + ": too many blocks");
#if defined(__CUDACC__)
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), name);
#else
  (void)stream;
  emulator::launch(name, kernel, params, static_cast<int>(blocks), threads, shared_bytes);
#endif
}

}  // namespace setemb::cuda
