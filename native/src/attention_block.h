// One unit: for each 64 tokens of its run, and for each block of up to 8 query lines,
//   scores   z[token][line] = q . k in base 2, a tile of as many tokens and lines as a vector has lanes;
//            their sums over head_dim are formed side by side and turned into lanes at the end
//   softmax  the running maximum is moved only when it is exceeded by 8 (256-fold), so that sums
//            seldom have to be rescaled (after Dao et al. 2022, arXiv:2205.14135)
//   sums     += 2^(z - peak) * v, 16 tokens at a time: 4 KiB of V, read in order
#pragma once

#include "attention_feed.h"
#include "attention_pages.h"
#include "attention_vectors.h"

namespace tiermem {
namespace {

constexpr int power_of_two_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

constexpr int power_of_two_up_to(int n) {
  int power = 1;
  while (2 * power <= n) power *= 2;
  return power;
}

// A block of lines and its running softmax. Passed by value: vector stores may alias anything in memory.
struct BlockTask {
  const float* queries;    // (padded_dim / lanes, lines, lanes)
  const SeenRange* sees;   // (lines)
  float* weighted;         // (lines, padded_dim)
  float* peak;             // (kMostLanes): per lane, the same for all lanes of a line
  float* total;            // (kMostLanes): per lane; a line's is the sum over its lanes
  int head_dim;
  int padded_dim;
  int first_line;         // of the unit
  const PageSums* pages;  // null: not wanted
  bool fetches;  // whether it prefetches: the first of the blocks that go through the same tokens
};

// kLines lines at once. A token takes kPeriod lanes of the scores, one a line and unused ones.
template <class Isa, class Item, int kLines>
struct Block {
  using Vec = typename Isa::Vec;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kPeriod = power_of_two_from(kLines);
  static constexpr int kTile = kLanes / kPeriod;
  static constexpr int kWidth = power_of_two_up_to(Isa::kSums / kLines > 8 ? 8 : Isa::kSums / kLines);

  static constexpr int kLineItems = kLineBytes / static_cast<int>(sizeof(Item));
  static_assert(kLineItems % kLanes == 0);

  static constexpr bool begins_line(int item) {
    return item % kLineItems == 0;
  }

  static const Item* items(const std::byte* row) { return reinterpret_cast<const Item*>(row); }

  static void fold(const TokenFeed& feed, BlockTask task) {
    alignas(64) float scores[kTokens * kPeriod];
    score(feed, task, scores);
    mask(feed, task, scores);
    if (task.pages != nullptr) sum_pages(feed, task, scores);
    soften(feed.count(), task, scores);
    for (int t = 0; t < feed.count(); t += kSumTokens) {
      const int end = t + kSumTokens < feed.count() ? t + kSumTokens : feed.count();
      const int d = sum_columns<kWidth>(feed, task, scores, t, end, 0);
      if (d < task.head_dim) sum<1, true>(feed, task, scores, t, end, d);
    }
  }

  static void score(const TokenFeed& feed, BlockTask task, float* scores) {
    for (int t = 0; t < feed.count(); t += kTile) {
      Vec sums[kLanes];
      TIERMEM_UNROLL
      for (int i = 0; i < kLanes; ++i) sums[i] = Isa::all(0.0F);
      int d = 0;
      for (; d + kLineItems <= task.head_dim; d += kLineItems) {
        if (task.fetches) {
          TIERMEM_UNROLL
          for (int i = 0; i < kTile; ++i) fetch(items(feed.ahead_of_key(t + i)) + d);
        }
        TIERMEM_UNROLL
        for (int part = 0; part < kLineItems; part += kLanes) {
          multiply<false>(feed.keys() + t, task, d + part, sums);
        }
      }
      for (; d + kLanes <= task.head_dim; d += kLanes) {
        multiply<false>(feed.keys() + t, task, d, sums);
      }
      if (d < task.head_dim) multiply<true>(feed.keys() + t, task, d, sums);
      Isa::store(scores + t * kPeriod, Isa::sums(sums));
    }
  }

  template <bool kPart>
  static void multiply(const std::byte* const* rows, BlockTask task, int d, Vec* sums) {
    const float* queries = task.queries + d * kLines;
    TIERMEM_UNROLL
    for (int i = 0; i < kTile; ++i) {
      const Item* from = items(rows[i]) + d;
      Vec k;
      if constexpr (kPart) {
        k = load_some<Isa>(from, task.head_dim - d);
      } else {
        k = Isa::load(from);
      }
      TIERMEM_UNROLL
      for (int g = 0; g < kLines; ++g) {
        const Vec q = Isa::load(queries + g * kLanes);
        sums[i * kPeriod + g] = Isa::multiply_add(k, q, sums[i * kPeriod + g]);
      }
    }
  }

  // Sets what a line does not see, and what lies beyond the last token, to -infinity.
  static void mask(const TokenFeed& feed, BlockTask task, float* scores) {
    const int count = feed.count();
    for (int i = count * kPeriod; i % kLanes != 0; ++i) scores[i] = -kInfinity;
    for (int g = 0; g < kLines; ++g) {
      const SeenRange seen = task.sees[g];
      if (seen.start <= feed.lowest() && feed.highest() < seen.end) continue;
      for (int t = 0; t < count; ++t) {
        const std::int64_t position = feed.positions()[t];
        if (position < seen.start || position >= seen.end) scores[t * kPeriod + g] = -kInfinity;
      }
    }
  }

  [[gnu::noinline]] static void sum_pages(const TokenFeed& feed, BlockTask task,
                                          const float* scores) {
    for (int p = 0; p < feed.num_parts(); ++p) {
      const PagePart part = feed.parts()[p];
      const int start = part.start * kPeriod;
      const int end = part.end * kPeriod;
      const int first = start / kLanes * kLanes;
      Vec top = Isa::all(-kInfinity);
      for (int i = first; i < end; i += kLanes) top = Isa::max(top, within(scores, i, start, end));
      top = Isa::max(Isa::all(kLowest), Isa::template max_of_lines<kPeriod>(top));
      Vec total = Isa::all(0.0F);
      for (int i = first; i < end; i += kLanes) {
        const Vec below = Isa::subtract(within(scores, i, start, end), top);
        total = Isa::add(total, exp2_by_parts<Isa>(below));
      }
      alignas(64) float tops[kLanes], totals[kLanes];
      Isa::store(tops, top);
      Isa::store(totals, total);
      for (int i = kPeriod; i < kLanes; ++i) totals[i % kPeriod] += totals[i];
      for (int g = 0; g < kLines; ++g) {
        task.pages->add(task.first_line + g, part, tops[g], totals[g]);
      }
    }
  }

  // A vector of scores from i on, -infinity where it is not within [start, end).
  static Vec within(const float* scores, int i, int start, int end) {
    if (start <= i && i + kLanes <= end) return Isa::load(scores + i);
    alignas(64) float some[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      some[j] = start <= i + j && i + j < end ? scores[i + j] : -kInfinity;
    }
    return Isa::load(some);
  }

  // Turns scores into weights 2^(score - peak) and adds them to the totals.
  static void soften(int count, BlockTask task, float* scores) {
    const int end = count * kPeriod;
    Vec top = Isa::all(-kInfinity);
    for (int i = 0; i < end; i += kLanes) top = Isa::max(top, Isa::load(scores + i));
    top = Isa::template max_of_lines<kPeriod>(top);
    Vec peak = Isa::load(task.peak);
    Vec total = Isa::load(task.total);
    if (Isa::any_above(top, Isa::add(peak, Isa::all(kRescaleAbove)))) {
      const Vec old = peak;
      peak = Isa::max(old, top);
      const Vec factors = exp2_by_parts<Isa>(Isa::subtract(old, peak));
      total = Isa::multiply(total, factors);
      Isa::store(task.peak, peak);
      rescale<Isa>(task.weighted, task.padded_dim, kLines, factors);
    }
    for (int i = 0; i < end; i += kLanes) {
      const Vec weights = exp2_by_parts<Isa>(Isa::subtract(Isa::load(scores + i), peak));
      total = Isa::add(total, weights);
      Isa::store(scores + i, weights);
    }
    Isa::store(task.total, total);
  }

  // Columns from d on, as wide as fits, then narrower; returns the first one left: no whole vector.
  template <int kVectors>
  static int sum_columns(const TokenFeed& feed, BlockTask task, const float* weights,
                         int start, int end, int d) {
    for (; d + kVectors * kLanes <= task.head_dim; d += kVectors * kLanes) {
      sum<kVectors, false>(feed, task, weights, start, end, d);
    }
    if constexpr (kVectors > 1) {
      d = sum_columns<kVectors / 2>(feed, task, weights, start, end, d);
    }
    return d;
  }

  // Adds weight * V of tokens [start, end) to kVectors vectors of every line, from column d on.
  template <int kVectors, bool kPart>
  static void sum(const TokenFeed& feed, BlockTask task, const float* weights, int start,
                  int end, int d) {
    Vec sums[kLines * kVectors];
    TIERMEM_UNROLL
    for (int g = 0; g < kLines; ++g) {
      TIERMEM_UNROLL
      for (int w = 0; w < kVectors; ++w) {
        sums[g * kVectors + w] = Isa::load(task.weighted + g * task.padded_dim + d + w * kLanes);
      }
    }
    for (int t = start; t < end; ++t) {
      const Item* from = items(feed.values()[t]) + d;
      if (task.fetches) fetch_columns<kVectors>(items(feed.ahead_of_value(t)), d);
      Vec v[kVectors];
      TIERMEM_UNROLL
      for (int w = 0; w < kVectors; ++w) {
        if constexpr (kPart) {
          v[w] = load_some<Isa>(from, task.head_dim - d);
        } else {
          v[w] = Isa::load(from + w * kLanes);
        }
      }
      TIERMEM_UNROLL
      for (int g = 0; g < kLines; ++g) {
        const Vec weight = Isa::all(weights[t * kPeriod + g]);
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
        Isa::store(task.weighted + g * task.padded_dim + d + w * kLanes, sums[g * kVectors + w]);
      }
    }
  }

  template <int kVectors>
  static void fetch_columns(const Item* row, int d) {
    TIERMEM_UNROLL
    for (int w = 0; w < kVectors; ++w) {
      if (begins_line(d + w * kLanes)) fetch(row + d + w * kLanes);
    }
  }

  // Leaves each line's total in its lane, when all tokens are in.
  static void close(BlockTask task) {
    for (int i = kPeriod; i < kLanes; ++i) task.total[i % kPeriod] += task.total[i];
  }
};

// Block's functions for 1 to Isa::kBlockLines lines.
template <class Isa, class Item>
struct Blocks {
  struct Functions {
    void (*fold)(const TokenFeed&, BlockTask);
    void (*close)(BlockTask);
  };

  template <int kLines>
  static constexpr Functions functions() {
    if constexpr (kLines > Isa::kBlockLines) {
      return {nullptr, nullptr};
    } else {
      return {&Block<Isa, Item, kLines>::fold, &Block<Isa, Item, kLines>::close};
    }
  }

  static constexpr Functions kOfLines[kMostBlockLines + 1] = {
      {nullptr, nullptr}, functions<1>(), functions<2>(), functions<3>(), functions<4>(),
      functions<5>(),     functions<6>(), functions<7>(), functions<8>()};

  static BlockTask block_task(const UnitTask& task, const LineBlocks& blocks, std::size_t block,
                              const PageSums& pages) {
    const std::size_t line = blocks.start(block);
    return {task.queries + line * task.padded_dim,
            task.sees + line,
            task.partial.weighted + line * task.padded_dim,
            task.partial.peak + block * kMostLanes,
            task.partial.total + block * kMostLanes,
            static_cast<int>(task.shape.head_dim),
            static_cast<int>(task.padded_dim),
            static_cast<int>(line),
            pages.are_wanted() ? &pages : nullptr,
            false};
  }

  static void attend(const UnitTask& task) {
    const LineBlocks blocks(task.num_lines, Isa::kBlockLines);
    const PageSums pages(task.page_output);
    clear_partial(task.partial, task.num_lines, task.padded_dim, blocks.num_blocks * kMostLanes);
    for (TokenFeed feed(task); feed.count() > 0; feed.next()) {
      bool fetches = true;
      for (std::size_t i = 0; i < blocks.num_blocks; ++i) {
        BlockTask block = block_task(task, blocks, i, pages);
        const int lines = static_cast<int>(blocks.start(i + 1) - blocks.start(i));
        if (!feed.any_sees(block.sees, lines)) {
          if (pages.are_wanted()) pages.add_nothing(feed, block.first_line, lines);
          continue;
        }
        block.fetches = fetches;
        fetches = false;
        kOfLines[lines].fold(feed, block);
      }
    }
    for (std::size_t i = 0; i < blocks.num_blocks; ++i) {
      kOfLines[blocks.start(i + 1) - blocks.start(i)].close(block_task(task, blocks, i, pages));
    }
  }
};

}  // namespace
}  // namespace tiermem
