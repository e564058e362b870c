// Of the emulator (see emulator.h): numbers of 16 bits, and functions that are not exact on a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace setemb::cuda::emulator {

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// --- numbers

inline float float_of_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const int exponent = h >> 10 & 31;
  const uint32_t mantissa = h & 1023;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {
    const float tiny = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -tiny : tiny;
  }
  return bit_cast<float>(sign | static_cast<uint32_t>(exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t half_of(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (std::isnan(v)) return 0x7fff;
  const float magnitude = std::fabs(v);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

inline uint16_t bfloat16_of(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if (std::isnan(v)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t tf32_of(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if (!std::isfinite(v)) return bits;
  return (bits + 0x1000) & 0xffffe000;
}

// v (1 + error), the error anything within [-bound, bound] but always the same for the same v.
inline double perturbed(double v, float argument, double bound) {
  uint32_t hash = bit_cast<uint32_t>(argument) * 2654435761u;
  hash ^= hash >> 15;
  hash *= 2246822519u;
  hash ^= hash >> 13;
  return v + bound * (static_cast<double>(hash) / 2147483648.0 - 1.0);
}

inline float flush(double v) {
  const float f = static_cast<float>(v);
  return std::fabs(f) < 0x1p-126f ? std::copysign(0.0f, f) : f;
}

inline float exp2_fast(float v) {
  const double exact = std::exp2(static_cast<double>(v));
  if (v == 0 || !std::isfinite(v)) return static_cast<float>(exact);
  return flush(perturbed(exact, v, exact * 0x1p-22));
}

inline float log2_fast(float v) {
  if (std::fabs(v) < 0x1p-126f) return -INFINITY;
  const double exact = std::log2(static_cast<double>(v));
  if (v == 1 || !std::isfinite(exact)) return static_cast<float>(exact);
  return static_cast<float>(perturbed(exact, v, v > 0.5f && v < 2 ? 0x1p-22 : std::fabs(exact) * 0x1p-22));
}

inline float reciprocal_fast(float v) {
  const double exact = 1.0 / flush(v);
  if (!std::isfinite(exact)) return static_cast<float>(exact);
  return flush(perturbed(exact, v, exact * 0x1p-23));
}

}  // namespace setemb::cuda::emulator
