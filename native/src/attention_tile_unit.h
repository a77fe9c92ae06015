// One unit by products of tiles: for each 64 tokens of its run
//   scores   z[token][line] = K Q, two tiles of tokens and two of lines at a time; bfloat16 K is read
//            where it lies
//   softmax  as in attention_panel.h; the lanes are lines, so weights are transposed into tiles
//   sums     of weight * V, two tiles of lines and two of columns at a time, over pairs of tokens
// What goes into tiles is written some products before they are loaded.
#pragma once

#include "attention_feed.h"
#include "attention_instructions.h"
#include "attention_pages.h"
#include "attention_tiles.h"

namespace tiermem {
namespace {

// Prefetches, in the order of reading, as work goes on.
class RowFetcher {
 public:
  RowFetcher(const TokenFeed& feed, int first) : feed_(feed), next_(first) {}

  // The coming `calls` of step() fetch so many rows in all.
  void spread(int rows, int calls) {
    end_ += rows;
    per_call_ = (rows << kPointBits) / calls;
    at_ = (end_ - rows) << kPointBits;
  }
  void step() {
    at_ += per_call_;
    fetch_until(at_ >> kPointBits);
  }
  void finish() { fetch_until(end_); }

 private:
  static constexpr int kPointBits = 10;

  void fetch_until(int count) {
    for (; num_done_ < count; ++num_done_) feed_.fetch_row(feed_.row_from_here(next_ + num_done_));
  }

  const TokenFeed& feed_;
  const int next_;
  int num_done_ = 0;
  int end_ = 0;
  int at_ = 0;
  int per_call_ = 0;
};

template <class M, class Item, int kAheadRows>
class TileUnit {
  using Isa = typename M::Isa;
  using Vec = typename Isa::Vec;
  using Tiles = typename M::Tiles;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kVectors = kTileRows / kLanes;  // of a line tile
  static constexpr int kSteps = kTokens / kStepItems;  // of a block
  static constexpr int kMostSteps = kMostTileDim / kStepItems;
  static constexpr int kItemParts = kParts<Item>;
  static constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer

 public:
  static void attend(const UnitTask& task) {
    TileUnit unit(task);
    unit.run();
  }

 private:
  // Sixteen tokens' K: the tile of step s is at + s * step, rows `stride` apart, all in bytes.
  struct KeyTile {
    const std::byte* at;
    std::int64_t stride;
    std::int64_t step;
  };

  explicit TileUnit(const UnitTask& task)
      : task_(task),
        line_tiles_(line_tiles(task.num_lines)),
        steps_(static_cast<int>(task.shape.head_dim) / kStepItems),
        num_lanes_(line_tiles_ * kTileRows),
        factor_(tile_factor(task.factor)),
        pages_(task.page_output) {
    const auto num_sums = static_cast<std::size_t>(line_tiles_ * 2 * steps_ * kTilePairs);
    std::memset(sums_, 0, num_sums * sizeof(float));
    for (int i = 0; i < num_lanes_; ++i) {
      peak_[i] = kLowest;
      total_[i] = 0.0F;
    }
  }

  void run() {
    Tiles tiles;
    TokenFeed feed(task_);
    for (int i = 0; i < kAheadRows; ++i) feed.fetch_row(feed.row_from_here(i));
    for (; feed.count() > 0; feed.next()) {
      RowFetcher fetcher(feed, kAheadRows);
      const int num_steps = (feed.count() + kStepItems - 1) / kStepItems;
      score(tiles, feed, num_steps, fetcher);
      mask(feed, num_steps);
      if (pages_.are_wanted()) sum_pages(feed);
      fetcher.spread(kTokens / 2, line_tiles_ * num_steps);
      for (int tile = 0; tile < line_tiles_; ++tile) soften(tile, num_steps, fetcher);
      fetcher.finish();
      sum(tiles, feed, num_steps, fetcher);
    }
    finish();
  }

  // -- Scores -------------------------------------------------------------------------------------

  static std::int64_t bytes(int num_tiles) { return std::int64_t{num_tiles} * kTileRows * kRowBytes; }
  static const Item* items(const std::byte* row) { return reinterpret_cast<const Item*>(row); }

  // Tokens [32 * half, 32 * half + 32), of which the second sixteen may be repeats.
  void gather_keys(const TokenFeed& feed, int half, KeyTile* keys) {
    for (int i = 0; i < 2; ++i) {
      const int token = half * kStepItems + i * kTileRows;
      const std::byte* const* rows = feed.keys() + token;
      if (kItemParts == 1 && feed.are_in_a_row(token, token + kTileRows)) {
        keys[i] = {rows[0], rows[1] - rows[0], kRowBytes};
        continue;
      }
      Pair* to = keys_[half][0][i][0];
      for (int r = 0; r < kTileRows; ++r) gather_row(rows[r], to + r * kTileRows);
      keys[i] = {reinterpret_cast<const std::byte*>(to), kRowBytes, bytes(1)};
    }
  }

  void gather_row(const std::byte* row, Pair* to) const {
    for (int s = 0; s < steps_; ++s, row += kStepItems * sizeof(Item), to += kTilePairs) {
      if constexpr (kItemParts == 2) {
        M::split(items(row), items(row) + kStepItems / 2, to, to + kKeyPart);
      } else {
        std::memcpy(to, row, kRowBytes);
      }
    }
  }

  void score(Tiles& tiles, const TokenFeed& feed, int num_steps, RowFetcher& fetcher) {
    KeyTile keys[kSteps][2];
    fetcher.spread(kTokens, num_steps * ((line_tiles_ + 1) / 2) * steps_);
    gather_keys(feed, 0, keys[0]);
    for (int half = 0; half < num_steps; ++half) {
      if (half + 1 < num_steps) gather_keys(feed, half + 1, keys[half + 1]);
      float* scores = scores_ + half * kStepItems * num_lanes_;
      for (int tile = 0; tile < line_tiles_; tile += 2) {
        if (tile + 1 < line_tiles_) {
          score_tiles<2>(tiles, keys[half], tile, scores + tile * kTileRows, fetcher);
        } else {
          score_tiles<1>(tiles, keys[half], tile, scores + tile * kTileRows, fetcher);
        }
      }
    }
    fetcher.finish();
  }

  // Tile 2 i + j: tokens of keys[i], lines of line tile `tile` + j.
  template <int kWide>
  void score_tiles(Tiles& tiles, const KeyTile* keys, int tile, float* scores,
                   RowFetcher& fetcher) const {
    tiles.template zero<0>();
    tiles.template zero<2>();
    if constexpr (kWide == 2) {
      tiles.template zero<1>();
      tiles.template zero<3>();
    }
    const auto* high = reinterpret_cast<const Pair*>(task_.queries) + tile * steps_ * kTilePairs;
    const Pair* low = high + line_tiles_ * steps_ * kTilePairs;
    for (int s = 0; s < steps_; ++s) {
      load_keys(tiles, keys, s, 0);
      if constexpr (kItemParts == 2) {
        load_queries<kWide>(tiles, low + s * kTilePairs);
        multiply<2, kWide>(tiles);
      }
      load_queries<kWide>(tiles, high + s * kTilePairs);
      multiply<2, kWide>(tiles);
      if constexpr (kItemParts == 2) {
        load_keys(tiles, keys, s, kKeyPart * static_cast<std::int64_t>(sizeof(Pair)));
        multiply<2, kWide>(tiles);
      }
      fetcher.step();
    }
    const std::int64_t stride = num_lanes_ * static_cast<std::int64_t>(sizeof(float));
    float* second = scores + kTileRows * num_lanes_;
    tiles.template store<0>(scores, stride);
    tiles.template store<2>(second, stride);
    if constexpr (kWide == 2) {
      tiles.template store<1>(scores + kTileRows, stride);
      tiles.template store<3>(second + kTileRows, stride);
    }
  }

  static void load_keys(Tiles& tiles, const KeyTile* keys, int step, std::int64_t part) {
    tiles.template load<4>(keys[0].at + step * keys[0].step + part, keys[0].stride);
    tiles.template load<5>(keys[1].at + step * keys[1].step + part, keys[1].stride);
  }

  template <int kWide>
  void load_queries(Tiles& tiles, const Pair* from) const {
    tiles.template load<6>(from, kRowBytes);
    if constexpr (kWide == 2) tiles.template load<7>(from + steps_ * kTilePairs, kRowBytes);
  }

  // Tile 2 i + j += tile 4 + i times tile 6 + j.
  template <int kTall, int kWide>
  static void multiply(Tiles& tiles) {
    tiles.template multiply<0, 4, 6>();
    if constexpr (kTall == 2) tiles.template multiply<2, 5, 6>();
    if constexpr (kWide == 2) tiles.template multiply<1, 4, 7>();
    if constexpr (kTall == 2 && kWide == 2) tiles.template multiply<3, 5, 7>();
  }

  // -- Softmax ------------------------------------------------------------------------------------

  // Sets what a line does not see, and what lies beyond the last token, to -infinity.
  void mask(const TokenFeed& feed, int num_steps) {
    for (int i = feed.count() * num_lanes_; i < num_steps * kStepItems * num_lanes_; ++i) {
      scores_[i] = -kInfinity;
    }
    for (int g = 0; g < static_cast<int>(task_.num_lines); ++g) {
      const SeenRange seen = task_.sees[g];
      if (seen.start <= feed.lowest() && feed.highest() < seen.end) continue;
      for (int t = 0; t < feed.count(); ++t) {
        const std::int64_t position = feed.positions()[t];
        if (position < seen.start || position >= seen.end) {
          scores_[t * num_lanes_ + g] = -kInfinity;
        }
      }
    }
  }

  [[gnu::noinline]] void sum_pages(const TokenFeed& feed) const {
    for (int p = 0; p < feed.num_parts(); ++p) {
      const PagePart part = feed.parts()[p];
      for (int lane = 0; lane < static_cast<int>(task_.num_lines); lane += kLanes) {
        sum_page(part, lane);
      }
    }
  }

  void sum_page(PagePart part, int lane) const {
    const float* scores = scores_ + lane;
    Vec top = Isa::all(kLowest);
    for (int t = part.start; t < part.end; ++t) {
      top = Isa::max(top, Isa::load(scores + t * num_lanes_));
    }
    Vec total = Isa::all(0.0F);
    for (int t = part.start; t < part.end; ++t) {
      const Vec below = Isa::subtract(Isa::load(scores + t * num_lanes_), top);
      total = Isa::add(total, exp2_by_parts<Isa>(Isa::multiply(below, Isa::all(factor_))));
    }
    alignas(64) float tops[kLanes], totals[kLanes];
    Isa::store(tops, Isa::multiply(top, Isa::all(factor_)));
    Isa::store(totals, total);
    for (int g = 0; g < kLanes && lane + g < static_cast<int>(task_.num_lines); ++g) {
      pages_.add(lane + g, part, tops[g], totals[g]);
    }
  }

  // Scores of a line tile become weights, in tiles with the lines as rows.
  void soften(int tile, int num_steps, RowFetcher& fetcher) {
    const float* scores = scores_ + tile * kTileRows;
    for (int lane = 0; lane < kTileRows; lane += kLanes) move_peak(tile, lane, num_steps);
    Vec minus_peak[kVectors], total[kVectors];
    for (int w = 0; w < kVectors; ++w) {
      const int lane = tile * kTileRows + w * kLanes;
      minus_peak[w] = Isa::subtract(Isa::all(0.0F), Isa::load(peak_ + lane));
      total[w] = Isa::load(total_ + lane);
    }
    for (int s = 0; s < num_steps; ++s) {
      alignas(64) float high[kTilePairs], low[kTilePairs];  // (pair of tokens, line)
      for (int r = 0; r < kTileRows; ++r) {
        const float* row = scores + (s * kStepItems + 2 * r) * num_lanes_;
        for (int w = 0; w < kVectors; ++w) {
          const Vec a = weight(Isa::load(row + w * kLanes), minus_peak[w]);
          const Vec b = weight(Isa::load(row + num_lanes_ + w * kLanes), minus_peak[w]);
          total[w] = Isa::add(total[w], Isa::add(a, b));
          Isa::store(high + r * kTileRows + w * kLanes, M::high_pair(a, b));
          Isa::store(low + r * kTileRows + w * kLanes, M::high_pair(M::rest(a), M::rest(b)));
        }
      }
      M::transpose(high, weights_[0][tile][s]);
      M::transpose(low, weights_[1][tile][s]);
      fetcher.step();
    }
    for (int w = 0; w < kVectors; ++w) {
      Isa::store(total_ + tile * kTileRows + w * kLanes, total[w]);
    }
  }

  void move_peak(int tile, int lane, int num_steps) {
    const int line = tile * kTileRows + lane;
    const float* scores = scores_ + line;
    Vec top = Isa::all(-kInfinity);
    for (int t = 0; t < num_steps * kStepItems; ++t) {
      top = Isa::max(top, Isa::load(scores + t * num_lanes_));
    }
    top = Isa::multiply(top, Isa::all(factor_));
    const Vec old = Isa::load(peak_ + line);
    if (!Isa::any_above(top, Isa::add(old, Isa::all(kRescaleAbove)))) return;
    const Vec peak = Isa::max(old, top);
    const Vec factors = exp2_by_parts<Isa>(Isa::subtract(old, peak));
    Isa::store(peak_ + line, peak);
    Isa::store(total_ + line, Isa::multiply(Isa::load(total_ + line), factors));
    for (int column = 0; column < 2 * steps_; ++column) {
      rescale<Isa>(sums_at(tile, column) + lane * kTileRows, kTileRows, kLanes, factors);
    }
  }

  // 2^(factor * score - peak), or less than 2^-126, which counts as 0.
  Vec weight(Vec score, Vec minus_peak) const {
    const Vec z = Isa::multiply_add(score, Isa::all(factor_), minus_peak);
    const Vec x = Isa::max(Isa::all(-126.5F), z);
    const Vec rounded = Isa::add(x, Isa::all(kMagic));
    const Vec part = Isa::subtract(x, Isa::subtract(rounded, Isa::all(kMagic)));
    return M::add_power(exp2_of_part<Isa>(part), rounded);
  }

  // -- Sums ---------------------------------------------------------------------------------------

  // A tile of sums: sixteen lines and as many columns.
  float* sums_at(int tile, int column) {
    return sums_ + (tile * 2 * steps_ + column) * kTilePairs;
  }

  // Of columns [32 * column, 32 * column + 32), tiles of sixteen columns and 32 tokens.
  void gather_values(const TokenFeed& feed, int column, int num_steps) {
    const std::size_t at = static_cast<std::size_t>(column) * kStepItems;
    for (int s = 0; s < num_steps; ++s) {
      const std::byte* const* rows = feed.values() + s * kStepItems;
      Pair* first = values_[column & 1][0][0][s];
      Pair* second = values_[column & 1][0][1][s];
      for (int r = 0; r < kTileRows; ++r, first += kTileRows, second += kTileRows) {
        const Item* a = items(rows[2 * r]) + at;
        const Item* b = items(rows[2 * r + 1]) + at;
        if constexpr (kItemParts == 2) {
          M::split(a, b, first, first + kValuePart);
          M::split(a + kTileRows, b + kTileRows, second, second + kValuePart);
        } else {
          M::interleave(a, b, first, second);
        }
      }
    }
  }

  void sum(Tiles& tiles, const TokenFeed& feed, int num_steps, RowFetcher& fetcher) {
    fetcher.spread(kTokens / 2, steps_ * ((line_tiles_ + 1) / 2));
    gather_values(feed, 0, num_steps);
    for (int column = 0; column < steps_; ++column) {
      if (column + 1 < steps_) gather_values(feed, column + 1, num_steps);
      for (int tile = 0; tile < line_tiles_; tile += 2) {
        if (tile + 1 < line_tiles_) {
          sum_tiles<2>(tiles, tile, column, num_steps);
        } else {
          sum_tiles<1>(tiles, tile, column, num_steps);
        }
        fetcher.step();
      }
    }
    fetcher.finish();
  }

  // Tile 2 i + j: lines of line tile `tile` + i, columns of the j-th sixteen.
  template <int kTall>
  void sum_tiles(Tiles& tiles, int tile, int column, int num_steps) {
    tiles.template load<0>(sums_at(tile, 2 * column), kRowBytes);
    tiles.template load<1>(sums_at(tile, 2 * column + 1), kRowBytes);
    if constexpr (kTall == 2) {
      tiles.template load<2>(sums_at(tile + 1, 2 * column), kRowBytes);
      tiles.template load<3>(sums_at(tile + 1, 2 * column + 1), kRowBytes);
    }
    const auto& values = values_[column & 1];
    for (int s = 0; s < num_steps; ++s) {
      load_values(tiles, values[0], s);
      load_weights<kTall>(tiles, weights_[1] + tile, s);
      multiply<kTall, 2>(tiles);
      load_weights<kTall>(tiles, weights_[0] + tile, s);
      multiply<kTall, 2>(tiles);
      if constexpr (kItemParts == 2) {
        load_values(tiles, values[1], s);
        multiply<kTall, 2>(tiles);
      }
    }
    tiles.template store<0>(sums_at(tile, 2 * column), kRowBytes);
    tiles.template store<1>(sums_at(tile, 2 * column + 1), kRowBytes);
    if constexpr (kTall == 2) {
      tiles.template store<2>(sums_at(tile + 1, 2 * column), kRowBytes);
      tiles.template store<3>(sums_at(tile + 1, 2 * column + 1), kRowBytes);
    }
  }

  static void load_values(Tiles& tiles, const Pair (*values)[kSteps][kTilePairs], int step) {
    tiles.template load<6>(values[0][step], kRowBytes);
    tiles.template load<7>(values[1][step], kRowBytes);
  }

  template <int kTall>
  static void load_weights(Tiles& tiles, const Pair (*weights)[kSteps][kTilePairs], int step) {
    tiles.template load<4>(weights[0][step], kRowBytes);
    if constexpr (kTall == 2) tiles.template load<5>(weights[1][step], kRowBytes);
  }

  // -- The end ------------------------------------------------------------------------------------

  void finish() {
    const Partial& partial = task_.partial;
    for (std::size_t line = 0; line < task_.num_lines; ++line) {
      const std::size_t lane = lane_of<Isa>(task_.num_lines, task_.padded_dim, line);
      partial.peak[lane] = peak_[line];
      // What lies below the least number counts as 0, but is none.
      partial.total[lane] = peak_[line] == kLowest ? 0.0F : total_[line];
      const int tile = static_cast<int>(line / kTileRows);
      const int row = static_cast<int>(line % kTileRows) * kTileRows;
      float* weighted = partial.weighted + line * task_.padded_dim;
      for (int s = 0; s < steps_; ++s, weighted += kStepItems) {
        put_columns(sums_at(tile, 2 * s) + row, sums_at(tile, 2 * s + 1) + row, weighted);
      }
    }
  }

  static void put_columns(const float* first, const float* second, float* to) {
    constexpr std::size_t four = 4 * sizeof(float);
    if constexpr (kItemParts == 2) {
      std::memcpy(to, first, 4 * four);
      std::memcpy(to + kTileRows, second, 4 * four);
    } else {  // as M::interleave orders them
      for (int i = 0; i < 4; ++i) {
        std::memcpy(to + 8 * i, first + 4 * i, four);
        std::memcpy(to + 8 * i + 4, second + 4 * i, four);
      }
    }
  }

  static constexpr int kKeyPart = 2 * kMostSteps * kTilePairs;
  static constexpr int kValuePart = 2 * kSteps * kTilePairs;

  const UnitTask& task_;
  const int line_tiles_;
  const int steps_;      // of head_dim
  const int num_lanes_;  // lines, filled up to whole tiles
  const float factor_;   // of a score, at least 0
  const PageSums pages_;

  alignas(64) float peak_[kMostLineTiles * kTileRows];
  alignas(64) float total_[kMostLineTiles * kTileRows];
  alignas(64) float scores_[kTokens * kMostLineTiles * kTileRows];              // (token, line)
  alignas(64) Pair weights_[2][kMostLineTiles][kSteps][kTilePairs];             // high, low
  alignas(64) Pair keys_[kSteps][kItemParts][2][kMostSteps][kTilePairs];        // half, part, tile
  alignas(64) Pair values_[2][kItemParts][2][kSteps][kTilePairs];               // buffer, part, tile
  alignas(64) float sums_[kMostLineTiles * kMostTileDim / kTileRows * kTilePairs];  // by tiles
};

// The functions of an AttentionKernel: units of `kFewest` lines on go by tiles, others to `other`.
template <class M, int kFewestHalf, int kFewestBfloat, int kAheadRows>
struct TileKernel {
  static bool uses_tiles(FloatType type, std::size_t num_lines, std::size_t head_dim) {
    const int fewest = type == FloatType::float16 ? kFewestHalf : kFewestBfloat;
    return type != FloatType::float32 && num_lines >= static_cast<std::size_t>(fewest) &&
           num_lines <= kMostLineTiles * kTileRows && head_dim % kStepItems == 0 &&
           head_dim <= kMostTileDim;
  }

  // False if it is not for tiles.
  static bool prepare(const PrepareTask& task) {
    if (!uses_tiles(task.type, task.num_lines, task.head_dim)) return false;
    if (task.type == FloatType::float16) {
      TileQueries<typename M::Isa, Half>::prepare(task);
    } else {
      TileQueries<typename M::Isa, Bfloat>::prepare(task);
    }
    return true;
  }

  static bool attend(const UnitTask& task) {
    if (!uses_tiles(task.shape.type, task.num_lines, task.shape.head_dim)) return false;
    const FlushDenormals flush;
    if (task.shape.type == FloatType::float16) {
      TileUnit<M, Half, kAheadRows>::attend(task);
    } else {
      TileUnit<M, Bfloat, kAheadRows>::attend(task);
    }
    return true;
  }
};

}  // namespace
}  // namespace tiermem
