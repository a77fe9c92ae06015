// What the attention kernels share over a set of vector instructions `Isa`, which the including file
// defines.
//
// Everything here, and in the headers that include this one, is in an unnamed namespace and uses no inline
// function of the standard library: it is compiled for instructions that not every processor has, and must
// not become the program's copy of anything.
//
// Isa has: Vec; kLanes (a power of two, at most kMostLanes); kBlockLines (at most kLanes and
// kMostBlockLines); kSums, accumulators that fit the registers beside operands; kPanelTokens (a divisor
// of 64) and kPanelLines, which make half as many accumulators; and functions on Vec.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define TIERMEM_UNROLL _Pragma("GCC unroll 16")

namespace tiermem {
namespace {

// Items as they are stored.
struct Half {
  std::uint16_t bits;
};
struct Bfloat {
  std::uint16_t bits;
};

constexpr int kLineBytes = 64;  // of the caches
constexpr float kLowest = -3.402823466e+38F;
constexpr float kInfinity = __builtin_inff();
constexpr double kLn2 = 0.693147180559945309417;
// How far scores, in base 2, may exceed the peak: see attention_block.h.
constexpr float kRescaleAbove = 8.0F;

// Into the second-level cache.
inline void fetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// Weights far below the peak become denormal numbers, which cost a hundred cycles each.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() { _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZero); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000;
  static constexpr unsigned kDenormalsAreZero = 0x0040;
  const unsigned before_ = _mm_getcsr();
#else
 public:
  FlushDenormals() {}
#endif
};

// 2^x for x in [-1/2, 1/2]: a minimax polynomial, relative error 1.7e-7.
template <class Isa>
typename Isa::Vec exp2_of_part(typename Isa::Vec x) {
  typename Isa::Vec y = Isa::all(0.001326472731307149F);
  y = Isa::multiply_add(y, x, Isa::all(0.009671512991189957F));
  y = Isa::multiply_add(y, x, Isa::all(0.05550733581185341F));
  y = Isa::multiply_add(y, x, Isa::all(0.24022242426872253F));
  y = Isa::multiply_add(y, x, Isa::all(0.6931470036506653F));
  return Isa::multiply_add(y, x, Isa::all(1.0F));
}

// 2^x for x up to 127 by range reduction. The result is 0 from -127 down, and NaN for NaN.
template <class Isa>
typename Isa::Vec exp2_by_parts(typename Isa::Vec x) {
  // The maximum of the two is the second one if either is NaN.
  x = Isa::max(Isa::all(-127.0F), x);
  const typename Isa::Vec whole = Isa::round(x);
  return Isa::times_power(exp2_of_part<Isa>(Isa::subtract(x, whole)), whole);
}

template <class Isa, class Item>
typename Isa::Vec load_some(const Item* items, int count) {
  Item full[Isa::kLanes] = {};
  std::memcpy(full, items, static_cast<std::size_t>(count) * sizeof(Item));
  return Isa::load(full);
}

// Multiplies each line's sums by its lane of `factors`.
template <class Isa>
void rescale(float* weighted, int padded_dim, int num_lines, typename Isa::Vec factors) {
  alignas(64) float factor[Isa::kLanes];
  Isa::store(factor, factors);
  for (int g = 0; g < num_lines; ++g) {
    float* row = weighted + g * padded_dim;
    for (int d = 0; d < padded_dim; d += Isa::kLanes) {
      Isa::store(row + d, Isa::multiply(Isa::load(row + d), Isa::all(factor[g])));
    }
  }
}

// To a softmax over nothing. `num_lanes`: of peak and total.
inline void clear_partial(const Partial& partial, std::size_t num_lines, std::size_t padded_dim,
                          std::size_t num_lanes) {
  std::memset(partial.weighted, 0, num_lines * padded_dim * sizeof(float));
  for (std::size_t i = 0; i < num_lanes; ++i) {
    partial.peak[i] = kLowest;
    partial.total[i] = 0.0F;
  }
}

}  // namespace
}  // namespace tiermem
