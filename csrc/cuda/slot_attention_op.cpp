// The kernels of slot_attention as torch calls them. Sizes and dtypes are those that cuda.py allocates.
#include "ops.h"
#include "slot_attention_call.h"

namespace setemb::cuda::slots {
namespace {

using Optional = std::optional<Tensor>;

void op_weights(const Tensor& q, const Tensor& k, const Optional& bias, const Optional& mask, const Tensor& weights,
                const Tensor& sums, double scale, double token_eps, double factor, int64_t arithmetic) {
  const OnDeviceOf device(q);
  slots::weights(q, k, bias, mask, weights, sums, scale, token_eps, factor, static_cast<Arithmetic>(arithmetic),
                 device.stream());
}

void op_logit_gradients(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& mask,
                        const Tensor& grad, const Optional& delta, const Tensor& total, const Optional& factors,
                        const Optional& weights, const Optional& by_logit, const Optional& sums, double scale,
                        double token_eps, double factor, int64_t arithmetic) {
  const OnDeviceOf device(q);
  slots::logit_gradients(q, k, v, bias, mask, grad, delta, total, factors, weights, by_logit, sums, scale, token_eps,
                         factor, static_cast<Arithmetic>(arithmetic), device.stream());
}

void op_gather(const Tensor& weights, const Tensor& tokens, const Optional& mask, const Optional& factors,
               const Optional& sums, const Tensor& out, const Optional& total, const Optional& partial,
               int64_t split_tokens, double factor, double eps, int64_t arithmetic) {
  const OnDeviceOf device(weights);
  slots::gather(weights, tokens, mask, factors, sums, out, total, partial, split_tokens, factor, eps,
                static_cast<Arithmetic>(arithmetic), device.stream());
}

void op_spread(const Tensor& weights, const Tensor& slots, const Optional& mask, const Optional& factors,
               const Tensor& out, double factor, int64_t arithmetic) {
  const OnDeviceOf device(weights);
  slots::spread(weights, slots, mask, factors, out, factor, static_cast<Arithmetic>(arithmetic), device.stream());
}

}  // namespace
}  // namespace setemb::cuda::slots

namespace setemb::cuda {

void define_slot_attention(StableLibrary& library) {
  library.def(
      "slot_attention_weights(Tensor q, Tensor k, Tensor? bias, Tensor? mask, Tensor(a!) weights, Tensor(b!) sums,"
      " float scale, float token_eps, float factor, int arithmetic) -> ()");
  library.def(
      "slot_attention_logit_gradients(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor grad,"
      " Tensor? delta, Tensor total, Tensor? factors, Tensor(a!)? weights, Tensor(b!)? by_logit, Tensor(c!)? sums,"
      " float scale, float token_eps, float factor, int arithmetic) -> ()");
  library.def(
      "slot_attention_gather(Tensor weights, Tensor tokens, Tensor? mask, Tensor? factors, Tensor? sums,"
      " Tensor(a!) out, Tensor(b!)? total, Tensor(c!)? partial, int split_tokens, float factor, float eps, int "
      "arithmetic)"
      " -> ()");
  library.def(
      "slot_attention_spread(Tensor weights, Tensor slots, Tensor? mask, Tensor? factors, Tensor(a!) out,"
      " float factor, int arithmetic) -> ()");
}

void register_slot_attention(StableLibrary& library) {
  library.impl("slot_attention_weights", TORCH_BOX(&slots::op_weights));
  library.impl("slot_attention_logit_gradients", TORCH_BOX(&slots::op_logit_gradients));
  library.impl("slot_attention_gather", TORCH_BOX(&slots::op_gather));
  library.impl("slot_attention_spread", TORCH_BOX(&slots::op_spread));
}

}  // namespace setemb::cuda
