// What the CUDA bindings share: each op's <op>_op.cpp registers its kernels under torch.ops.setemb_cuda. The op that
// users call is put together of them in Python (setemb_kernels/ops/<op>/cuda.py).
#pragma once

#define USE_CUDA  // torch's header declares the current stream only then
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../binding.h"
#include "stream.h"

namespace setemb::cuda {

using torch::stable::detail::StableLibrary;

void define_slot_attention(StableLibrary& library);
void register_slot_attention(StableLibrary& library);
void define_smooth_chamfer(StableLibrary& library);
void register_smooth_chamfer(StableLibrary& library);

#if defined(SETEMB_EMULATED)  // by the tests: kernels run on the host, on tensors of the CPU
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
  Stream stream() const { return nullptr; }
};
#else
// Makes the device of a tensor current while it lives, and knows torch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream_));
  }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

}  // namespace setemb::cuda
