// From tensors to launches. A template of the tensor's type: torch's stable one in the binding, a plain view in the
// emulator, so that both run this code. Tensors were allocated by setemb_kernels/ops/slot_attention/cuda.py, which
// checked sizes and dtypes.
#pragma once

#include <optional>
#include <type_traits>

#include "slot_attention.h"

namespace setemb::cuda::slots {

template <class T, class Tensor>
T* data_of(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(static_cast<const void*>(t.data_ptr())));
}
template <class T, class Tensor>
T* data_of(const std::optional<Tensor>& t) {
  return t.has_value() ? data_of<T>(*t) : nullptr;
}

template <class Tensor>
Rows rows_of(const Tensor& t, Arithmetic arithmetic) {
  const int64_t bytes = arithmetic == Arithmetic::kTf32 || arithmetic == Arithmetic::kFloat32 ? 4 : 2;
  Rows r = {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), static_cast<int>(t.size(3)), 0};
  bool chunked = (r.features == 1 || r.feature == 1) && r.features * bytes % 16 == 0 &&
                 reinterpret_cast<uintptr_t>(r.data) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis) chunked = chunked && (t.size(axis) <= 1 || t.stride(axis) * bytes % 16 == 0);
  r.chunked = chunked;
  return r;
}

template <class Tensor>
Mask mask_of(const std::optional<Tensor>& mask) {
  if (!mask.has_value()) return {nullptr, 0, 0};
  return {data_of<const uint8_t>(*mask), mask->stride(0), mask->stride(1)};
}

// `weights` [items, heads, slots, padded], `tokens` [items, groups, tokens, features].
template <class Tensor>
Sizes sizes_of(const Tensor& weights, int64_t groups, int64_t tokens) {
  return {static_cast<int>(weights.size(0)), static_cast<int>(groups), static_cast<int>(weights.size(1) / groups),
          static_cast<int>(weights.size(2)), static_cast<int>(tokens), static_cast<int>(weights.size(3))};
}

template <class Tensor>
WeightParams weight_params(const Tensor& q, const Tensor& k, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& mask, const Tensor& weights, double scale, double token_eps,
                           double factor, Arithmetic arithmetic) {
  WeightParams p = {};
  p.sizes = sizes_of(weights, k.size(1), k.size(2));
  p.mask = mask_of(mask);
  p.q = rows_of(q, arithmetic), p.k = rows_of(k, arithmetic);
  if (bias.has_value()) {
    p.bias = bias->data_ptr();
    p.bias_item = bias->stride(0), p.bias_head = bias->stride(1), p.bias_slot = bias->stride(2);
  }
  const int fitting = kMaxSlots / p.sizes.slots;
  p.heads_in_block = fitting < p.sizes.heads ? fitting : p.sizes.heads;
  p.head_blocks = static_cast<int>(ceil_div(p.sizes.heads, p.heads_in_block));
  p.token_blocks = static_cast<int>(ceil_div(p.sizes.tokens, kTokens));
  p.scale = static_cast<float>(scale), p.token_eps = static_cast<float>(token_eps);
  p.factor = static_cast<float>(factor);
  return p;
}

template <class Tensor>
void weights(const Tensor& q, const Tensor& k, const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
             const Tensor& weights, const Tensor& sums, double scale, double token_eps, double factor,
             Arithmetic arithmetic, Stream stream) {
  WeightParams p = weight_params(q, k, bias, mask, weights, scale, token_eps, factor, arithmetic);
  p.weights = data_of<void>(weights);
  p.sums = data_of<float>(sums);
  with_arithmetic(arithmetic, [&](auto* a) { launch_weights<std::remove_pointer_t<decltype(a)>>(p, stream); });
}

// `weights` and `by_logit` are of one size; one of them is there.
template <class Tensor>
void logit_gradients(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& mask, const Tensor& grad, const std::optional<Tensor>& delta,
                     const Tensor& total, const std::optional<Tensor>& factors, const std::optional<Tensor>& weights,
                     const std::optional<Tensor>& by_logit, const std::optional<Tensor>& sums, double scale,
                     double token_eps, double factor, Arithmetic arithmetic, Stream stream) {
  WeightParams p =
      weight_params(q, k, bias, mask, weights.has_value() ? *weights : *by_logit, scale, token_eps, factor, arithmetic);
  p.grad = rows_of(grad, arithmetic), p.v = rows_of(v, arithmetic);
  p.delta = data_of<const float>(delta);
  p.total = data_of<const float>(total);
  p.factors = data_of<const float>(factors);
  p.weights = data_of<void>(weights);
  p.by_logit = data_of<void>(by_logit);
  p.sums = data_of<float>(sums);
  with_arithmetic(arithmetic, [&](auto* a) { launch_logit_gradients<std::remove_pointer_t<decltype(a)>>(p, stream); });
}

// Where there is `partial`, [splits, items * heads * slots, features], a second kernel adds it up.
template <class Tensor>
void gather(const Tensor& weights, const Tensor& tokens, const std::optional<Tensor>& mask,
            const std::optional<Tensor>& factors, const std::optional<Tensor>& sums, const Tensor& out,
            const std::optional<Tensor>& total, const std::optional<Tensor>& partial, int64_t split_tokens,
            double factor, double eps, Arithmetic arithmetic, Stream stream) {
  GatherParams p = {};
  p.sizes = sizes_of(weights, tokens.size(1), tokens.size(2));
  p.mask = mask_of(mask);
  p.weights = data_of<const void>(weights);
  p.tokens = rows_of(tokens, arithmetic);
  p.factors = data_of<const float>(factors);
  p.sums = data_of<const float>(sums);
  p.out = data_of<void>(out);
  p.out_item = out.stride(0), p.out_head = out.stride(1), p.out_slot = out.stride(2), p.out_feature = out.stride(3);
  p.total = data_of<float>(total);
  p.partial = data_of<float>(partial);
  p.token_blocks = static_cast<int>(ceil_div(p.sizes.tokens, kTokens));
  p.feature_blocks = static_cast<int>(p.tokens.features > 0 ? ceil_div(p.tokens.features, kFeatures) : 1);
  p.splits = partial.has_value() ? static_cast<int>(partial->size(0)) : 1;
  p.split_tokens = partial.has_value() ? static_cast<int>(split_tokens) : p.sizes.tokens;
  p.factor = static_cast<float>(factor), p.eps = static_cast<float>(eps);
  with_arithmetic(arithmetic, [&](auto* a) { launch_gather<std::remove_pointer_t<decltype(a)>>(p, stream); });
}

template <class Tensor>
void spread(const Tensor& weights, const Tensor& slots, const std::optional<Tensor>& mask,
            const std::optional<Tensor>& factors, const Tensor& out, double factor, Arithmetic arithmetic,
            Stream stream) {
  SpreadParams p = {};
  p.sizes = sizes_of(weights, out.size(1), out.size(2));
  p.mask = mask_of(mask);
  p.weights = data_of<const void>(weights);
  p.slots = rows_of(slots, arithmetic);
  p.factors = data_of<const float>(factors);
  p.out = data_of<void>(out);
  p.token_blocks = static_cast<int>(ceil_div(p.sizes.tokens, kTokens));
  p.feature_blocks = static_cast<int>(ceil_div(p.slots.features, kFeatures));
  p.factor = static_cast<float>(factor);
  with_arithmetic(arithmetic, [&](auto* a) { launch_spread<std::remove_pointer_t<decltype(a)>>(p, stream); });
}

}  // namespace setemb::cuda::slots
