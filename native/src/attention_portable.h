// Portable: vectors of four lanes, which every 64-bit processor has.
#pragma once

#include "attention_vectors.h"

namespace tiermem {
namespace {

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  typedef std::int32_t Ints __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kBlockLines = 4;
  static constexpr int kSums = 8;
  static constexpr int kPanelTokens = 4;
  static constexpr int kPanelLines = 2;

  static Vec all(float x) { return Vec{x, x, x, x}; }

  static Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  }
  static Vec load(const Half* from) {
    return Vec{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
  }
  static Vec load(const Bfloat* from) {
    return Vec{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
  }

  static void store(float* to, Vec v) { std::memcpy(to, &v, sizeof(v)); }
  static void store(Half* to, Vec v) {
    for (int i = 0; i < kLanes; ++i) to[i] = to_half(v[i]);
  }
  static void store(Bfloat* to, Vec v) {
    for (int i = 0; i < kLanes; ++i) to[i] = to_bfloat(v[i]);
  }

  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec subtract(Vec a, Vec b) { return a - b; }
  static Vec multiply(Vec a, Vec b) { return a * b; }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }

  // To integers, halves to even: the sum has no bits below 1. For |x| below 2^22.
  static Vec round(Vec x) {
    const Vec magic = all(12582912.0F);
    return (x + magic) - magic;
  }
  static Vec times_power(Vec y, Vec whole) {
    const Ints bits = (__builtin_convertvector(whole, Ints) + 127) << 23;
    return y * reinterpret_cast<Vec>(bits);
  }

  static bool any_above(Vec a, Vec b) {
    const Ints above = a > b;
    return (above[0] | above[1] | above[2] | above[3]) != 0;
  }

  // Lane i: the sum of rows[i].
  static Vec sums(const Vec* rows) {
    Vec result{};
    for (int i = 0; i < kLanes; ++i) {
      result[i] = (rows[i][0] + rows[i][2]) + (rows[i][1] + rows[i][3]);
    }
    return result;
  }

  // Every lane: the maximum of those that are a multiple of kPeriod lanes away.
  template <int kPeriod>
  static Vec max_of_lines(Vec v) {
    if constexpr (kPeriod <= 2) v = max(v, Vec{v[2], v[3], v[0], v[1]});
    if constexpr (kPeriod <= 1) v = max(v, Vec{v[1], v[0], v[3], v[2]});
    return v;
  }

 private:
  static float from_bits(std::uint32_t bits) {
    float x = 0;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
  static std::uint32_t bits_of(float x) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
  }

  static float widen(Bfloat x) { return from_bits(std::uint32_t{x.bits} << 16); }
  // Never through a float32 that is denormal: those count as 0.
  static float widen(Half x) {
    const std::uint32_t sign = std::uint32_t{x.bits & 0x8000U} << 16;
    const std::uint32_t exponent = x.bits >> 10 & 0x1FU;
    const std::uint32_t fraction = x.bits & 0x3FFU;
    if (exponent == 0) {
      const float size = static_cast<float>(fraction) * 0x1p-24F;
      return from_bits(sign | bits_of(size));
    }
    const std::uint32_t wide = exponent == 0x1F ? 0xFFU : exponent + 112;
    return from_bits(sign | wide << 23 | fraction << 13);
  }

  static Bfloat to_bfloat(float x) {
    const std::uint32_t bits = bits_of(x);
    if (x != x) return {static_cast<std::uint16_t>(bits >> 16 | 0x40U)};
    return {static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16)};
  }
  static Half to_half(float x) {
    const std::uint32_t sign = bits_of(x) >> 16 & 0x8000U;
    const std::uint32_t size = bits_of(x) & 0x7FFF'FFFFU;
    std::uint32_t half = 0;
    if (x != x) {
      half = 0x7E00U;
    } else if (size >= 0x477F'F000U) {  // 65,520: rounds to infinity
      half = 0x7C00U;
    } else if (size < 0x3880'0000U) {  // 2^-14: the sum's last bit is worth 2^-24
      half = bits_of(from_bits(size) + 0.5F) - bits_of(0.5F);
    } else {
      half = (size - (112U << 23) + 0xFFFU + (size >> 13 & 1U)) >> 13;
    }
    return {static_cast<std::uint16_t>(sign | half)};
  }
};

}  // namespace
}  // namespace tiermem
