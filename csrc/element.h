// The two 16-bit element types, and their conversions, on device and host alike.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LK_FN __host__ __device__ __forceinline__
#else
#define LK_FN inline
#endif

#ifdef __CUDA_ARCH__
#define LK_UNROLL _Pragma("unroll")
#else
#define LK_UNROLL
#endif

namespace lk {

LK_FN uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

LK_FN float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

struct Bf16 {
  // Its range is that of fp32: nothing needs scaling before it is rounded.
  static constexpr bool kNarrowRange = false;

  // Two floats rounded to nearest even, the first in the low half.
  LK_FN static uint32_t pack(float first, float second) {
#ifdef __CUDA_ARCH__
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return round_bits(first) | round_bits(second) << 16;
#endif
  }
  LK_FN static float first(uint32_t pair) { return float_of(pair << 16); }
  LK_FN static float second(uint32_t pair) { return float_of(pair & 0xFFFF0000u); }

 private:
  LK_FN static uint32_t round_bits(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFFu;  // NaN
    return (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  }
};

struct Fp16 {
  static constexpr bool kNarrowRange = true;

  LK_FN static uint32_t pack(float first, float second) {
#ifdef __CUDA_ARCH__
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return round_bits(first) | round_bits(second) << 16;
#endif
  }
  LK_FN static float first(uint32_t pair) { return widen(static_cast<uint16_t>(pair)); }
  LK_FN static float second(uint32_t pair) { return widen(static_cast<uint16_t>(pair >> 16)); }

 private:
  LK_FN static float widen(uint16_t half) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
#else
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    const float scaled = float_of(magnitude << 13) * float_of((127u + 112u) << 23);  // exponent bias 15 -> 127
    return float_of(sign | bits_of(scaled));
#endif
  }
  LK_FN static uint32_t round_bits(float value) {
    const uint32_t sign = bits_of(value) >> 16 & 0x8000u, bits = bits_of(value) & 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return 0x7FFFu;             // NaN
    if (bits >= 0x477FF000u) return sign | 0x7C00u;     // 65520 and beyond round to infinity
    if (bits < 0x38800000u) {                           // subnormal: let fp32 addition round at 2^-24
      return sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f));
    }
    return sign | (bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1)) >> 13;
  }
};

// Two floats as sums of a high and a low element each: 16 bits of them in bf16, 22 in fp16.
template <class Element>
LK_FN void split(float first, float second, uint32_t& high, uint32_t& low) {
  high = Element::pack(first, second);
  low = Element::pack(first - Element::first(high), second - Element::second(high));
}

// 2^exponent; exponents beyond the normal range of fp32 are clamped to it.
LK_FN float power_of_two(int exponent) {
  const int clamped = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
  return float_of(static_cast<uint32_t>(clamped + 127) << 23);
}

// e with |value| < 2^e, clamped to [-112, 112]; of no use (but harmless) for infinity and NaN.
LK_FN int exponent_above(float value) {
  const int exponent = static_cast<int>(bits_of(value) >> 23 & 0xFF) - 126;
  return exponent < -112 ? -112 : exponent > 112 ? 112 : exponent;
}

}  // namespace lk
