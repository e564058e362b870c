// set_similarity as torch calls it on the CPU.
#include "set_similarity.h"

#include <cmath>
#include <limits>
#include <tuple>

#include "ops.h"

namespace setemb {
namespace {

// v, infinite where it is out of the range of a float32 tensor, which could not be filled with it.
double in_range_of(const Tensor& t, double v) {
  const bool fits = t.scalar_type() == ScalarType::Double || !(std::fabs(v) > std::numeric_limits<float>::max());
  return fits ? v : std::copysign(std::numeric_limits<double>::infinity(), v);
}

SimilarityKind kind_of(const std::string& name) {
  if (name == "smooth_chamfer") return SimilarityKind::kSmoothChamfer;
  if (name == "chamfer") return SimilarityKind::kChamfer;
  if (name == "maxsim") return SimilarityKind::kMaxSim;
  if (name == "soft_maxsim") return SimilarityKind::kSoftMaxSim;
  if (name == "max") return SimilarityKind::kMax;
  if (name == "match_probability") return SimilarityKind::kMatchProbability;
  throw std::invalid_argument("kind: expected a kind of the op, got " + name);
}

Tensor indices(const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Long) throw std::invalid_argument(std::string(name) + ": expected int64");
  return torch::stable::contiguous(t);
}

// Offsets from 0 that never decrease and stay within the rows.
void check_offsets(const char* name, const int64_t* offsets, int64_t sets, int64_t rows) {
  for (int64_t i = 0; i <= sets; ++i) {
    if (i == 0 ? offsets[0] == 0 : offsets[i - 1] <= offsets[i] && offsets[i] <= rows) continue;
    throw std::invalid_argument(std::string(name) + ": expected offsets from 0 that never decrease, at most " +
                                std::to_string(rows) + ", got " + std::to_string(offsets[i]) + " at [" +
                                std::to_string(i) + "]" + (i == 0 ? "" : ", after " + std::to_string(offsets[i - 1])));
  }
}

void check_candidates(const int64_t* candidates, int64_t count, int64_t sets) {
  int64_t least = -1, most = -1;
  for (int64_t i = 0; i < count; ++i) {
    least = i == 0 ? candidates[i] : std::min(least, candidates[i]);
    most = i == 0 ? candidates[i] : std::max(most, candidates[i]);
  }
  if (least < -1 || most >= sets) {
    throw std::invalid_argument("candidates: expected -1 (none) or the index of one of " + std::to_string(sets) +
                                " sets of y, got " + std::to_string(least) + " to " + std::to_string(most));
  }
}

// Holds what the pointers of a problem point to.
struct SimilarityArguments {
  Tensor x, y, x_offsets, y_offsets;
  std::optional<Tensor> candidates;
  SimilarityProblem problem{};

  SimilarityArguments(const Tensor& x_in, const Tensor& x_offsets_in, const Tensor& y_in, const Tensor& y_offsets_in,
                      const std::optional<Tensor>& candidates_in, const Tensor& alpha, const Tensor& bias,
                      const std::string& kind, bool mean)
      : x(unit_last_stride(x_in)),
        y(unit_last_stride(y_in)),
        x_offsets(indices("x_offsets", x_offsets_in)),
        y_offsets(indices("y_offsets", y_offsets_in)) {
    if (candidates_in.has_value()) candidates = indices("candidates", *candidates_in);
    const auto sets_of = [](const Tensor& t, const Tensor& offsets) -> PackedSets {
      static const double no_features = 0;
      return {t.numel() == 0 ? &no_features : t.data_ptr(), t.size(0), t.stride(0),
              static_cast<const int64_t*>(offsets.data_ptr()), offsets.size(0) - 1};
    };
    problem.x = sets_of(x, x_offsets);
    problem.y = sets_of(y, y_offsets);
    check_offsets("x_offsets", problem.x.offsets, problem.x.sets, problem.x.rows);
    check_offsets("y_offsets", problem.y.offsets, problem.y.sets, problem.y.rows);
    problem.features = x.size(1);
    if (y.size(1) != x.size(1)) throw std::invalid_argument("y: expected as many features as x");
    problem.candidates = candidates.has_value() ? static_cast<const int64_t*>(candidates->data_ptr()) : nullptr;
    problem.choices = candidates.has_value() ? candidates->size(1) : problem.y.sets;
    if (candidates.has_value()) check_candidates(problem.candidates, candidates->numel(), problem.y.sets);
    problem.kind = kind_of(kind);
    problem.mean = mean;
    const bool soft = problem.kind == SimilarityKind::kSmoothChamfer || problem.kind == SimilarityKind::kSoftMaxSim;
    problem.alpha = soft ? sharpness(alpha) : number(alpha);
    problem.bias = number(bias);
  }
};

void check_one_type(const Tensor& x, const Tensor& y) {
  if (x.scalar_type() != y.scalar_type()) throw std::invalid_argument("y: expected the dtype of x");
}

Tensor set_similarity(const Tensor& x, const Tensor& x_offsets, const Tensor& y, const Tensor& y_offsets,
                      const std::optional<Tensor>& candidates, const Tensor& alpha, const Tensor& bias,
                      std::string kind, bool mean, bool wide) {
  const SimilarityArguments args(x, x_offsets, y, y_offsets, candidates, alpha, bias, kind, mean);
  check_one_type(x, y);
  const ScalarType type = wide ? accumulated_in(x.scalar_type()) : x.scalar_type();
  Tensor out = torch::stable::new_empty(x, {args.problem.x.sets, args.problem.choices}, type);
  if (out.numel() > 0) set_similarity_forward(dtype_of(x), args.problem, out.mutable_data_ptr(), wide);
  return out;
}

Tensor set_similarity_codes(const Tensor& x, const std::optional<Tensor>& x_scale, const Tensor& x_offsets,
                            const Tensor& y, const std::optional<Tensor>& y_scale, const Tensor& y_offsets,
                            const std::optional<Tensor>& candidates, const Tensor& alpha, const Tensor& bias,
                            std::string kind, bool mean) {
  SimilarityArguments args(x, x_offsets, y, y_offsets, candidates, alpha, bias, kind, mean);
  const bool x_is_int8 = x.scalar_type() == ScalarType::Char, y_is_int8 = y.scalar_type() == ScalarType::Char;
  if (!y_is_int8 && y.scalar_type() != ScalarType::Float8_e4m3fn)
    throw std::invalid_argument("y: expected int8 or float8_e4m3fn");
  if (!(x_is_int8 && y_is_int8) && x.scalar_type() != ScalarType::Float)
    throw std::invalid_argument("x: expected float32, or int8 next to int8");
  const auto scale = [](const char* name, const std::optional<Tensor>& t, int64_t rows) -> std::optional<Tensor> {
    if (!t.has_value()) return std::nullopt;
    if (t->scalar_type() != ScalarType::Float || t->dim() != 1 || t->size(0) != rows)
      throw std::invalid_argument(std::string(name) + ": expected float32 [" + std::to_string(rows) + "]");
    return torch::stable::contiguous(*t);
  };
  const std::optional<Tensor> xs = scale("x_scale", x_scale, x.size(0)), ys = scale("y_scale", y_scale, y.size(0));
  if (xs.has_value()) args.problem.x_scale = static_cast<const float*>(xs->data_ptr());
  if (ys.has_value()) args.problem.y_scale = static_cast<const float*>(ys->data_ptr());
  Tensor out = torch::stable::new_empty(x, {args.problem.x.sets, args.problem.choices}, ScalarType::Float);
  if (out.numel() > 0) {
    const Code code = y_is_int8 ? Code::kInt8 : Code::kFloat8;
    set_similarity_of_codes(args.problem, x_is_int8, code, static_cast<float*>(out.mutable_data_ptr()));
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> set_similarity_backward_(
    const Tensor& grad_in, const Tensor& x, const Tensor& x_offsets, const Tensor& y, const Tensor& y_offsets,
    const std::optional<Tensor>& candidates, const Tensor& alpha, const Tensor& bias, std::string kind, bool mean,
    bool need_x, bool need_y, bool need_alpha, bool need_bias) {
  const SimilarityArguments args(x, x_offsets, y, y_offsets, candidates, alpha, bias, kind, mean);
  check_one_type(x, y);
  const Tensor grad = torch::stable::contiguous(grad_in);
  const bool some = grad.numel() > 0;  // then the kernel writes all rows
  const auto gradient = [&](const Tensor& of, bool need) {
    if (!need) return torch::stable::new_empty(of, {0});
    return some ? torch::stable::new_empty(of, of.sizes()) : torch::stable::new_zeros(of, of.sizes());
  };
  Tensor grad_x = gradient(x, need_x), grad_y = gradient(y, need_y), grad_alpha = gradient(alpha, need_alpha),
         grad_bias = gradient(bias, need_bias);
  double alpha_sum = 0, bias_sum = 0;
  if (some) {
    const SimilarityGradients out = {need_x ? grad_x.mutable_data_ptr() : nullptr,
                                     need_y ? grad_y.mutable_data_ptr() : nullptr, need_alpha ? &alpha_sum : nullptr,
                                     need_bias ? &bias_sum : nullptr};
    set_similarity_backward(dtype_of(x), args.problem, grad.data_ptr(), grad.scalar_type() != x.scalar_type(), out);
  }
  if (need_alpha) torch::stable::fill_(grad_alpha, in_range_of(grad_alpha, alpha_sum));
  if (need_bias) torch::stable::fill_(grad_bias, in_range_of(grad_bias, bias_sum));
  return {grad_x, grad_y, grad_alpha, grad_bias};
}

}  // namespace

void register_set_similarity(StableLibrary& library) {
  library.impl("set_similarity", TORCH_BOX(&set_similarity));
  library.impl("set_similarity_codes", TORCH_BOX(&set_similarity_codes));
  library.impl("set_similarity_backward", TORCH_BOX(&set_similarity_backward_));
}

}  // namespace setemb
