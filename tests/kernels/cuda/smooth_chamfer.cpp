// The kernels of smooth_chamfer, in the emulator.
#include "smooth_chamfer_call.h"
#include "smooth_chamfer_launch.h"
#include "smooth_chamfer_pack_launch.h"
#include "tensors.h"

using namespace setemb::cuda;

extern "C" {

int smooth_chamfer_pack(const View* v, const View* mask, const View* rows, const View* valid, const View* stats,
                        int64_t slots, int64_t arithmetic, char* message, size_t size) {
  return emulator_guarded(message, size, [&] {
    pack(*v, optional_view(mask), *rows, *valid, *stats, slots, static_cast<Arithmetic>(arithmetic), nullptr);
  });
}

int smooth_chamfer_unpack(const View* sums, const View* mask, const View* stats, const View* exponents, const View* out,
                          int64_t groups, int64_t first, int64_t last, int64_t slots, int64_t arithmetic, char* message,
                          size_t size) {
  return emulator_guarded(message, size, [&] {
    unpack(*sums, optional_view(mask), *stats, *exponents, *out, groups, first, last, slots,
           static_cast<Arithmetic>(arithmetic), nullptr);
  });
}

int smooth_chamfer_forward(const View* x_rows, const View* x_valid, const View* x_stats, const View* y_rows,
                           const View* y_valid, const View* y_stats, const View* out, double alpha,
                           const View* device_alpha, int64_t x_slots, int64_t y_slots, int64_t arithmetic, int64_t wide,
                           char* message, size_t size) {
  return emulator_guarded(message, size, [&] {
    forward(*x_rows, *x_valid, *x_stats, *y_rows, *y_valid, *y_stats, *out, alpha, optional_view(device_alpha), x_slots,
            y_slots, static_cast<Arithmetic>(arithmetic), wide != 0, nullptr);
  });
}

int smooth_chamfer_hardest(const View* x_rows, const View* x_valid, const View* x_stats, const View* y_rows,
                           const View* y_valid, const View* y_stats, const View* x_ids, const View* y_ids,
                           const View* x_best, const View* y_best, double alpha, const View* device_alpha,
                           int64_t x_slots, int64_t y_slots, int64_t arithmetic, char* message, size_t size) {
  return emulator_guarded(message, size, [&] {
    hardest(*x_rows, *x_valid, *x_stats, *y_rows, *y_valid, *y_stats, optional_view(x_ids), optional_view(y_ids),
            *x_best, *y_best, alpha, optional_view(device_alpha), x_slots, y_slots, static_cast<Arithmetic>(arithmetic),
            nullptr);
  });
}

int smooth_chamfer_weights(const View* x_rows, const View* x_valid, const View* x_stats, const View* y_rows,
                           const View* y_valid, const View* y_stats, const View* grad, const View* exponents,
                           const View* chunk, const View* alpha_parts, double alpha, const View* device_alpha,
                           int64_t x_slots, int64_t y_slots, int64_t x_first, int64_t y_first, int64_t x_groups,
                           int64_t y_groups, int64_t arithmetic, int64_t wide, char* message, size_t size) {
  return emulator_guarded(message, size, [&] {
    weights(*x_rows, *x_valid, *x_stats, *y_rows, *y_valid, *y_stats, *grad, *exponents, optional_view(chunk),
            optional_view(alpha_parts), alpha, optional_view(device_alpha), x_slots, y_slots, x_first, y_first,
            x_groups, y_groups, static_cast<Arithmetic>(arithmetic), wide != 0, nullptr);
  });
}
}
