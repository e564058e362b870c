// The Python module of one SIMD capability: registers the CPU kernels with torch, and says how it was built.
//
// Registration is a function of the module, not a static object, so that Python can refuse a module that does not fit.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace setemb {
namespace {

void register_ops() {
  static StableLibrary library(StableLibrary::Kind::IMPL, "setemb", "CPU", __FILE__, __LINE__);
  register_smooth_chamfer(library);
  register_slot_attention(library);
  register_set_similarity(library);
  register_gather_rows(library);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = SETEMB_VERSION;
  info["capability"] = SETEMB_CAPABILITY;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(__AVX512BF16__)
  info["bfloat16_products"] = static_cast<bool>(__builtin_cpu_supports("avx512bf16"));
#else
  info["bfloat16_products"] = false;
#endif
  info["openmp"] = "none of its own: tasks run on torch's thread pool";
  info["torch_built_with"] = SETEMB_TORCH;
  info["torch_minimum"] = SETEMB_TORCH_MINIMUM;
  return info;
}

}  // namespace
}  // namespace setemb

PYBIND11_MODULE(SETEMB_MODULE, m) {
  m.doc() = "Compiled CPU kernels of setemb";
  m.def("register_ops", &setemb::register_ops,
        "Register the kernels as the CPU implementation of torch.ops.setemb, once.");
  m.def("build_info", &setemb::build_info, "How this module was built.");
}
