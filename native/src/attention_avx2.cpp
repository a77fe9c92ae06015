// The attention kernel for AVX2 with FMA and F16C. Compiled for them: see attention_vectors.h.
#if defined(__x86_64__)
#include "attention_instructions.h"

namespace tiermem {
namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kBlockLines = 8;
  static constexpr int kSums = 12;
  static constexpr int kPanelTokens = 4;
  static constexpr int kPanelLines = 4;

  static Vec all(float x) { return _mm256_set1_ps(x); }

  static Vec load(const float* from) { return _mm256_loadu_ps(from); }
  static Vec load(const Half* from) { return _mm256_cvtph_ps(bits(from)); }
  static Vec load(const Bfloat* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits(from)), 16));
  }

  static void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
  static void store(Half* to, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(Bfloat* to, Vec v) {
    const __m256i x = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x40'0000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }

  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }

  static Vec round(Vec x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Vec times_power(Vec y, Vec whole) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }

  static bool any_above(Vec a, Vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
  }

  // Lane i: the sum of rows[i].
  static Vec sums(const Vec* rows) {
    const Vec low = fours(rows);       // of lanes 0-3 | of lanes 4-7, of rows 0-3
    const Vec high = fours(rows + 4);  // of rows 4-7
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                         _mm256_permute2f128_ps(low, high, 0x31));
  }

  // Every lane: the maximum of those that are a multiple of kPeriod lanes away.
  template <int kPeriod>
  static Vec max_of_lines(Vec v) {
    if constexpr (kPeriod <= 4) v = max(v, _mm256_permute2f128_ps(v, v, 0x01));
    if constexpr (kPeriod <= 2) v = max(v, _mm256_permute_ps(v, 0x4E));
    if constexpr (kPeriod <= 1) v = max(v, _mm256_permute_ps(v, 0xB1));
    return v;
  }

 private:
  static __m128i bits(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  static Vec fours(const Vec* rows) {
    return _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
  }
};

}  // namespace

constexpr AttentionKernel kAvx2Attention = kernel_of<Avx2>(AttentionInstructions::avx2);

}  // namespace tiermem
#endif
