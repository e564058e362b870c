// The kernels of smooth_chamfer as torch calls them. Sizes and dtypes are those that cuda.py allocates.
#include "ops.h"
#include "smooth_chamfer_call.h"

namespace setemb::cuda {
namespace {

using Optional = std::optional<Tensor>;

void op_pack(const Tensor& v, const Optional& mask, const Tensor& rows, const Tensor& valid, const Tensor& stats,
             int64_t slots, int64_t arithmetic) {
  const OnDeviceOf device(v);
  pack(v, mask, rows, valid, stats, slots, static_cast<Arithmetic>(arithmetic), device.stream());
}

void op_forward(const Tensor& x_rows, const Tensor& x_valid, const Tensor& x_stats, const Tensor& y_rows,
                const Tensor& y_valid, const Tensor& y_stats, const Tensor& out, double alpha,
                const Optional& device_alpha, int64_t x_slots, int64_t y_slots, int64_t arithmetic, bool wide) {
  const OnDeviceOf device(x_rows);
  forward(x_rows, x_valid, x_stats, y_rows, y_valid, y_stats, out, alpha, device_alpha, x_slots, y_slots,
          static_cast<Arithmetic>(arithmetic), wide, device.stream());
}

void op_hardest(const Tensor& x_rows, const Tensor& x_valid, const Tensor& x_stats, const Tensor& y_rows,
                const Tensor& y_valid, const Tensor& y_stats, const Optional& x_ids, const Optional& y_ids,
                const Tensor& x_best, const Tensor& y_best, double alpha, const Optional& device_alpha, int64_t x_slots,
                int64_t y_slots, int64_t arithmetic) {
  const OnDeviceOf device(x_rows);
  hardest(x_rows, x_valid, x_stats, y_rows, y_valid, y_stats, x_ids, y_ids, x_best, y_best, alpha, device_alpha,
          x_slots, y_slots, static_cast<Arithmetic>(arithmetic), device.stream());
}

void op_weights(const Tensor& x_rows, const Tensor& x_valid, const Tensor& x_stats, const Tensor& y_rows,
                const Tensor& y_valid, const Tensor& y_stats, const Tensor& grad, const Tensor& exponents,
                const Optional& chunk, const Optional& alpha_parts, double alpha, const Optional& device_alpha,
                int64_t x_slots, int64_t y_slots, int64_t x_first, int64_t y_first, int64_t x_groups, int64_t y_groups,
                int64_t arithmetic, bool wide) {
  const OnDeviceOf device(x_rows);
  weights(x_rows, x_valid, x_stats, y_rows, y_valid, y_stats, grad, exponents, chunk, alpha_parts, alpha, device_alpha,
          x_slots, y_slots, x_first, y_first, x_groups, y_groups, static_cast<Arithmetic>(arithmetic), wide,
          device.stream());
}

void op_unpack(const Tensor& sums, const Optional& mask, const Tensor& stats, const Tensor& exponents,
               const Tensor& out, int64_t groups, int64_t first, int64_t last, int64_t slots, int64_t arithmetic) {
  const OnDeviceOf device(sums);
  unpack(sums, mask, stats, exponents, out, groups, first, last, slots, static_cast<Arithmetic>(arithmetic),
         device.stream());
}

}  // namespace

void define_smooth_chamfer(StableLibrary& library) {
  library.def(
      "smooth_chamfer_pack(Tensor v, Tensor? mask, Tensor(a!) rows, Tensor(b!) valid, Tensor(c!) stats, int slots,"
      " int arithmetic) -> ()");
  library.def(
      "smooth_chamfer_forward(Tensor x_rows, Tensor x_valid, Tensor x_stats, Tensor y_rows, Tensor y_valid,"
      " Tensor y_stats, Tensor(a!) out, float alpha, Tensor? device_alpha, int x_slots, int y_slots, int arithmetic,"
      " bool wide) -> ()");
  library.def(
      "smooth_chamfer_hardest(Tensor x_rows, Tensor x_valid, Tensor x_stats, Tensor y_rows, Tensor y_valid,"
      " Tensor y_stats, Tensor? x_ids, Tensor? y_ids, Tensor(a!) x_best, Tensor(b!) y_best, float alpha,"
      " Tensor? device_alpha, int x_slots, int y_slots, int arithmetic) -> ()");
  library.def(
      "smooth_chamfer_weights(Tensor x_rows, Tensor x_valid, Tensor x_stats, Tensor y_rows, Tensor y_valid,"
      " Tensor y_stats, Tensor grad, Tensor exponents, Tensor(a!)? chunk, Tensor(b!)? alpha_parts, float alpha,"
      " Tensor? device_alpha, int x_slots, int y_slots, int x_first, int y_first, int x_groups, int y_groups,"
      " int arithmetic, bool wide) -> ()");
  library.def(
      "smooth_chamfer_unpack(Tensor sums, Tensor? mask, Tensor stats, Tensor exponents, Tensor(a!) out, int groups,"
      " int first, int last, int slots, int arithmetic) -> ()");
}

void register_smooth_chamfer(StableLibrary& library) {
  library.impl("smooth_chamfer_pack", TORCH_BOX(&op_pack));
  library.impl("smooth_chamfer_forward", TORCH_BOX(&op_forward));
  library.impl("smooth_chamfer_hardest", TORCH_BOX(&op_hardest));
  library.impl("smooth_chamfer_weights", TORCH_BOX(&op_weights));
  library.impl("smooth_chamfer_unpack", TORCH_BOX(&op_unpack));
}

}  // namespace setemb::cuda
