// Vectors of float and double as wide as the module is compiled for, and the few functions the kernels need on them.
//
// They are the compiler's own vector types (GCC, Clang), so that one source serves SSE2, AVX2, AVX-512 and NEON, needs
// no torch header, and compiles in seconds. at::vec would bring ATen headers, which are outside torch's stable ABI.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512BF16__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace setemb {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
using IntOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec<T> splat(T s) {
  return s - Vec<T>{};
}

// v, which the compiler may not look into: a product that is added to something afterwards is rounded first, as it is
// where no multiply-add can take its place.
template <class T>
inline Vec<T> opaque(Vec<T> v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

// These keep a NaN in `a`: every comparison with it is false.
template <class T>
inline Vec<T> at_most(Vec<T> a, Vec<T> limit) {
  return a > limit ? limit : a;
}

template <class T>
inline Vec<T> at_least(Vec<T> a, Vec<T> limit) {
  return a < limit ? limit : a;
}

// IEEE layout of T.
template <class T>
struct Format;

template <>
struct Format<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr int bias = 127;
  static constexpr float largest = 3.40282347e38f;
  static constexpr float round_to_integer = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
};

template <>
struct Format<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr int bias = 1023;
  static constexpr double largest = 1.7976931348623157e308;
  static constexpr double round_to_integer = 0x1.8p52;
};

// 2^t for |t| < bias - 1; the caller keeps t in range. Relative error below 1 ulp (float), 2 ulp (double). t = -bias
// gives 0, NaN gives NaN, whatever its payload.
template <class T>
inline Vec<T> exp2_in_range(Vec<T> t) {
  using F = Format<T>;
  using VI = Vec<IntOf<T>>;
  constexpr T round_and_bias = F::round_to_integer + F::bias;
  const Vec<T> shifted = t + round_and_bias;
  const Vec<T> f = t - (shifted - round_and_bias);
  Vec<T> p;
  if constexpr (sizeof(T) == 4) {
    // minimax of 2^f on [-1/2, 1/2] in relative error: 2e-9
    p = splat<T>(1.5345812003759e-4f);
    p = p * f + 1.33999312191502e-3f;
    p = p * f + 9.61848895710891e-3f;
    p = p * f + 5.55032877696558e-2f;
    p = p * f + 2.40226468906343e-1f;
    p = p * f + 6.93147205737267e-1f;
    p = p * f + 1.0f;
  } else {
    constexpr double ln2 = 0.6931471805599453;
    const Vec<T> g = f * ln2;  // |g| < 0.347: the Taylor series to degree 13 is exact to 5e-18
    p = splat<T>(1.0 / 6227020800.0);
    p = p * g + 1.0 / 479001600.0;
    p = p * g + 1.0 / 39916800.0;
    p = p * g + 1.0 / 3628800.0;
    p = p * g + 1.0 / 362880.0;
    p = p * g + 1.0 / 40320.0;
    p = p * g + 1.0 / 5040.0;
    p = p * g + 1.0 / 720.0;
    p = p * g + 1.0 / 120.0;
    p = p * g + 1.0 / 24.0;
    p = p * g + 1.0 / 6.0;
    p = p * g + 0.5;
    p = p * g + 1.0;
    p = p * g + 1.0;
  }
  // the low bits of `shifted` hold the integer part + bias: as an exponent they are the power of two. A product, not a
  // sum of exponents, as p is NaN where t is
  return p * reinterpret_cast<Vec<T>>(reinterpret_cast<VI>(shifted) << F::mantissa_bits);
}

// The logarithm of a product of many positive normal numbers: exponents add up as integers, mantissas multiply, and one
// logarithm at the end serves them all.
template <class T>
struct LogProduct {
  using V = Vec<T>;
  using VI = Vec<IntOf<T>>;
  static constexpr IntOf<T> mantissa_mask = (IntOf<T>{1} << Format<T>::mantissa_bits) - 1;
  static constexpr IntOf<T> one_bits = IntOf<T>{Format<T>::bias} << Format<T>::mantissa_bits;

  V mantissa = splat<T>(1);
  VI exponent = VI{};
  int factors = 0;

  void multiply(V v) {
    const VI bits = reinterpret_cast<VI>(v);
    exponent += (bits - one_bits) >> Format<T>::mantissa_bits;
    mantissa *= reinterpret_cast<V>((bits & mantissa_mask) | one_bits);  // in [1, 2)
    if (++factors == 100) normalise();
  }

  void normalise() {
    const VI bits = reinterpret_cast<VI>(mantissa);
    exponent += (bits - one_bits) >> Format<T>::mantissa_bits;
    mantissa = reinterpret_cast<V>((bits & mantissa_mask) | one_bits);
    factors = 0;
  }

  V log2() {
    normalise();
    // mantissa to [2/3, 4/3), then log(m) = 2 artanh(s), s = (m - 1) / (m + 1), |s| <= 1/5
    const VI high = mantissa > splat<T>(T(4) / 3);
    mantissa = high ? mantissa * T(0.5) : mantissa;
    exponent -= high;  // a true lane is -1
    const V s = (mantissa - 1) / (mantissa + 1);
    const V z = s * s;
    constexpr int last = sizeof(T) == 4 ? 11 : 23;  // next term below 2 / (last + 2) * 0.2^(last + 2): 1e-10, 6e-20
    V series = splat<T>(T(1) / last);
    for (int n = last - 2; n > 0; n -= 2) series = series * z + T(1) / n;
    constexpr T two_over_ln2 = T(2.8853900817779268);
    return __builtin_convertvector(exponent, V) + s * series * two_over_ln2;
  }
};

// 16-bit types as bits
struct bfloat16_t {
  uint16_t bits;
};
struct float16_t {
  uint16_t bits;
};

// 8 bits: a sign, four of exponent, three of mantissa; no infinity (torch's float8_e4m3fn)
struct float8_t {
  uint8_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(int8_t v) { return v; }
inline double to_float(double v) { return v; }

inline float to_float(bfloat16_t v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Shifted into place the exponent is 120 too small; multiplying repairs it, for subnormal numbers too.
inline float to_float(float8_t v) {
  const uint32_t sign = uint32_t{v.bits & 0x80u} << 24, magnitude = v.bits & 0x7fu;
  uint32_t bits = magnitude << 20;
  float f;
  std::memcpy(&f, &bits, 4);
  f *= 0x1p120f;
  std::memcpy(&bits, &f, 4);
  bits = (magnitude == 0x7fu ? 0x7fc00000u : bits) | sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float to_float(float16_t v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude << 13);  // inf, NaN
  } else {
    // shifted into place the exponent is 112 too small; multiplying repairs it, for subnormal numbers too
    bits = magnitude << 13;
    float f;
    std::memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

// The largest finite value of T, in the type it is computed in.
template <class T>
inline constexpr auto kLargest = Format<T>::largest;
template <>
inline constexpr float kLargest<bfloat16_t> = 0x1.fep127f;
template <>
inline constexpr float kLargest<float16_t> = 65504.f;

// Rounded to nearest even; what is out of range becomes infinite, NaN stays.
template <class Out, class T>
inline Out round_to(T f) {
  if constexpr (std::is_floating_point_v<Out>) {
    return f;
  } else {
    uint32_t bits;
    if constexpr (std::is_same_v<Out, bfloat16_t>) {
      std::memcpy(&bits, &f, 4);
      if (f != f) return {0x7fc0};
      return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
    } else {
#if defined(__F16C__)
      return {static_cast<uint16_t>(_cvtss_sh(f, 0))};
#else
      std::memcpy(&bits, &f, 4);
      const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
      bits &= 0x7fffffffu;
      if (f != f) return {static_cast<uint16_t>(sign | 0x7e00u)};
      if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more
      if (bits < 0x38800000u) {                                                 // below 2^-14: a multiple of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;  // the sum's unit is 2^-24, so the addition rounds
        std::memcpy(&bits, &magnitude, 4);
        return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
      }
      bits += 0xfffu + ((bits >> 13) & 1) - (112u << 23);
      return {static_cast<uint16_t>(sign | (bits >> 13))};
#endif
    }
  }
}

// The same, but what is out of range becomes the largest finite value.
template <class Out, class T>
inline Out saturate(T v) {
  constexpr T largest = kLargest<Out>;
  return round_to<Out>(v > largest ? largest : v < -largest ? -largest : v);
}

}  // namespace setemb
