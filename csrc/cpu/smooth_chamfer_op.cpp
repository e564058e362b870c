// smooth_chamfer as torch calls it on the CPU.
#include "smooth_chamfer.h"

#include <string>
#include <tuple>

#include "ops.h"

namespace setemb {
namespace {

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
                      const std::optional<Tensor>& y_mask, bool wide) {
  const ChamferArguments args(x, y, alpha, x_mask, y_mask);
  const ScalarType type = wide ? accumulated_in(x.scalar_type()) : x.scalar_type();
  if (args.empty()) return torch::stable::new_zeros(x, {x.size(0), y.size(0)}, type);
  Tensor out = torch::stable::new_empty(x, {x.size(0), y.size(0)}, type);
  smooth_chamfer_forward(dtype_of(x), args.problem, out.mutable_data_ptr(), wide);
  return out;
}

StoredType stored_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return StoredType::kFloat32;
    case ScalarType::BFloat16:
      return StoredType::kBFloat16;
    case ScalarType::Half:
      return StoredType::kFloat16;
    case ScalarType::Char:
      return StoredType::kInt8;
    default:
      throw std::invalid_argument("y: expected float32, bfloat16, float16 or int8");
  }
}

Tensor smooth_chamfer_mixed_(const Tensor& x, const Tensor& y, const Tensor& alpha, const std::optional<Tensor>& x_mask,
                             const std::optional<Tensor>& y_mask, const std::optional<Tensor>& y_scale) {
  if (x.scalar_type() != ScalarType::Float) throw std::invalid_argument("x: expected float32");
  const ChamferArguments args(x, y, alpha, x_mask, y_mask);
  const std::optional<Tensor> scale = contiguous(y_scale);
  if (scale.has_value() && scale->scalar_type() != ScalarType::Float)
    throw std::invalid_argument("y_scale: expected float32");
  if (args.empty()) return torch::stable::new_zeros(x, {x.size(0), y.size(0)});
  Tensor out = torch::stable::new_empty(x, {x.size(0), y.size(0)});
  smooth_chamfer_mixed(stored_type(y), args.problem,
                       scale.has_value() ? static_cast<const float*>(scale->data_ptr()) : nullptr,
                       static_cast<float*>(out.mutable_data_ptr()));
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
    smooth_chamfer_backward(dtype_of(x), args.problem,
                            {grad.data_ptr(), grad.stride(0), grad.stride(1), grad.scalar_type() != x.scalar_type()},
                            out);
    if (need_alpha) torch::stable::fill_(grad_alpha, alpha_sum);
  }
  return {grad_x, grad_y, grad_alpha};
}

// [2, sets] or none.
const void* statistics(const char* name, const std::optional<Tensor>& t, const Tensor& sets) {
  if (!t.has_value()) return nullptr;
  if (t->scalar_type() != accumulated_in(sets.scalar_type()) || t->dim() != 2 || t->size(0) != 2 ||
      t->size(1) != sets.size(0))
    throw std::invalid_argument(std::string(name) + ": expected [2, sets] of the type that sums are accumulated in");
  return t->data_ptr();
}

const int64_t* ids(const char* name, const std::optional<Tensor>& t, const Tensor& sets) {
  if (!t.has_value()) return nullptr;
  if (t->scalar_type() != ScalarType::Long || t->dim() != 1 || t->size(0) != sets.size(0))
    throw std::invalid_argument(std::string(name) + ": expected an int64 for each set");
  return static_cast<const int64_t*>(t->data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> smooth_chamfer_contrast_backward_(
    const Tensor& x, const Tensor& y, const Tensor& alpha, const std::optional<Tensor>& x_mask,
    const std::optional<Tensor>& y_mask, const Tensor& scale, const Tensor& bias, const Tensor& weight,
    const std::optional<Tensor>& rows_in, const std::optional<Tensor>& columns_in,
    const std::optional<Tensor>& x_group_in, const std::optional<Tensor>& y_group_in, bool need_x, bool need_y,
    bool need_alpha) {
  const ChamferArguments args(x, y, alpha, x_mask, y_mask);
  const std::optional<Tensor> rows = contiguous(rows_in), columns = contiguous(columns_in);
  const std::optional<Tensor> x_group = contiguous(x_group_in), y_group = contiguous(y_group_in);
  const Contrast loss = {number(scale),
                         number(bias),
                         number(weight),
                         statistics("rows", rows, x),
                         statistics("columns", columns, y),
                         ids("x_group", x_group, x),
                         ids("y_group", y_group, y)};
  if (x_group.has_value() != y_group.has_value() || (columns.has_value() && !rows.has_value()))
    throw std::invalid_argument("expected ids of both sides or of none, and columns only beside rows");
  const auto gradient = [&](const Tensor& of, bool need) {
    const ScalarType type = accumulated_in(of.scalar_type());
    if (!need) return torch::stable::new_empty(of, {0}, type);
    return args.empty() ? torch::stable::new_zeros(of, of.sizes(), type)
                        : torch::stable::new_empty(of, of.sizes(), type);
  };
  Tensor grad_x = gradient(x, need_x), grad_y = gradient(y, need_y);
  Tensor grad_alpha = torch::stable::new_zeros(alpha, {}, ScalarType::Double);
  Tensor sums = torch::stable::new_zeros(alpha, {2}, ScalarType::Double);
  if (x.size(0) != 0 && y.size(0) != 0) {
    double alpha_sum = 0;
    const ContrastSums found = smooth_chamfer_contrast_backward(
        dtype_of(x), args.problem, loss,
        {need_x ? grad_x.mutable_data_ptr() : nullptr, need_y ? grad_y.mutable_data_ptr() : nullptr,
         need_alpha ? &alpha_sum : nullptr});
    static_cast<double*>(sums.mutable_data_ptr())[0] = found.by_scale;
    static_cast<double*>(sums.mutable_data_ptr())[1] = found.by_bias;
    torch::stable::fill_(grad_alpha, alpha_sum);
  }
  return {grad_x, grad_y, grad_alpha, sums};
}

}  // namespace

void register_smooth_chamfer(StableLibrary& library) {
  library.impl("smooth_chamfer", TORCH_BOX(&smooth_chamfer));
  library.impl("smooth_chamfer_mixed", TORCH_BOX(&smooth_chamfer_mixed_));
  library.impl("smooth_chamfer_backward", TORCH_BOX(&smooth_chamfer_backward_));
  library.impl("smooth_chamfer_contrast_backward", TORCH_BOX(&smooth_chamfer_contrast_backward_));
}

}  // namespace setemb
