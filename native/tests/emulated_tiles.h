// The machine of attention_tiles.h by plain loops, so that what uses tiles can be tested without any.
#pragma once

#include <cstdint>
#include <cstring>

#include "../src/attention_portable.h"
#include "../src/attention_tile_unit.h"

namespace tiermem {
namespace {

// Sums are formed as TDPBF16PS does: of the first of all pairs and of the second ones, then together.
class EmulatedTiles {
 public:
  template <int kTile>
  void zero() {
    std::memset(tiles_[kTile], 0, sizeof(tiles_[kTile]));
  }
  template <int kTile>
  void load(const void* from, std::int64_t stride) {
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(tiles_[kTile][r], static_cast<const std::byte*>(from) + r * stride, kRowBytes);
    }
  }
  template <int kTile>
  void store(void* to, std::int64_t stride) {
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(static_cast<std::byte*>(to) + r * stride, tiles_[kTile][r], kRowBytes);
    }
  }
  template <int kSum, int kLeft, int kRight>
  void multiply() {
    for (int m = 0; m < kTileRows; ++m) {
      float first[kTileRows] = {}, second[kTileRows] = {};
      for (int k = 0; k < kTileRows; ++k) {
        const Pair a = tiles_[kLeft][m][k];
        const float a_first = bfloat(a << 16), a_second = bfloat(a);
        for (int n = 0; n < kTileRows; ++n) {
          const Pair b = tiles_[kRight][k][n];
          first[n] += a_first * bfloat(b << 16);
          second[n] += a_second * bfloat(b);
        }
      }
      for (int n = 0; n < kTileRows; ++n) {
        Pair& sum = tiles_[kSum][m][n];
        sum = bits_of(float_of(sum) + (first[n] + second[n]));
      }
    }
  }

 private:
  // Of the high half. Numbers below the normal range are 0.
  static float bfloat(std::uint32_t bits) {
    return (bits & 0x7F80'0000U) == 0 ? 0.0F : float_of(bits & 0xFFFF'0000U);
  }

  Pair tiles_[8][kTileRows][kTileRows] = {};
};

struct Emulated {
  using Isa = Portable;
  using Vec = Isa::Vec;
  using Tiles = EmulatedTiles;

  static void split(const Half* a, const Half* b, Pair* high, Pair* low) {
    for (int i = 0; i < kTileRows; i += Isa::kLanes) {
      const Vec x = Isa::load(a + i), y = Isa::load(b + i);
      store(high + i, high_pair(x, y));
      store(low + i, high_pair(rest(x), rest(y)));
    }
  }
  static void interleave(const Bfloat* a, const Bfloat* b, Pair* first, Pair* second) {
    for (int i = 0; i < kTileRows; ++i) {
      const int at = i / 4 * 8 + i % 4;
      first[i] = a[at].bits | static_cast<Pair>(b[at].bits) << 16;
      second[i] = a[at + 4].bits | static_cast<Pair>(b[at + 4].bits) << 16;
    }
  }
  static void transpose(const float* from, Pair* to) {
    for (int i = 0; i < kTilePairs; ++i) to[i] = bits_of(from[i % kTileRows * kTileRows + i / kTileRows]);
  }
  static Vec high_pair(Vec a, Vec b) {
    return reinterpret_cast<Vec>(words(a) >> 16 | (words(b) & 0xFFFF'0000U));
  }
  static Vec rest(Vec a) { return a - reinterpret_cast<Vec>(words(a) & 0xFFFF'0000U); }
  static Vec add_power(Vec y, Vec x) { return reinterpret_cast<Vec>(words(y) + (words(x) << 23)); }

 private:
  typedef Pair Words __attribute__((vector_size(sizeof(Vec))));
  static Words words(Vec v) { return reinterpret_cast<Words>(v); }
  static void store(Pair* to, Vec v) { Isa::store(reinterpret_cast<float*>(to), v); }
};

}  // namespace
}  // namespace tiermem
