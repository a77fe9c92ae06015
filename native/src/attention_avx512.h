// Avx512: vectors of sixteen. For files compiled for AVX-512F: see attention_vectors.h.
#pragma once

#include "attention_vectors.h"

namespace tiermem {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kBlockLines = 8;
  static constexpr int kSums = 20;
  static constexpr int kPanelTokens = 8;
  static constexpr int kPanelLines = 8;

  static Vec all(float x) { return _mm512_set1_ps(x); }

  static Vec load(const float* from) { return _mm512_loadu_ps(from); }
  static Vec load(const Half* from) { return _mm512_cvtph_ps(bits(from)); }
  static Vec load(const Bfloat* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits(from)), 16));
  }

  static void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
  static void store(Half* to, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(Bfloat* to, Vec v) {
    const __m512i x = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7FFF)), odd);
    const __m512i result = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), x,
                                                _mm512_set1_epi32(0x40'0000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
  }

  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }

  static Vec round(Vec x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Vec times_power(Vec y, Vec whole) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127));
    return _mm512_mul_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
  }

  static bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

  // Lane i: the sum of rows[i]. Quarters of vectors are gathered first, then single lanes.
  static Vec sums(const Vec* rows) {
    const Vec a = quarters(rows[0], rows[4], rows[8], rows[12]);
    const Vec b = quarters(rows[1], rows[5], rows[9], rows[13]);
    const Vec c = quarters(rows[2], rows[6], rows[10], rows[14]);
    const Vec d = quarters(rows[3], rows[7], rows[11], rows[15]);
    const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  }

  // Every lane: the maximum of those that are a multiple of kPeriod lanes away.
  template <int kPeriod>
  static Vec max_of_lines(Vec v) {
    if constexpr (kPeriod <= 8) v = max(v, _mm512_shuffle_f32x4(v, v, 0x4E));
    if constexpr (kPeriod <= 4) v = max(v, _mm512_shuffle_f32x4(v, v, 0xB1));
    if constexpr (kPeriod <= 2) v = max(v, _mm512_permute_ps(v, 0x4E));
    if constexpr (kPeriod <= 1) v = max(v, _mm512_permute_ps(v, 0xB1));
    return v;
  }

 private:
  static __m256i bits(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  // Quarter i: the sum of the four quarters of the i-th argument.
  static Vec quarters(Vec a, Vec b, Vec c, Vec d) {
    const Vec ab = halves(a, b);
    const Vec cd = halves(c, d);
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  }
  // Half i: the sum of the two halves of the i-th argument.
  static Vec halves(Vec a, Vec b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  }
};

}  // namespace
}  // namespace tiermem
