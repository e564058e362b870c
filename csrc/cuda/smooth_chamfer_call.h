// From tensors to the arguments of kernels. A template of the tensor's type: torch's stable one in the binding, a
// plain view in the emulator, so that both run this code. Tensors were allocated by
// setemb_kernels/ops/smooth_chamfer/cuda.py, which checked sizes and dtypes.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>

#include "smooth_chamfer.h"

namespace setemb::cuda {

template <class T, class Tensor>
T* data_of(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(static_cast<const void*>(t.data_ptr())));
}
template <class T, class Tensor>
T* data_of(const std::optional<Tensor>& t) {
  return t.has_value() ? data_of<T>(*t) : nullptr;
}

// sets, of one array after the other: weights and exponents [sets], peaks [groups]
struct Stats {
  float *weight, *exponent, *peak;
};
template <class Tensor>
Stats stats_of(const Tensor& stats, int64_t groups, int slots) {
  float* first = data_of<float>(stats);
  const int64_t sets = groups * (kGroup / slots);
  return {first, first + sets, first + 2 * sets};
}

// A packed operand as cuda.py keeps it: rows [groups * 64, features], valid [groups, 2], stats [2 * sets + groups].
template <class Tensor>
Operand operand_of(const Tensor& rows, const Tensor& valid, const Tensor& stats, int64_t sets, int slots) {
  const int64_t groups = rows.size(0) / kGroup;
  const Stats s = stats_of(stats, groups, slots);
  return {data_of<const void>(rows), data_of<const uint32_t>(valid), s.weight, s.exponent, s.peak, sets,
          static_cast<int>(groups)};
}

inline int ceil_log2(int64_t v) {
  int e = 0;
  while ((int64_t{1} << e) < v) ++e;
  return e;
}

template <class Tensor>
void pack(const Tensor& v, const std::optional<Tensor>& mask, const Tensor& rows, const Tensor& valid,
          const Tensor& stats, int64_t slots, Arithmetic arithmetic, Stream stream) {
  const int64_t groups = rows.size(0) / kGroup;
  const Stats s = stats_of(stats, groups, static_cast<int>(slots));
  PackParams p = {};
  p.v = data_of<const void>(v);
  p.mask = data_of<const uint8_t>(mask);
  p.packed = data_of<void>(rows);
  p.valid = data_of<uint32_t>(valid);
  p.weight = s.weight, p.exponent = s.exponent, p.peak = s.peak;
  p.stride_n = v.stride(0), p.stride_k = v.stride(1), p.stride_d = v.stride(2);
  if (mask.has_value()) p.mask_stride_n = mask->stride(0), p.mask_stride_k = mask->stride(1);
  p.N = v.size(0), p.K = static_cast<int>(v.size(1)), p.D = static_cast<int>(v.size(2));
  p.slots = static_cast<int>(slots), p.features = static_cast<int>(rows.size(1));
  p.largest_exponent = (124 - ceil_log2(rows.size(1))) / 2;
  p.round_to_tf32 = arithmetic == Arithmetic::kTf32;
  const int64_t element = arithmetic == Arithmetic::kBFloat16 || arithmetic == Arithmetic::kFloat16 ? 2 : 4;
  p.by_four = p.stride_d == 1 && p.D % 4 == 0 && p.stride_n % 4 == 0 && p.stride_k % 4 == 0 &&
              reinterpret_cast<std::uintptr_t>(p.v) % (4 * element) == 0;
  launch_pack(arithmetic, p, groups, stream);
}

template <class Tensor>
void unpack(const Tensor& sums, const std::optional<Tensor>& mask, const Tensor& stats, const Tensor& exponents,
            const Tensor& out, int64_t groups, int64_t first, int64_t last, int64_t slots, Arithmetic arithmetic,
            Stream stream) {
  UnpackParams p = {};
  p.sums = data_of<const float>(sums);
  p.mask = data_of<const uint8_t>(mask);
  p.exponent = stats_of(stats, groups, static_cast<int>(slots)).exponent;
  p.shift = data_of<const int32_t>(exponents);
  p.out = data_of<void>(out);
  if (mask.has_value()) p.mask_stride_n = mask->stride(0), p.mask_stride_k = mask->stride(1);
  p.N = out.size(0), p.first = first, p.last = last;
  p.K = static_cast<int>(out.size(1)), p.D = static_cast<int>(out.size(2));
  p.slots = static_cast<int>(slots), p.features = static_cast<int>(sums.size(1));
  launch_unpack(arithmetic, p, stream);
}

template <class Tensor>
TileParams tile_params(const Tensor& x_rows, const Tensor& x_valid, const Tensor& x_stats, const Tensor& y_rows,
                       const Tensor& y_valid, const Tensor& y_stats, int64_t N, int64_t M, double alpha,
                       const std::optional<Tensor>& device_alpha, int64_t x_slots, int64_t y_slots) {
  constexpr double kMost = std::numeric_limits<float>::max();
  return {operand_of(x_rows, x_valid, x_stats, N, static_cast<int>(x_slots)),
          operand_of(y_rows, y_valid, y_stats, M, static_cast<int>(y_slots)), static_cast<int>(x_rows.size(1)),
          static_cast<float>(alpha < kMost ? alpha : kMost), data_of<const float>(device_alpha)};
}

template <class Tensor>
void forward(const Tensor& x_rows, const Tensor& x_valid, const Tensor& x_stats, const Tensor& y_rows,
             const Tensor& y_valid, const Tensor& y_stats, const Tensor& out, double alpha,
             const std::optional<Tensor>& device_alpha, int64_t x_slots, int64_t y_slots, Arithmetic arithmetic,
             bool wide, Stream stream) {
  const ForwardParams p = {tile_params(x_rows, x_valid, x_stats, y_rows, y_valid, y_stats, out.size(0), out.size(1),
                                       alpha, device_alpha, x_slots, y_slots),
                           data_of<void>(out), out.stride(0), out.stride(1), wide};
  with_arithmetic(arithmetic, [&](auto* a) {
    launch_forward<std::remove_pointer_t<decltype(a)>>(p, static_cast<int>(x_slots), static_cast<int>(y_slots), stream);
  });
}

template <class Tensor>
void hardest(const Tensor& x_rows, const Tensor& x_valid, const Tensor& x_stats, const Tensor& y_rows,
             const Tensor& y_valid, const Tensor& y_stats, const std::optional<Tensor>& x_ids,
             const std::optional<Tensor>& y_ids, const Tensor& x_best, const Tensor& y_best, double alpha,
             const std::optional<Tensor>& device_alpha, int64_t x_slots, int64_t y_slots, Arithmetic arithmetic,
             Stream stream) {
  TileParams tile = tile_params(x_rows, x_valid, x_stats, y_rows, y_valid, y_stats, x_best.size(0), y_best.size(0),
                                alpha, device_alpha, x_slots, y_slots);
  const HardestParams p = {tile, data_of<const int64_t>(x_ids), data_of<const int64_t>(y_ids),
                           data_of<uint64_t>(x_best), data_of<uint64_t>(y_best)};
  with_arithmetic(arithmetic, [&](auto* a) {
    launch_hardest<std::remove_pointer_t<decltype(a)>>(p, static_cast<int>(x_slots), static_cast<int>(y_slots), stream);
  });
}

template <class Tensor>
void weights(const Tensor& x_rows, const Tensor& x_valid, const Tensor& x_stats, const Tensor& y_rows,
             const Tensor& y_valid, const Tensor& y_stats, const Tensor& grad, const Tensor& exponents,
             const std::optional<Tensor>& chunk, const std::optional<Tensor>& alpha_parts, double alpha,
             const std::optional<Tensor>& device_alpha, int64_t x_slots, int64_t y_slots, int64_t x_first,
             int64_t y_first, int64_t x_groups, int64_t y_groups, Arithmetic arithmetic, bool wide, Stream stream) {
  WeightParams p = {};
  p.tile = tile_params(x_rows, x_valid, x_stats, y_rows, y_valid, y_stats, grad.size(0), grad.size(1), alpha,
                       device_alpha, x_slots, y_slots);
  p.grad = data_of<const void>(grad);
  p.stride_n = grad.stride(0), p.stride_m = grad.stride(1), p.wide = wide;
  p.exponents = data_of<const int32_t>(exponents);
  p.chunk = data_of<void>(chunk);
  p.alpha_parts = data_of<float>(alpha_parts);
  p.x_first = static_cast<int>(x_first), p.y_first = static_cast<int>(y_first);
  p.x_groups = static_cast<int>(x_groups), p.y_groups = static_cast<int>(y_groups);
  with_arithmetic(arithmetic, [&](auto* a) {
    using A = std::remove_pointer_t<decltype(a)>;
    const auto launch = x_slots > kFewSlots ? launch_weights<A, true> : launch_weights<A, false>;
    launch(p, static_cast<int>(x_slots), static_cast<int>(y_slots), stream);
  });
}

}  // namespace setemb::cuda
