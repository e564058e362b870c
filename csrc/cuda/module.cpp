// The Python module of the CUDA kernels: registers them with torch, and says how it was built.
//
// Registration is a function of the module, not a static object: it happens when a user asks for these kernels by name.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "ops.h"

namespace setemb::cuda {
namespace {

void register_ops() {
  static StableLibrary schemas(StableLibrary::Kind::DEF, "setemb_cuda", nullptr, __FILE__, __LINE__);
  define_slot_attention(schemas);
  define_smooth_chamfer(schemas);
  static StableLibrary kernels(StableLibrary::Kind::IMPL, "setemb_cuda", "CUDA", __FILE__, __LINE__);
  register_slot_attention(kernels);
  register_smooth_chamfer(kernels);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = SETEMB_VERSION;
  info["compiler"] = "CUDA toolkit " + std::to_string(CUDART_VERSION / 1000) + "." +
                     std::to_string(CUDART_VERSION % 1000 / 10) + ", gcc " __VERSION__;
  info["cuda_architectures"] = SETEMB_CUDA_ARCHITECTURES;
  info["torch_built_with"] = SETEMB_TORCH;
  info["torch_minimum"] = SETEMB_TORCH_MINIMUM;
  return info;
}

}  // namespace
}  // namespace setemb::cuda

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "Compiled CUDA kernels of setemb";
  m.def("register_ops", &setemb::cuda::register_ops, "Register the kernels as torch.ops.setemb_cuda, once.");
  m.def("build_info", &setemb::cuda::build_info, "How this module was built.");
}
