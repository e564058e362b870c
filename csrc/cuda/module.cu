// The Python module of the CUDA kernels: says how it was built. No op has a CUDA C++ kernel yet (Triton serves CUDA
// devices); the kernels that come register themselves here as csrc/cpu/module.cpp does.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#define SETEMB_STRINGS_(...) #__VA_ARGS__
#define SETEMB_STRINGS(...) SETEMB_STRINGS_(__VA_ARGS__)

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = SETEMB_VERSION;
  info["compiler"] = "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
  info["cuda_architectures"] = SETEMB_STRINGS(__CUDA_ARCH_LIST__);
  info["torch_built_with"] = SETEMB_TORCH;
  info["torch_minimum"] = SETEMB_TORCH_MINIMUM;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "Compiled CUDA kernels of setemb";
  m.def("build_info", &build_info, "How this module was built.");
}
