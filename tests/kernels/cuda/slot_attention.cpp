// The kernels of slot_attention, in the emulator.
#include "slot_attention_call.h"
#include "slot_attention_launch.h"
#include "tensors.h"

using namespace setemb::cuda::slots;
using setemb::cuda::Arithmetic;

extern "C" {

int slot_attention_weights(const View* q, const View* k, const View* bias, const View* mask, const View* out,
                           const View* sums, double scale, double token_eps, double factor, int64_t arithmetic,
                           char* message, size_t size) {
  return emulator_guarded(message, size, [&] {
    weights(*q, *k, optional_view(bias), optional_view(mask), *out, *sums, scale, token_eps, factor,
            static_cast<Arithmetic>(arithmetic), nullptr);
  });
}

int slot_attention_logit_gradients(const View* q, const View* k, const View* v, const View* bias, const View* mask,
                                   const View* grad, const View* delta, const View* total, const View* factors,
                                   const View* by_value, const View* by_logit, const View* sums, double scale,
                                   double token_eps, double factor, int64_t arithmetic, char* message, size_t size) {
  return emulator_guarded(message, size, [&] {
    logit_gradients(*q, *k, *v, optional_view(bias), optional_view(mask), *grad, optional_view(delta), *total,
                    optional_view(factors), optional_view(by_value), optional_view(by_logit), optional_view(sums),
                    scale, token_eps, factor, static_cast<Arithmetic>(arithmetic), nullptr);
  });
}

int slot_attention_gather(const View* of, const View* tokens, const View* mask, const View* factors, const View* sums,
                          const View* out, const View* total, const View* partial, int64_t split_tokens, double factor,
                          double eps, int64_t arithmetic, char* message, size_t size) {
  return emulator_guarded(message, size, [&] {
    gather(*of, *tokens, optional_view(mask), optional_view(factors), optional_view(sums), *out, optional_view(total),
           optional_view(partial), split_tokens, factor, eps, static_cast<Arithmetic>(arithmetic), nullptr);
  });
}

int slot_attention_spread(const View* of, const View* slots, const View* mask, const View* factors, const View* out,
                          double factor, int64_t arithmetic, char* message, size_t size) {
  return emulator_guarded(message, size, [&] {
    spread(*of, *slots, optional_view(mask), optional_view(factors), *out, factor, static_cast<Arithmetic>(arithmetic),
           nullptr);
  });
}
}
