// slot_attention as torch calls it on the CPU.
#include "slot_attention.h"

#include <tuple>

#include "ops.h"

namespace setemb {
namespace {

bool is_contiguous(const Tensor& t, std::initializer_list<int> order) {
  int64_t expected = 1;
  for (auto axis = std::rbegin(order); axis != std::rend(order); ++axis) {
    if (t.size(*axis) != 1 && t.stride(*axis) != expected) return false;
    expected *= t.size(*axis);
  }
  return true;
}

// [B, H, K, features] in the memory order of q: heads outermost where they are so in q (or one item of slots is
// expanded over all), else contiguous.
Tensor new_like_slots(const Tensor& q, int64_t features) {
  const int64_t B = q.size(0), H = q.size(1), K = q.size(2);
  const bool expanded = B > 1 && q.stride(0) == 0 && is_contiguous(q, {1, 2, 3});
  const bool heads_first =
      q.numel() != 0 && (expanded || (is_contiguous(q, {1, 0, 2, 3}) && !is_contiguous(q, {0, 1, 2, 3})));
  if (!heads_first) return torch::stable::new_empty(q, {B, H, K, features});
  Tensor out = torch::stable::new_empty(q, {H, B, K, features});
  return torch::stable::transpose(out, 0, 1);
}

HeadRows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

MutableHeadRows mutable_rows_of(Tensor& t) {
  if (t.dim() == 1) return {nullptr, 0, 0, 0};  // not needed
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// Holds what the pointers of a problem point to.
struct SlotArguments {
  Tensor q, k;
  std::optional<Tensor> v, bias, mask;
  SlotAttentionProblem problem;

  SlotArguments(const Tensor& q_in, const Tensor& k_in, const std::optional<Tensor>& v_in,
                const std::optional<Tensor>& bias_in, const std::optional<Tensor>& mask_in, double scale, double eps,
                double token_eps)
      : q(unit_last_stride(q_in)),
        k(unit_last_stride(k_in)),
        v(v_in.has_value() ? std::optional<Tensor>(unit_last_stride(*v_in)) : std::nullopt),
        bias(contiguous(bias_in)),
        mask(contiguous(mask_in)),
        problem{q.size(0),
                q.size(1),
                q.size(2),
                k.size(1),
                k.size(2),
                k.size(3),
                v.has_value() ? v->size(3) : k.size(3),
                rows_of(q),
                rows_of(k),
                v.has_value() ? rows_of(*v) : rows_of(k),
                !v.has_value(),
                bias.has_value() ? bias->data_ptr() : nullptr,
                mask.has_value() ? static_cast<const bool*>(mask->data_ptr()) : nullptr,
                scale,
                eps,
                token_eps} {}

  bool without_slots() const { return problem.items == 0 || problem.heads == 0 || problem.slots == 0; }
};

std::tuple<Tensor, Tensor> slot_attention(const Tensor& q, const Tensor& k, const std::optional<Tensor>& v,
                                          const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                                          double scale, double eps, double token_eps) {
  const SlotArguments args(q, k, v, bias, mask, scale, eps, token_eps);
  Tensor out = new_like_slots(q, args.problem.value_features);
  const ScalarType accumulate = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor total = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, accumulate);
  if (!args.without_slots()) {
    slot_attention_forward(dtype_of(q), args.problem, mutable_rows_of(out), total.mutable_data_ptr());
  }
  return {out, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slot_attention_backward_(
    const Tensor& grad_in, const Tensor& q, const Tensor& k, const std::optional<Tensor>& v,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, const Tensor& out_in, const Tensor& total,
    double scale, double token_eps, bool need_q, bool need_k, bool need_v, bool need_bias) {
  const SlotArguments args(q, k, v, bias, mask, scale, 0, token_eps);
  const Tensor grad = unit_last_stride(grad_in), out = unit_last_stride(out_in),
               totals = torch::stable::contiguous(total);
  const auto gradient = [&](const Tensor& of, bool need) {
    if (!need) return torch::stable::new_empty(of, {0});
    return args.without_slots() ? torch::stable::new_zeros(of, of.sizes()) : torch::stable::new_empty(of, of.sizes());
  };
  Tensor grad_q = need_q ? new_like_slots(q, q.size(3)) : torch::stable::new_empty(q, {0});
  Tensor grad_k = gradient(k, need_k), grad_v = gradient(v.has_value() ? *v : k, v.has_value() && need_v);
  Tensor grad_bias =
      need_bias ? torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}) : torch::stable::new_empty(q, {0});
  if (!args.without_slots()) {
    slot_attention_backward(dtype_of(q), args.problem, rows_of(grad), rows_of(out), totals.data_ptr(),
                            {mutable_rows_of(grad_q), mutable_rows_of(grad_k), mutable_rows_of(grad_v),
                             need_bias ? grad_bias.mutable_data_ptr() : nullptr});
  }
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace

void register_slot_attention(StableLibrary& library) {
  library.impl("slot_attention", TORCH_BOX(&slot_attention));
  library.impl("slot_attention_backward", TORCH_BOX(&slot_attention_backward_));
}

}  // namespace setemb
