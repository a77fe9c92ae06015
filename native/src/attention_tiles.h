// Attention by products of tiles: what the tiles hold, and how queries are prepared for it.
//
// A tile is 16 rows of 64 bytes. A product adds, for rows m and columns n, over 16 pairs of bfloat16,
//   c[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1]
// in float32, and takes numbers below 2^-126 for 0.
//
// Nothing is rounded to bfloat16 on its way into a product but sums of two such numbers: float16 items and
// weights are split into a high part of 8 significant bits and the rest. The product of two rests, 2^-16 of
// the whole, is left out. Float16 items below the normal range are split exactly too. An infinity in float16
// K or V gives NaN, its rest being one.
//
// Line tiles are 16 lines, the columns of the queries' tiles and of the scores; a step is 32 items of
// head_dim, or 32 tokens, that one product sums over.
//
// A machine `M` has
//   Isa      vectors of up to 16 lanes, see attention_vectors.h
//   Tiles    eight tiles, the calling thread's while it lives: zero<t>(), load<t>(from, stride),
//            store<t>(to, stride) with strides in bytes, multiply<c, a, b>()
//   split(a, b, high, low)              16 pairs (a[i], b[i]) of float16, by their parts
//   interleave(a, b, first, second)     pairs (a[i], b[i]) of bfloat16, those with i % 8 < 4 and the others
//   transpose(from, to)                 16 x 16 pairs
//   high_pair(a, b), rest(a)            on Vec: pairs of the high parts; what a high part leaves
//   add_power(y, x)                     on Vec: y * 2^n, where x = 1.5 * 2^23 + n
#pragma once

#include "attention_vectors.h"

namespace tiermem {
namespace {

using Pair = std::uint32_t;  // two bfloat16, the first one in the low half

constexpr int kTileRows = 16;
constexpr int kTilePairs = 256;
constexpr int kStepItems = 32;
constexpr int kRowBytes = 64;
constexpr int kMostLineTiles = 8;
constexpr int kMostTileDim = 256;

constexpr int line_tiles(std::size_t num_lines) {
  return static_cast<int>((num_lines + kTileRows - 1) / kTileRows);
}

template <class Item>
constexpr int kParts = 1;
template <>
constexpr int kParts<Half> = 2;

// Where the two items of pair r of a step of K and Q are: float16 items are split sixteen at a time.
template <class Item>
constexpr int first_of_pair(int r) {
  return kParts<Item> == 2 ? r : 2 * r;
}
template <class Item>
constexpr int second_of_pair(int r) {
  return kParts<Item> == 2 ? r + 16 : 2 * r + 1;
}

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float x = 0;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// To bfloat16, halves to even.
inline std::uint32_t rounded_high(float x) {
  const std::uint32_t bits = bits_of(x);
  return (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
}

// Queries of a group: by part, line tile and step, a tile each with its lines as columns. They are not
// scaled, so that bfloat16 stays exact, but negated for a negative scale.
template <class Isa, class Item>
struct TileQueries {
  static void prepare(const PrepareTask& task) {
    const int tiles = line_tiles(task.num_lines);
    const int steps = static_cast<int>(task.head_dim) / kStepItems;
    auto* pairs = reinterpret_cast<Pair*>(task.prepared);
    const int part = tiles * steps * kTilePairs;
    std::memset(pairs, 0, static_cast<std::size_t>(kParts<Item> * part) * sizeof(Pair));
    if (task.factor == 0) return;  // all scores are 0
    for (std::size_t line = 0; line < task.num_lines; ++line) {
      const auto row = static_cast<std::int64_t>(line / task.heads_per_kv);
      const auto head = static_cast<std::int64_t>(line % task.heads_per_kv);
      const std::byte* query = task.query + row * task.row_bytes + head * task.head_bytes;
      Pair* column = pairs + line / kTileRows * static_cast<std::size_t>(steps * kTilePairs) +
                     line % kTileRows;
      put(reinterpret_cast<const Item*>(query), steps, task.factor < 0, column, part);
    }
  }

  static void put(const Item* query, int steps, bool is_negated, Pair* column, int part) {
    alignas(64) float items[kMostTileDim];
    for (int d = 0; d < steps * kStepItems; d += Isa::kLanes) {
      Isa::store(items + d, Isa::load(query + d));
    }
    for (int i = 0; i < steps * kTileRows; ++i) {
      const float* step = items + i / kTileRows * kStepItems;
      const float first = step[first_of_pair<Item>(i % kTileRows)];
      const float second = step[second_of_pair<Item>(i % kTileRows)];
      const float sign = is_negated ? -1.0F : 1.0F;
      put_pair(sign * first, sign * second, column + i * kTileRows, part);
    }
  }

  static void put_pair(float first, float second, Pair* to, int part) {
    const std::uint32_t a = rounded_high(first);
    const std::uint32_t b = rounded_high(second);
    *to = a | b << 16;
    if constexpr (kParts<Item> == 2) {  // the rest has 3 significant bits
      to[part] = bits_of(first - float_of(a << 16)) >> 16 |
                 (bits_of(second - float_of(b << 16)) & 0xFFFF'0000U);
    }
  }
};

// What the scores are multiplied by.
inline float tile_factor(double factor) {
  if (factor == 0) return 1.0F;
  return static_cast<float>(factor < 0 ? -factor : factor);
}

}  // namespace
}  // namespace tiermem
