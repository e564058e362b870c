// Tasks on torch's own thread pool, and scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace setemb {

// Aligned to a cache line, not initialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : data_(allocate(count)) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  static T* allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
    return static_cast<T*>(p);
  }
  std::unique_ptr<T, Free> data_;
};

inline int64_t threads() { return torch::stable::get_num_threads(); }

// Calls task(i, worker) for every i in [0, count), each once. Workers take the next task when they are done with one,
// so that a slow core holds nobody up; what a task computes may not depend on its worker.
template <class F>
void run_tasks(int64_t count, const F& task) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads(), count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < count; i = next++) task(i, worker);
    }
  });
}

}  // namespace setemb
