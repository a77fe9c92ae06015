// One unit of many lines, as of rows of a prompt. K and V are widened once for all lines, and the lanes of
// the scores are lines, so that no sums over lanes are needed:
//   scores   z[token][line], a tile of tokens and two vectors of lines at a time; K is broadcast
//   softmax  as in attention_block.h
//   sums     as there, for a few lines and two vectors of columns at a time
#pragma once

#include "attention_feed.h"
#include "attention_pages.h"
#include "attention_vectors.h"

namespace tiermem {
namespace {

// Fewer lines leave too many lanes unused.
constexpr std::size_t kFewestPanelLines = 12;
// Widened K and V of 64 tokens lie on the stack.
constexpr std::size_t kMostPanelDim = 256;

inline bool uses_panels(std::size_t num_lines, std::size_t padded_dim) {
  return num_lines >= kFewestPanelLines && padded_dim <= kMostPanelDim;
}

// Two vectors of lines and their running softmax. Passed by value: see BlockTask.
struct PanelTask {
  const float* queries;   // (head_dim, kWidth)
  const SeenRange* sees;  // (num_lines)
  float* weighted;        // (num_lines, padded_dim)
  float* peak;            // (kWidth): of each line
  float* total;           // as peak
  int num_lines;          // at most kWidth
  int head_dim;
  int padded_dim;
  int first_line;         // of the unit
  const PageSums* pages;  // null: not wanted
};

template <class Isa>
struct Panel {
  using Vec = typename Isa::Vec;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kWidth = 2 * kLanes;
  static constexpr int kTile = Isa::kPanelTokens;
  // Not a power of two, so that rows do not compete for the same sets of the first-level cache.
  static constexpr int kStride = static_cast<int>(kMostPanelDim + kMostLanes);

  struct Tokens {
    alignas(64) float keys[kTokens * kStride];
    alignas(64) float values[kTokens * kStride];  // 0 from head_dim to padded_dim
  };

  static void fold(const TokenFeed& feed, const Tokens& tokens, PanelTask task) {
    alignas(64) float scores[kTokens * kWidth];
    const bool is_wide = task.num_lines > kLanes;
    if (is_wide) {
      score<2>(tokens.keys, feed.count(), task, scores);
    } else {
      score<1>(tokens.keys, feed.count(), task, scores);
    }
    mask(feed, task, scores);
    for (int lane = 0; lane < task.num_lines; lane += kLanes) {
      if (task.pages != nullptr) sum_pages(feed, task, lane, scores + lane);
      soften(feed.count(), task, lane, scores + lane);
    }
    for (int t = 0; t < feed.count(); t += kSumTokens) {
      const int end = t + kSumTokens < feed.count() ? t + kSumTokens : feed.count();
      int line = 0;
      for (; line + Isa::kPanelLines <= task.num_lines; line += Isa::kPanelLines) {
        sum_lines<Isa::kPanelLines>(tokens.values, task, scores, t, end, line);
      }
      for (; line < task.num_lines; ++line) {
        sum_lines<1>(tokens.values, task, scores, t, end, line);
      }
    }
  }

  template <int kVectors>
  static void score(const float* keys, int count, PanelTask task, float* scores) {
    for (int t = 0; t < count; t += kTile) {
      Vec sums[kTile * kVectors];
      TIERMEM_UNROLL
      for (int i = 0; i < kTile * kVectors; ++i) sums[i] = Isa::all(0.0F);
      const float* tile = keys + t * kStride;
      const float* queries = task.queries;
      for (int d = 0; d < task.head_dim; ++d, queries += kWidth) {
        Vec q[kVectors];
        TIERMEM_UNROLL
        for (int w = 0; w < kVectors; ++w) q[w] = Isa::load(queries + w * kLanes);
        TIERMEM_UNROLL
        for (int i = 0; i < kTile; ++i) {
          const Vec k = Isa::all(tile[i * kStride + d]);
          TIERMEM_UNROLL
          for (int w = 0; w < kVectors; ++w) {
            sums[i * kVectors + w] = Isa::multiply_add(k, q[w], sums[i * kVectors + w]);
          }
        }
      }
      TIERMEM_UNROLL
      for (int i = 0; i < kTile; ++i) {
        TIERMEM_UNROLL
        for (int w = 0; w < kVectors; ++w) {
          Isa::store(scores + (t + i) * kWidth + w * kLanes, sums[i * kVectors + w]);
        }
      }
    }
  }

  // Sets what a line does not see to -infinity.
  static void mask(const TokenFeed& feed, PanelTask task, float* scores) {
    for (int g = 0; g < task.num_lines; ++g) {
      const SeenRange seen = task.sees[g];
      if (seen.start <= feed.lowest() && feed.highest() < seen.end) continue;
      for (int t = 0; t < feed.count(); ++t) {
        const std::int64_t position = feed.positions()[t];
        if (position < seen.start || position >= seen.end) scores[t * kWidth + g] = -kInfinity;
      }
    }
  }

  // Of one vector of lines, from line `first` on.
  [[gnu::noinline]] static void sum_pages(const TokenFeed& feed, PanelTask task, int first,
                                          const float* scores) {
    for (int p = 0; p < feed.num_parts(); ++p) {
      const PagePart part = feed.parts()[p];
      Vec top = Isa::all(kLowest);
      for (int t = part.start; t < part.end; ++t) top = Isa::max(top, Isa::load(scores + t * kWidth));
      Vec total = Isa::all(0.0F);
      for (int t = part.start; t < part.end; ++t) {
        const Vec below = Isa::subtract(Isa::load(scores + t * kWidth), top);
        total = Isa::add(total, exp2_by_parts<Isa>(below));
      }
      alignas(64) float tops[kLanes], totals[kLanes];
      Isa::store(tops, top);
      Isa::store(totals, total);
      for (int g = 0; g < kLanes && first + g < task.num_lines; ++g) {
        task.pages->add(task.first_line + first + g, part, tops[g], totals[g]);
      }
    }
  }

  // Of one vector of lines, from line `first` on: scores become weights.
  static void soften(int count, PanelTask task, int first, float* scores) {
    Vec top = Isa::all(-kInfinity);
    for (int t = 0; t < count; ++t) top = Isa::max(top, Isa::load(scores + t * kWidth));
    Vec peak = Isa::load(task.peak + first);
    Vec total = Isa::load(task.total + first);
    if (Isa::any_above(top, Isa::add(peak, Isa::all(kRescaleAbove)))) {
      const Vec old = peak;
      peak = Isa::max(old, top);
      const Vec factors = exp2_by_parts<Isa>(Isa::subtract(old, peak));
      total = Isa::multiply(total, factors);
      Isa::store(task.peak + first, peak);
      const int lines = task.num_lines - first < kLanes ? task.num_lines - first : kLanes;
      rescale<Isa>(task.weighted + first * task.padded_dim, task.padded_dim, lines, factors);
    }
    for (int t = 0; t < count; ++t) {
      const Vec score = Isa::load(scores + t * kWidth);
      const Vec weight = exp2_by_parts<Isa>(Isa::subtract(score, peak));
      total = Isa::add(total, weight);
      Isa::store(scores + t * kWidth, weight);
    }
    Isa::store(task.total + first, total);
  }

  template <int kLines>
  static void sum_lines(const float* values, PanelTask task, const float* weights, int start,
                        int end, int line) {
    const float* of_lines = weights + line;
    float* weighted = task.weighted + line * task.padded_dim;
    int d = 0;
    for (; d + 2 * kLanes <= task.padded_dim; d += 2 * kLanes) {
      sum<kLines, 2>(values + d, of_lines, start, end, weighted + d, task.padded_dim);
    }
    for (; d < task.padded_dim; d += kLanes) {
      sum<kLines, 1>(values + d, of_lines, start, end, weighted + d, task.padded_dim);
    }
  }

  template <int kLines, int kVectors>
  static void sum(const float* values, const float* weights, int start, int end, float* weighted,
                  int padded_dim) {
    Vec sums[kLines * kVectors];
    TIERMEM_UNROLL
    for (int g = 0; g < kLines; ++g) {
      TIERMEM_UNROLL
      for (int w = 0; w < kVectors; ++w) {
        sums[g * kVectors + w] = Isa::load(weighted + g * padded_dim + w * kLanes);
      }
    }
    for (int t = start; t < end; ++t) {
      Vec v[kVectors];
      TIERMEM_UNROLL
      for (int w = 0; w < kVectors; ++w) v[w] = Isa::load(values + t * kStride + w * kLanes);
      TIERMEM_UNROLL
      for (int g = 0; g < kLines; ++g) {
        const Vec weight = Isa::all(weights[t * kWidth + g]);
        TIERMEM_UNROLL
        for (int w = 0; w < kVectors; ++w) {
          sums[g * kVectors + w] = Isa::multiply_add(v[w], weight, sums[g * kVectors + w]);
        }
      }
    }
    TIERMEM_UNROLL
    for (int g = 0; g < kLines; ++g) {
      TIERMEM_UNROLL
      for (int w = 0; w < kVectors; ++w) {
        Isa::store(weighted + g * padded_dim + w * kLanes, sums[g * kVectors + w]);
      }
    }
  }
};

template <class Isa, class Item>
struct Panels {
  using One = Panel<Isa>;

  static PanelTask panel_task(const UnitTask& task, std::size_t line, const PageSums& pages) {
    const std::size_t left = task.num_lines - line;
    const std::size_t width = One::kWidth;
    return {task.queries + line * task.padded_dim,
            task.sees + line,
            task.partial.weighted + line * task.padded_dim,
            task.partial.peak + line,
            task.partial.total + line,
            static_cast<int>(left < width ? left : width),
            static_cast<int>(task.shape.head_dim),
            static_cast<int>(task.padded_dim),
            static_cast<int>(line),
            pages.are_wanted() ? &pages : nullptr};
  }

  static void widen_row(const std::byte* row, int head_dim, int padded_dim, float* to) {
    const auto* items = reinterpret_cast<const Item*>(row);
    int d = 0;
    for (; d + Isa::kLanes <= head_dim; d += Isa::kLanes) Isa::store(to + d, Isa::load(items + d));
    for (; d < padded_dim; d += Isa::kLanes) {
      const int count = head_dim - d;
      Isa::store(to + d, load_some<Isa>(items + d, count > 0 ? count : 0));
    }
  }

  static void widen(const TokenFeed& feed, const UnitTask& task, typename One::Tokens& tokens) {
    const int head_dim = static_cast<int>(task.shape.head_dim);
    const int padded_dim = static_cast<int>(task.padded_dim);
    for (int t = 0; t < feed.count() || t % One::kTile != 0; ++t) {
      feed.fetch_row(feed.ahead_of_key(t));
      widen_row(feed.keys()[t], head_dim, padded_dim, tokens.keys + t * One::kStride);
    }
    for (int t = 0; t < feed.count(); ++t) {
      feed.fetch_row(feed.ahead_of_value(t));
      widen_row(feed.values()[t], head_dim, padded_dim, tokens.values + t * One::kStride);
    }
  }

  static void attend(const UnitTask& task) {
    typename One::Tokens tokens;
    const PageSums pages(task.page_output);
    clear_partial(task.partial, task.num_lines, task.padded_dim,
                  (task.num_lines + One::kWidth - 1) / One::kWidth * One::kWidth);
    for (TokenFeed feed(task); feed.count() > 0; feed.next()) {
      widen(feed, task, tokens);
      for (std::size_t line = 0; line < task.num_lines; line += One::kWidth) {
        const PanelTask panel = panel_task(task, line, pages);
        if (feed.any_sees(panel.sees, panel.num_lines)) {
          One::fold(feed, tokens, panel);
        } else if (pages.are_wanted()) {
          pages.add_nothing(feed, panel.first_line, panel.num_lines);
        }
      }
    }
  }
};

}  // namespace
}  // namespace tiermem
