// Amx: the machine of attention_tiles.h, on a processor that has tiles. For files compiled for AVX-512BW,
// whose assembler knows AMX.
#pragma once

#include "attention_avx512.h"
#include "attention_tiles.h"

namespace tiermem {
namespace {

// The thread's tiles, all of 16 rows of 64 bytes. The instructions are written out because compilers' own
// functions for them do not say that they read and write memory.
class AmxTiles {
 public:
  AmxTiles() {
    alignas(64) unsigned char config[64] = {1};  // palette; from 16 on bytes of a row, from 48 on rows
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~AmxTiles() { asm volatile("tilerelease" ::); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int kTile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  void store(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSum, int kLeft, int kRight>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  }
};

struct Amx {
  using Isa = Avx512;
  using Vec = Isa::Vec;
  using Tiles = AmxTiles;

  static void split(const Half* a, const Half* b, Pair* high, Pair* low) {
    const Vec x = Isa::load(a);
    const Vec y = Isa::load(b);
    store(high, high_pair(x, y));
    // The rests have at most 11 - 8 significant bits: nothing is cut off.
    store(low, high_pair(rest(x), rest(y)));
  }

  static void interleave(const Bfloat* a, const Bfloat* b, Pair* first, Pair* second) {
    const __m512i x = _mm512_loadu_si512(a);
    const __m512i y = _mm512_loadu_si512(b);
    _mm512_storeu_si512(first, _mm512_unpacklo_epi16(x, y));
    _mm512_storeu_si512(second, _mm512_unpackhi_epi16(x, y));
  }

  // Four columns of all rows at a time: quarters of four rows to a vector, and then 4 x 4 in each quarter.
  static void transpose(const float* from, Pair* to) {
    TIERMEM_UNROLL
    for (int c = 0; c < kTileRows; c += 4) {
      const Vec a = quarters(from + c);
      const Vec b = quarters(from + c + kTileRows);
      const Vec d = quarters(from + c + 2 * kTileRows);
      const Vec e = quarters(from + c + 3 * kTileRows);
      const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
      const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
      const __m512d de_low = _mm512_castps_pd(_mm512_unpacklo_ps(d, e));
      const __m512d de_high = _mm512_castps_pd(_mm512_unpackhi_ps(d, e));
      Pair* row = to + c * kTileRows;
      store(row, _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, de_low)));
      store(row + kTileRows, _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, de_low)));
      store(row + 2 * kTileRows, _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, de_high)));
      store(row + 3 * kTileRows, _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, de_high)));
    }
  }

  static Vec high_pair(Vec a, Vec b) {
    const __m512i first = _mm512_srli_epi32(_mm512_castps_si512(a), 16);
    constexpr int kFirstOrMasked = 0xF8;  // x | (y & z)
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(first, _mm512_castps_si512(b), high_bits(),
                                                         kFirstOrMasked));
  }
  static Vec rest(Vec a) {
    const __m512i high = _mm512_and_si512(_mm512_castps_si512(a), high_bits());
    return Isa::subtract(a, _mm512_castsi512_ps(high));
  }
  static Vec add_power(Vec y, Vec x) {
    const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(x), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), power));
  }

 private:
  static __m512i high_bits() { return _mm512_set1_epi32(static_cast<int>(0xFFFF'0000)); }
  static void store(Pair* to, Vec v) { _mm512_storeu_ps(reinterpret_cast<float*>(to), v); }
  // Four items of each fourth row.
  static Vec quarters(const float* from) {
    constexpr int four_rows = 4 * kTileRows;
    Vec v = _mm512_castps128_ps512(_mm_loadu_ps(from));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(from + four_rows), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(from + 2 * four_rows), 2);
    return _mm512_insertf32x4(v, _mm_loadu_ps(from + 3 * four_rows), 3);
  }
};

}  // namespace
}  // namespace tiermem
