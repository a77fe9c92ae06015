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
  static constexpr int kSteps = kTokens / kStepItems;  // of a block
  static constexpr int kChunkPairs = 4;                // of tokens, whose scores become weights at once
  static constexpr int kStepChunks = kTileRows / kChunkPairs;
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
    start(tiles, feed);
    for (; feed.count() > 0; feed.next()) {
      RowFetcher fetcher(feed, kAheadRows);
      scores_ = block_scores_[num_blocks_ % 2];
      num_steps_ = steps_of(feed.count());
      mask(feed);
      if (pages_.are_wanted()) sum_pages(feed);
      num_softened_ = 0;
      if (feed.next_count() > 0) score(tiles, feed, true, fetcher);
      soften_until(num_chunks());
      sum(tiles, feed, fetcher);
      ++num_blocks_;
    }
    finish();
  }

  // The first block's scores.
  void start(Tiles& tiles, const TokenFeed& feed) {
    for (int i = 0; i < kTokens; ++i) feed.fetch_row(feed.row_from_here(i));
    RowFetcher fetcher(feed, kTokens);
    score(tiles, feed, false, fetcher);
  }

  // Steps of a block's tokens.
  static int steps_of(int num_tokens) { return (num_tokens + kStepItems - 1) / kStepItems; }

  // -- Scores -------------------------------------------------------------------------------------

  static std::int64_t bytes(int num_tiles) { return std::int64_t{num_tiles} * kTileRows * kRowBytes; }
  static const Item* items(const std::byte* row) { return reinterpret_cast<const Item*>(row); }

  // Sixteen tokens' K where it lies, or where gather_keys() is to put it.
  KeyTile key_tile(const TokenFeed& feed, bool is_next, int token) const {
    const std::byte* const* rows = (is_next ? feed.next_keys() : feed.keys()) + token;
    if (kItemParts == 1 && feed.are_in_a_row(is_next, token, token + kTileRows)) {
      return {rows[0], rows[1] - rows[0], kRowBytes};
    }
    const Pair* to = keys_[0][token / kTileRows % 2][0];
    return {reinterpret_cast<const std::byte*>(to), kRowBytes, bytes(1)};
  }

  // A step of two tiles of tokens.
  void gather_keys(const std::byte* const* rows, const KeyTile* keys, int step) {
    const std::size_t at = static_cast<std::size_t>(step) * kStepItems * sizeof(Item);
    for (int i = 0; i < 2; ++i) {
      if (keys[i].step == kRowBytes) continue;
      Pair* to = keys_[0][i][step];
      for (int r = 0; r < kTileRows; ++r, to += kTileRows) {
        const std::byte* row = rows[i * kTileRows + r] + at;
        if constexpr (kItemParts == 2) {
          M::split(items(row), items(row) + kStepItems / 2, to, to + kKeyPart);
        } else {
          std::memcpy(to, row, kRowBytes);
        }
      }
    }
  }

  // This block's scores, or the next one's, while this one's become weights.
  void score(Tiles& tiles, const TokenFeed& feed, bool is_next, RowFetcher& fetcher) {
    const int num_steps = steps_of(is_next ? feed.next_count() : feed.count());
    const int num_calls = num_steps * ((line_tiles_ + 1) / 2) * steps_;
    fetcher.spread(is_next ? kTokens : kAheadRows - kTokens, num_calls);
    chunks_per_call_ = is_next ? (num_chunks() + num_calls - 1) / num_calls : 0;
    for (int half = 0; half < num_steps; ++half) {
      const int token = half * kStepItems;
      const KeyTile keys[2] = {key_tile(feed, is_next, token),
                               key_tile(feed, is_next, token + kTileRows)};
      const std::byte* const* rows = (is_next ? feed.next_keys() : feed.keys()) + token;
      float* scores = block_scores_[(num_blocks_ + (is_next ? 1 : 0)) % 2] + token * num_lanes_;
      for (int tile = 0; tile < line_tiles_; tile += 2) {
        if (tile + 1 < line_tiles_) {
          score_tiles<2>(tiles, rows, keys, tile, scores + tile * kTileRows, fetcher);
        } else {
          score_tiles<1>(tiles, rows, keys, tile, scores + tile * kTileRows, fetcher);
        }
      }
    }
    fetcher.finish();
  }

  // Tile 2 i + j: tokens of keys[i], lines of line tile `tile` + j. The first line tiles gather K, a step
  // before it is multiplied.
  template <int kWide>
  void score_tiles(Tiles& tiles, const std::byte* const* rows, const KeyTile* keys, int tile,
                   float* scores, RowFetcher& fetcher) {
    if (tile == 0) gather_keys(rows, keys, 0);
    tiles.template zero<0>();
    tiles.template zero<2>();
    if constexpr (kWide == 2) {
      tiles.template zero<1>();
      tiles.template zero<3>();
    }
    const auto* high = reinterpret_cast<const Pair*>(task_.queries) + tile * steps_ * kTilePairs;
    const Pair* low = high + line_tiles_ * steps_ * kTilePairs;
    for (int s = 0; s < steps_; ++s) {
      if (tile == 0 && s + 1 < steps_) gather_keys(rows, keys, s + 1);
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
      soften_until(num_softened_ + chunks_per_call_);
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
  void mask(const TokenFeed& feed) {
    for (int i = feed.count() * num_lanes_; i < num_steps_ * kStepItems * num_lanes_; ++i) {
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

  // Scores become weights, in tiles with the lines as rows, a few tokens of a line tile at a time.
  int num_chunks() const { return line_tiles_ * num_steps_ * kStepChunks; }

  void soften_until(int chunk) {
    if (chunk > num_chunks()) chunk = num_chunks();
    for (; num_softened_ < chunk; ++num_softened_) {
      const int step = num_softened_ / kStepChunks;
      soften(step / num_steps_, step % num_steps_, num_softened_ % kStepChunks);
    }
  }

  void soften(int tile, int step, int chunk) {
    if (step == 0 && chunk == 0) {
      for (int lane = 0; lane < kTileRows; lane += kLanes) move_peak(tile, lane);
    }
    for (int lane = 0; lane < kTileRows; lane += kLanes) {
      const int line = tile * kTileRows + lane;
      const float* row = scores_ + (step * kStepItems + 2 * chunk * kChunkPairs) * num_lanes_ + line;
      const Vec minus_peak = Isa::subtract(Isa::all(0.0F), Isa::load(peak_ + line));
      Vec total = Isa::load(total_ + line);
      float* high = high_ + chunk * kChunkPairs * kTileRows + lane;
      float* low = low_ + chunk * kChunkPairs * kTileRows + lane;
      TIERMEM_UNROLL
      for (int r = 0; r < kChunkPairs; ++r, row += 2 * num_lanes_) {
        const Vec a = weight(Isa::load(row), minus_peak);
        const Vec b = weight(Isa::load(row + num_lanes_), minus_peak);
        total = Isa::add(total, Isa::add(a, b));
        Isa::store(high + r * kTileRows, M::high_pair(a, b));
        Isa::store(low + r * kTileRows, M::high_pair(M::rest(a), M::rest(b)));
      }
      Isa::store(total_ + line, total);
    }
    if (chunk + 1 == kStepChunks) {
      M::transpose(high_, weights_[0][tile][step]);
      M::transpose(low_, weights_[1][tile][step]);
    }
  }

  void move_peak(int tile, int lane) {
    const int line = tile * kTileRows + lane;
    const float* scores = scores_ + line;
    Vec top = Isa::all(-kInfinity);
    for (int t = 0; t < num_steps_ * kStepItems; ++t) {
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

  // Of 32 tokens, two tiles of sixteen columns.
  void gather_values(const TokenFeed& feed, int column, int step) {
    const std::size_t at = static_cast<std::size_t>(column) * kStepItems;
    const std::byte* const* rows = feed.values() + step * kStepItems;
    Pair* first = values_[0][0][step];
    Pair* second = values_[0][1][step];
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

  void sum(Tiles& tiles, const TokenFeed& feed, RowFetcher& fetcher) {
    fetcher.spread(kTokens, steps_ * ((line_tiles_ + 1) / 2));
    for (int column = 0; column < steps_; ++column) {
      for (int tile = 0; tile < line_tiles_; tile += 2) {
        if (tile + 1 < line_tiles_) {
          sum_tiles<2>(tiles, feed, tile, column);
        } else {
          sum_tiles<1>(tiles, feed, tile, column);
        }
        fetcher.step();
      }
    }
    fetcher.finish();
  }

  // Tile 2 i + j: lines of line tile `tile` + i, columns of the j-th sixteen. The first line tiles gather V,
  // a step before it is multiplied.
  template <int kTall>
  void sum_tiles(Tiles& tiles, const TokenFeed& feed, int tile, int column) {
    if (tile == 0) gather_values(feed, column, 0);
    tiles.template load<0>(sums_at(tile, 2 * column), kRowBytes);
    tiles.template load<1>(sums_at(tile, 2 * column + 1), kRowBytes);
    if constexpr (kTall == 2) {
      tiles.template load<2>(sums_at(tile + 1, 2 * column), kRowBytes);
      tiles.template load<3>(sums_at(tile + 1, 2 * column + 1), kRowBytes);
    }
    for (int s = 0; s < num_steps_; ++s) {
      if (tile == 0 && s + 1 < num_steps_) gather_values(feed, column, s + 1);
      load_values(tiles, values_[0], s);
      load_weights<kTall>(tiles, weights_[1] + tile, s);
      multiply<kTall, 2>(tiles);
      load_weights<kTall>(tiles, weights_[0] + tile, s);
      multiply<kTall, 2>(tiles);
      if constexpr (kItemParts == 2) {
        load_values(tiles, values_[1], s);
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

  float* scores_ = nullptr;  // this block's, (token, line)
  int num_blocks_ = 0;       // done
  int num_steps_ = 0;        // of this block's tokens
  int num_softened_ = 0;     // chunks of this block
  int chunks_per_call_ = 0;  // of score_tiles' steps

  alignas(64) float peak_[kMostLineTiles * kTileRows];
  alignas(64) float total_[kMostLineTiles * kTileRows];
  alignas(64) float block_scores_[2][kTokens * kMostLineTiles * kTileRows];  // (token, line)
  alignas(64) float high_[kTilePairs], low_[kTilePairs];                     // (pair of tokens, line)
  alignas(64) Pair weights_[2][kMostLineTiles][kSteps][kTilePairs];             // high, low
  alignas(64) Pair keys_[kItemParts][2][kMostSteps][kTilePairs];  // part, tile of tokens
  alignas(64) Pair values_[kItemParts][2][kSteps][kTilePairs];    // part, tile of columns
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
