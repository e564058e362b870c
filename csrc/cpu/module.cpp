// The Python module of one SIMD capability: registers the CPU kernels with torch, and says how it was built.
//
// The ops' schemas are declared in Python (setemb_kernels/ops/<op>/op.py); here only their CPU implementations.
// Registration is a function of the module, not a static object, so that Python can refuse a module that does not fit.
#include <pybind11/pybind11.h>

#include <tuple>

#include "../binding.h"
#include "smooth_chamfer.h"

namespace setemb {
namespace {

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      throw std::invalid_argument("x: expected float32, bfloat16, float16 or float64");
  }
}

SetBatch batch_of(const Tensor& t, const std::optional<Tensor>& mask) {
  static const double no_features = 0;  // the address of a vector is null only where it is masked
  return {t.numel() == 0 ? &no_features : t.data_ptr(),
          t.size(0),
          t.size(1),
          t.stride(0),
          t.stride(1),
          mask.has_value() ? static_cast<const bool*>(mask->data_ptr()) : nullptr};
}

// Holds what the pointers of a problem point to.
struct ChamferArguments {
  Tensor x, y;
  std::optional<Tensor> x_mask, y_mask;
  ChamferProblem problem;

  ChamferArguments(const Tensor& x_in, const Tensor& y_in, const Tensor& alpha, const std::optional<Tensor>& x_mask_in,
                   const std::optional<Tensor>& y_mask_in)
      : x(unit_last_stride(x_in)),
        y(unit_last_stride(y_in)),
        x_mask(contiguous(x_mask_in)),
        y_mask(contiguous(y_mask_in)),
        problem{batch_of(x, x_mask), batch_of(y, y_mask), x.size(2), sharpness(alpha)} {}

  bool empty() const { return x.size(0) == 0 || y.size(0) == 0 || x.size(1) == 0 || y.size(1) == 0; }
};

Tensor smooth_chamfer(const Tensor& x, const Tensor& y, const Tensor& alpha, const std::optional<Tensor>& x_mask,
                      const std::optional<Tensor>& y_mask) {
  const ChamferArguments args(x, y, alpha, x_mask, y_mask);
  if (args.empty()) return torch::stable::new_zeros(x, {x.size(0), y.size(0)});
  Tensor out = torch::stable::new_empty(x, {x.size(0), y.size(0)});
  smooth_chamfer_forward(dtype_of(x), args.problem, out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> smooth_chamfer_backward_(const Tensor& grad, const Tensor& x, const Tensor& y,
                                                            const Tensor& alpha, const std::optional<Tensor>& x_mask,
                                                            const std::optional<Tensor>& y_mask, bool need_x,
                                                            bool need_y, bool need_alpha) {
  const ChamferArguments args(x, y, alpha, x_mask, y_mask);
  const auto gradient = [&](const Tensor& of, bool need) {
    if (!need) return torch::stable::new_empty(of, {0});
    return args.empty() ? torch::stable::new_zeros(of, of.sizes()) : torch::stable::new_empty(of, of.sizes());
  };
  Tensor grad_x = gradient(x, need_x), grad_y = gradient(y, need_y), grad_alpha = gradient(alpha, need_alpha);
  if (!args.empty()) {
    double alpha_sum = 0;
    const ChamferGradients out = {need_x ? grad_x.mutable_data_ptr() : nullptr,
                                  need_y ? grad_y.mutable_data_ptr() : nullptr, need_alpha ? &alpha_sum : nullptr};
    smooth_chamfer_backward(dtype_of(x), args.problem, {grad.data_ptr(), grad.stride(0), grad.stride(1)}, out);
    if (need_alpha) torch::stable::fill_(grad_alpha, alpha_sum);
  }
  return {grad_x, grad_y, grad_alpha};
}

void register_ops() {
  using torch::stable::detail::StableLibrary;
  static StableLibrary library(StableLibrary::Kind::IMPL, "setemb", "CPU", __FILE__, __LINE__);
  library.impl("smooth_chamfer", TORCH_BOX(&smooth_chamfer));
  library.impl("smooth_chamfer_backward", TORCH_BOX(&smooth_chamfer_backward_));
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
