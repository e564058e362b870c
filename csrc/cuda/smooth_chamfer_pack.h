// Into packed order and back. A block of threads handles one group of 64 rows, a warp some of them one after another.
#pragma once

#include "smooth_chamfer.h"
#include "warp.h"

namespace setemb::cuda {

constexpr float kInfinity = __builtin_inff();

// 2^e, exactly, for e within [-126, 127].
SETEMB_DEVICE float power_of_two(int e) {
  e = e < -126 ? -126 : e > 127 ? 127 : e;
  return float_of(static_cast<uint32_t>(e + 127) << 23);
}

// v 2^e in two steps, as 2^e alone may not be representable.
SETEMB_DEVICE float times_power(float v, int e) {
  const int half = e >> 1;
  return v * power_of_two(half) * power_of_two(e - half);
}

// Of all lanes of a warp.
SETEMB_DEVICE float warp_sum(float v) {
  for (int lanes = 16; lanes; lanes /= 2) v += shuffle_xor(v, lanes);
  return v;
}
SETEMB_DEVICE uint32_t warp_max(uint32_t v) {
  for (int lanes = 16; lanes; lanes /= 2) {
    const uint32_t other = shuffle_xor(v, lanes);
    v = other > v ? other : v;
  }
  return v;
}

SETEMB_DEVICE bool is_valid(const uint8_t* mask, int64_t stride_n, int64_t stride_k, int64_t n, int k, int64_t N,
                            int K) {
  return n < N && k < K && (mask == nullptr || load(mask + n * stride_n + k * stride_k) != 0);
}

// Neighbours that a thread takes at once, where memory lets it.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

constexpr int kPackShared = 3 * kGroup * 4;
constexpr int kPackWarps = kPackThreads / kWarp;

template <class T>
SETEMB_KERNEL(kPackThreads, 1)
pack_kernel(PackParams p) {
  const int thread = thread_index(), lane = lane_index();
  auto* largest = reinterpret_cast<uint32_t*>(shared_memory());  // [64] bits of the largest |v| of a row
  auto* square = reinterpret_cast<float*>(largest + kGroup);     // [64]
  auto* row_valid = largest + 2 * kGroup;                        // [64]
  const int in_group = kGroup / p.slots;                         // sets
  const int64_t first = static_cast<int64_t>(block_index()) * in_group;
  const int64_t first_row = static_cast<int64_t>(block_index()) * kGroup;

  if (thread < kGroup) {
    const bool valid =
        is_valid(p.mask, p.mask_stride_n, p.mask_stride_k, first + thread % in_group, thread / in_group, p.N, p.K);
    store(row_valid + thread, static_cast<uint32_t>(valid));
    const uint32_t word = vote(valid);
    if (lane == 0) store(p.valid + 2 * block_index() + thread / kWarp, word);
  }
  sync_threads();

  const T* v = static_cast<const T*>(p.v);
  SETEMB_NO_UNROLL
  for (int row = warp_index(); row < kGroup; row += kPackWarps) {
    uint32_t top = 0;
    if (load(row_valid + row)) {
      const T* source = v + (first + row % in_group) * p.stride_n + row / in_group * p.stride_k;
      const auto raise = [&](T value) {
        const uint32_t bits = bits_of(to_float(value)) & 0x7fffffffu;
        top = bits > top ? bits : top;
      };
      if (p.by_four) {
        for (int d = 4 * lane; d < p.D; d += 4 * kWarp) {
          const Four<T> values = load(reinterpret_cast<const Four<T>*>(source + d));
          SETEMB_UNROLL
          for (int i = 0; i < 4; ++i) raise(values.v[i]);
        }
      } else {
        for (int d = lane; d < p.D; d += kWarp) raise(load(source + d * p.stride_d));
      }
    }
    top = warp_max(top);
    if (lane == 0) store(largest + row, top);
  }
  sync_threads();

  // of the set that this row is of; NaN and infinity are not scaled
  const auto exponent_of = [&](int row) {
    uint32_t top = 0;
    for (int k = 0; k < p.slots; ++k) {
      const uint32_t bits = load(largest + k * in_group + row % in_group);
      top = bits > top ? bits : top;
    }
    const int excess = static_cast<int>(top >> 23) - 126 - p.largest_exponent;
    return top >= 0x7f800000u || excess < 0 ? 0 : excess;
  };
  SETEMB_NO_UNROLL
  for (int row = warp_index(); row < kGroup; row += kPackWarps) {
    const bool valid = load(row_valid + row) != 0;
    const float factor = power_of_two(-exponent_of(row));
    const T* source = v + (first + row % in_group) * p.stride_n + row / in_group * p.stride_k;
    T* target = static_cast<T*>(p.packed) + (first_row + row) * p.features;
    float sum = 0;
    const auto packed = [&](T v) {
      float value = to_float(v) * factor;
      sum += value * value;
      if (sizeof(T) == 4 && p.round_to_tf32) value = float_of(to_tf32(value));
      return from_float<T>(value);
    };
    const T zero = from_float<T>(0.0f);
    if (p.by_four) {
      for (int d = 4 * lane; d < p.features; d += 4 * kWarp) {
        Four<T> values = {{zero, zero, zero, zero}};
        if (valid && d < p.D) {
          values = load(reinterpret_cast<const Four<T>*>(source + d));
          SETEMB_UNROLL
          for (int i = 0; i < 4; ++i) values.v[i] = packed(values.v[i]);
        }
        store(reinterpret_cast<Four<T>*>(target + d), values);
      }
    } else {
      for (int d = lane; d < p.features; d += kWarp) {
        store(target + d, valid && d < p.D ? packed(load(source + d * p.stride_d)) : zero);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) store(square + row, sum);
  }
  sync_threads();

  if (thread < kWarp) {
    float peak = 0;
    for (int n = lane; n < in_group; n += kWarp) {
      float sum = 0, longest = 0;
      int count = 0;
      for (int k = 0; k < p.slots; ++k) {
        const float value = load(square + k * in_group + n);
        sum += value;
        longest = value > longest ? value : longest;
        count += static_cast<int>(load(row_valid + k * in_group + n));
      }
      const int exponent = exponent_of(n);
      const bool finite = sum < kInfinity;  // false for NaN
      const float weight = count > 0 ? 0.5f / static_cast<float>(count) : 0.0f;
      store(p.weight + first + n, finite ? weight : kInfinity - kInfinity);
      store(p.exponent + first + n, static_cast<float>(exponent));
      if (!finite || exponent > 0) longest = kInfinity;
      peak = longest > peak ? longest : peak;
    }
    // an upper bound, though squares and (tf32) packed numbers are rounded; as bits, positive floats are in order
    peak = float_of(warp_max(bits_of(peak)));
    if (lane == 0) store(p.peak + block_index(), sqrtf(peak) * 1.001f);
  }
}

// Gradients out of range become infinite, as of any other op.
template <class T>
SETEMB_KERNEL(kPackThreads, 1)
unpack_kernel(UnpackParams p) {
  const int lane = lane_index();
  const int in_group = kGroup / p.slots;
  const int64_t first = p.first + static_cast<int64_t>(block_index()) * in_group;
  const int64_t first_row = static_cast<int64_t>(block_index()) * kGroup;
  const int shift = load(p.shift + 1) - kWeightExponent;
  SETEMB_NO_UNROLL
  for (int row = warp_index(); row < kGroup; row += kPackWarps) {
    const int64_t n = first + row % in_group;
    const int k = row / in_group;
    if (n >= p.last || k >= p.K) continue;
    const bool valid = is_valid(p.mask, p.mask_stride_n, p.mask_stride_k, n, k, p.N, p.K);
    const int e = shift - static_cast<int>(load(p.exponent + n));
    const float* source = p.sums + (first_row + row) * p.features;
    T* target = static_cast<T*>(p.out) + (n * p.K + k) * p.D;
    const auto gradient = [&](float sum) { return from_float<T>(valid ? times_power(sum, e) : 0.0f); };
    if (p.D % 4 == 0) {
      for (int d = 4 * lane; d < p.D; d += 4 * kWarp) {
        const Four<float> sums = load(reinterpret_cast<const Four<float>*>(source + d));
        Four<T> values;
        SETEMB_UNROLL
        for (int i = 0; i < 4; ++i) values.v[i] = gradient(sums.v[i]);
        store(reinterpret_cast<Four<T>*>(target + d), values);
      }
    } else {
      for (int d = lane; d < p.D; d += kWarp) store(target + d, gradient(load(source + d)));
    }
  }
}

}  // namespace setemb::cuda
