// The binding of the CUDA kernels as it is, with emulated kernels behind it: torch.ops.setemb_cuda for CPU tensors.
#include "../../../csrc/cuda/slot_attention_op.cpp"
#include "../../../csrc/cuda/smooth_chamfer_op.cpp"
#include "slot_attention_launch.h"
#include "smooth_chamfer_launch.h"
#include "smooth_chamfer_pack_launch.h"

using torch::stable::detail::StableLibrary;

extern "C" void register_emulated() {
  static StableLibrary schemas(StableLibrary::Kind::DEF, "setemb_cuda", nullptr, __FILE__, __LINE__);
  setemb::cuda::define_slot_attention(schemas);
  setemb::cuda::define_smooth_chamfer(schemas);
  static StableLibrary kernels(StableLibrary::Kind::IMPL, "setemb_cuda", "CPU", __FILE__, __LINE__);
  setemb::cuda::register_slot_attention(kernels);
  setemb::cuda::register_smooth_chamfer(kernels);
}
