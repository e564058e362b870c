// A tensor as Python passes it to emulated kernels: what csrc/cuda/<op>_call.h asks of torch's own.
#pragma once

#include <cstdint>
#include <optional>

struct View {
  void* data;
  int64_t sizes[4], strides[4];

  void* data_ptr() const { return data; }
  int64_t size(int64_t i) const { return sizes[i]; }
  int64_t stride(int64_t i) const { return strides[i]; }
};

inline std::optional<View> optional_view(const View* v) {
  return v == nullptr ? std::nullopt : std::optional<View>(*v);
}
