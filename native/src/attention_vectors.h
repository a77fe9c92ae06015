// The attention kernel over a set of vector instructions `Isa`, which the including file defines.
//
// One unit: for each 64 tokens of its run, and for each block of up to 8 query lines,
//   scores   z[token][line] = q . k in base 2, a tile of as many tokens and lines as a vector has lanes;
//            their sums over head_dim are formed side by side and turned into lanes at the end
//   softmax  the running maximum is moved only when it is exceeded by 8 (256-fold), so that sums
//            seldom have to be rescaled (after Dao et al. 2022, arXiv:2205.14135)
//   sums     += 2^(z - peak) * v, 16 tokens at a time: 4 KiB of V, read in order
// Memory is read strictly in order, with a prefetch into the second-level cache 8 KiB ahead. On 15 threads
// of an Emerald Rapids that took the rate of this scheme from 48 to 100 GB/s and more.
//
// Everything here is in an unnamed namespace and uses no inline function of the standard library: it is
// compiled for instructions that not every processor has, and must not become the program's copy of anything.
//
// Isa has: Vec; kLanes (a power of two, at most kMostLanes); kBlockLines (at most kLanes and
// kMostBlockLines); kSums, accumulators that fit the registers beside operands; and functions used below.
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

constexpr int kTokens = 64;          // of a block: K and V of 32 KiB for head_dim 128 in half precision
constexpr int kSumTokens = 16;       // that are summed before the accumulators are stored
constexpr int kLineBytes = 64;       // of the caches
constexpr int kAheadBytes = 8 << 10;  // from what is read to what is prefetched
constexpr float kLowest = -3.402823466e+38F;
constexpr float kInfinity = __builtin_inff();
constexpr float kRescaleAbove = 8.0F;  // in base 2

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

// 2^x for x up to 127 by range reduction; a minimax polynomial on [-1/2, 1/2], relative error 1.7e-7. The
// result is 0 from -127 down, and NaN for NaN.
template <class Isa>
typename Isa::Vec exp2_by_parts(typename Isa::Vec x) {
  // The maximum of the two is the second one if either is NaN.
  x = Isa::max(Isa::all(-127.0F), x);
  const typename Isa::Vec whole = Isa::round(x);
  const typename Isa::Vec part = Isa::subtract(x, whole);
  typename Isa::Vec y = Isa::all(0.001326472731307149F);
  y = Isa::multiply_add(y, part, Isa::all(0.009671512991189957F));
  y = Isa::multiply_add(y, part, Isa::all(0.05550733581185341F));
  y = Isa::multiply_add(y, part, Isa::all(0.24022242426872253F));
  y = Isa::multiply_add(y, part, Isa::all(0.6931470036506653F));
  y = Isa::multiply_add(y, part, Isa::all(1.0F));
  return Isa::times_power(y, whole);
}

// Up to 64 tokens of a run, in order, and those after them: where their K and V rows lie.
//
// The rows are a ring in the order in which they are read: K of the block, V of the block, K of the next
// one, V of the next one. What a block lacks of 64 repeats its last row, so that tiles may reach beyond.
class TokenFeed {
 public:
  explicit TokenFeed(const UnitTask& task) : task_(task) {
    const KvShape& shape = task.shape;
    row_bytes_ = shape.head_dim * bytes_of(shape.type);
    head_at_ = task.kv_head * shape.page_tokens * row_bytes_;
    values_at_ = shape.num_kv_heads * shape.page_tokens * row_bytes_;
    const std::size_t rows = kAheadBytes / row_bytes_;
    ahead_ = rows > kTokens ? kTokens : rows < 1 ? 1 : static_cast<int>(rows);
    fill(0);
    fill(1);
    for (int i = 0; i < ahead_; ++i) fetch_row(rows_[i]);
  }

  int count() const { return counts_[half_]; }
  const std::int64_t* positions() const { return positions_[half_]; }
  std::int64_t lowest() const { return lowest_[half_]; }
  std::int64_t highest() const { return highest_[half_]; }
  const std::byte* const* keys() const { return rows_ + half_ * 2 * kTokens; }
  const std::byte* const* values() const { return keys() + kTokens; }

  // The row to prefetch while row i of keys() or values() is read.
  const std::byte* ahead_of_key(int i) const { return rows_[(at() + i + ahead_) & kRingMask]; }
  const std::byte* ahead_of_value(int i) const {
    return rows_[(at() + kTokens + i + ahead_) & kRingMask];
  }

  void next() {
    const int done = half_;
    half_ = 1 - half_;
    fill(done);
  }

 private:
  static constexpr int kRingMask = 4 * kTokens - 1;

  int at() const { return half_ * 2 * kTokens; }

  void fetch_row(const std::byte* row) const {
    for (std::size_t at = 0; at < row_bytes_; at += kLineBytes) fetch(row + at);
  }

  // Without tokens left the rows stay as they are: prefetching them again does no harm.
  void fill(int half) {
    const std::byte** keys = rows_ + half * 2 * kTokens;
    const std::byte** values = keys + kTokens;
    int count = 0;
    lowest_[half] = INT64_MAX;
    highest_[half] = INT64_MIN;
    while (count < kTokens && page_ < task_.num_pages) {
      count = fill_from_page(half, count);
    }
    counts_[half] = count;
    for (int i = count; count > 0 && i < kTokens; ++i) {
      keys[i] = keys[count - 1];
      values[i] = values[count - 1];
    }
  }

  int fill_from_page(int half, int count) {
    const SeenPage& page = task_.pages[page_];
    const std::byte** keys = rows_ + half * 2 * kTokens;
    const std::uint32_t first = page.first + done_in_page_;
    std::uint32_t taken = page.end - first;
    const auto room = static_cast<std::uint32_t>(kTokens - count);
    if (taken > room) taken = room;
    const std::byte* row = page.slice + head_at_ + first * row_bytes_;
    const std::int64_t position = page.position + done_in_page_;
    for (std::uint32_t i = 0; i < taken; ++i, row += row_bytes_) {
      keys[count] = row;
      keys[kTokens + count] = row + values_at_;
      positions_[half][count++] = position + i;
    }
    if (position < lowest_[half]) lowest_[half] = position;
    if (position + taken - 1 > highest_[half]) highest_[half] = position + taken - 1;
    done_in_page_ += taken;
    if (page.first + done_in_page_ == page.end) {
      ++page_;
      done_in_page_ = 0;
    }
    return count;
  }

  const UnitTask& task_;
  std::size_t row_bytes_ = 0;
  std::size_t head_at_ = 0;
  std::size_t values_at_ = 0;
  int ahead_ = 1;  // rows
  int half_ = 0;
  std::size_t page_ = 0;
  std::uint32_t done_in_page_ = 0;
  int counts_[2] = {};
  std::int64_t lowest_[2] = {};
  std::int64_t highest_[2] = {};
  std::int64_t positions_[2][kTokens] = {};
  const std::byte* rows_[4 * kTokens] = {};
};

// A block of lines and its running softmax.
struct BlockTask {
  const float* queries;    // (lines, padded_dim)
  const SeenRange* sees;   // (lines)
  float* weighted;         // (lines, padded_dim)
  float* peak;             // (kMostLanes): per lane, the same for all lanes of a line
  float* total;            // (kMostLanes): per lane; a line's is the sum over its lanes
  int head_dim;
  int padded_dim;
  bool fetches;  // whether it prefetches: the first of the blocks that go through the same tokens
};

template <class Isa, class Item>
typename Isa::Vec load_some(const Item* items, int count) {
  Item full[Isa::kLanes] = {};
  std::memcpy(full, items, static_cast<std::size_t>(count) * sizeof(Item));
  return Isa::load(full);
}

// kLines lines at once. A token takes kPeriod lanes of the scores, one a line and unused ones.
template <class Isa, class Item, int kLines>
struct Block {
  using Vec = typename Isa::Vec;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kPeriod = power_of_two_from(kLines);
  static constexpr int kTile = kLanes / kPeriod;
  static constexpr int kWidth = power_of_two_up_to(Isa::kSums / kLines > 8 ? 8 : Isa::kSums / kLines);

  static constexpr bool begins_line(int item) {
    return item * static_cast<int>(sizeof(Item)) % kLineBytes == 0;
  }

  static const Item* items(const std::byte* row) { return reinterpret_cast<const Item*>(row); }

  static void fold(const TokenFeed& feed, const BlockTask& task) {
    alignas(64) float scores[kTokens * kPeriod];
    score(feed, task, scores);
    mask(feed, task, scores);
    soften(feed.count(), task, scores);
    for (int t = 0; t < feed.count(); t += kSumTokens) {
      const int end = t + kSumTokens < feed.count() ? t + kSumTokens : feed.count();
      const int d = sum_columns<kWidth>(feed, task, scores, t, end, 0);
      if (d < task.head_dim) sum<1, true>(feed, task, scores, t, end, d);
    }
  }

  static void score(const TokenFeed& feed, const BlockTask& task, float* scores) {
    for (int t = 0; t < feed.count(); t += kTile) {
      Vec sums[kLanes];
      TIERMEM_UNROLL
      for (int i = 0; i < kLanes; ++i) sums[i] = Isa::all(0.0F);
      int d = 0;
      for (; d + kLanes <= task.head_dim; d += kLanes) {
        if (task.fetches && begins_line(d)) {
          TIERMEM_UNROLL
          for (int i = 0; i < kTile; ++i) fetch(items(feed.ahead_of_key(t + i)) + d);
        }
        multiply<false>(feed.keys() + t, task, d, sums);
      }
      if (d < task.head_dim) multiply<true>(feed.keys() + t, task, d, sums);
      Isa::store(scores + t * kPeriod, Isa::sums(sums));
    }
  }

  template <bool kPart>
  static void multiply(const std::byte* const* rows, const BlockTask& task, int d, Vec* sums) {
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
        const Vec q = Isa::load(task.queries + g * task.padded_dim + d);
        sums[i * kPeriod + g] = Isa::multiply_add(k, q, sums[i * kPeriod + g]);
      }
    }
  }

  // Sets what a line does not see, and what lies beyond the last token, to -infinity.
  static void mask(const TokenFeed& feed, const BlockTask& task, float* scores) {
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

  // Turns scores into weights 2^(score - peak) and adds them to the totals.
  static void soften(int count, const BlockTask& task, float* scores) {
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
      rescale(task, factors);
    }
    for (int i = 0; i < end; i += kLanes) {
      const Vec weights = exp2_by_parts<Isa>(Isa::subtract(Isa::load(scores + i), peak));
      total = Isa::add(total, weights);
      Isa::store(scores + i, weights);
    }
    Isa::store(task.total, total);
  }

  static void rescale(const BlockTask& task, Vec factors) {
    alignas(64) float factor[kLanes];
    Isa::store(factor, factors);
    for (int g = 0; g < kLines; ++g) {
      float* row = task.weighted + g * task.padded_dim;
      for (int d = 0; d < task.padded_dim; d += kLanes) {
        Isa::store(row + d, Isa::multiply(Isa::load(row + d), Isa::all(factor[g])));
      }
    }
  }

  // Columns from d on, as wide as fits, then narrower; returns the first one left: no whole vector.
  template <int kVectors>
  static int sum_columns(const TokenFeed& feed, const BlockTask& task, const float* weights,
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
  static void sum(const TokenFeed& feed, const BlockTask& task, const float* weights, int start,
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
  static void close(const BlockTask& task) {
    for (int i = kPeriod; i < kLanes; ++i) task.total[i % kPeriod] += task.total[i];
  }
};

// Block's functions for 1 to Isa::kBlockLines lines.
template <class Isa, class Item>
struct Blocks {
  struct Functions {
    void (*fold)(const TokenFeed&, const BlockTask&);
    void (*close)(const BlockTask&);
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

  static BlockTask block_task(const UnitTask& task, const LineBlocks& blocks, std::size_t block) {
    const std::size_t line = blocks.start(block);
    return {task.queries + line * task.padded_dim,
            task.sees + line,
            task.partial.weighted + line * task.padded_dim,
            task.partial.peak + block * kMostLanes,
            task.partial.total + block * kMostLanes,
            static_cast<int>(task.shape.head_dim),
            static_cast<int>(task.padded_dim),
            false};
  }

  static bool sees_any(const TokenFeed& feed, const SeenRange* sees, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      if (sees[i].start <= feed.highest() && feed.lowest() < sees[i].end) return true;
    }
    return false;
  }

  static void clear(const UnitTask& task, const LineBlocks& blocks) {
    std::memset(task.partial.weighted, 0, task.num_lines * task.padded_dim * sizeof(float));
    for (std::size_t i = 0; i < blocks.num_blocks * kMostLanes; ++i) {
      task.partial.peak[i] = kLowest;
      task.partial.total[i] = 0.0F;
    }
  }

  static void attend(const UnitTask& task) {
    const LineBlocks blocks(task.num_lines, Isa::kBlockLines);
    clear(task, blocks);
    for (TokenFeed feed(task); feed.count() > 0; feed.next()) {
      bool fetches = true;
      for (std::size_t i = 0; i < blocks.num_blocks; ++i) {
        BlockTask block = block_task(task, blocks, i);
        const std::size_t lines = blocks.start(i + 1) - blocks.start(i);
        if (!sees_any(feed, block.sees, lines)) continue;
        block.fetches = fetches;
        fetches = false;
        kOfLines[lines].fold(feed, block);
      }
    }
    for (std::size_t i = 0; i < blocks.num_blocks; ++i) {
      kOfLines[blocks.start(i + 1) - blocks.start(i)].close(block_task(task, blocks, i));
    }
  }
};

template <class Isa>
void attend_unit(const UnitTask& task) {
  const FlushDenormals flush;
  switch (task.shape.type) {
    case FloatType::float16:
      return Blocks<Isa, Half>::attend(task);
    case FloatType::bfloat16:
      return Blocks<Isa, Bfloat>::attend(task);
    case FloatType::float32:
      return Blocks<Isa, float>::attend(task);
  }
}

// The factor is applied in double, so that each product is rounded once and on its own: a rounded
// factor would shift all scores of a row together.
template <class Isa, class Item>
void prepare_items(const PrepareTask& task) {
  const auto* query = static_cast<const Item*>(task.query);
  const int head_dim = static_cast<int>(task.head_dim);
  for (int d = 0; d < head_dim; d += Isa::kLanes) {
    const int count = head_dim - d < Isa::kLanes ? head_dim - d : Isa::kLanes;
    const auto items = count < Isa::kLanes ? load_some<Isa>(query + d, count) : Isa::load(query + d);
    Isa::store(task.prepared + d, items);
    for (int i = 0; i < Isa::kLanes; ++i) {
      task.prepared[d + i] = static_cast<float>(task.factor * task.prepared[d + i]);
    }
  }
  for (int d = (head_dim + Isa::kLanes - 1) / Isa::kLanes * Isa::kLanes;
       d % static_cast<int>(kMostLanes) != 0; ++d) {
    task.prepared[d] = 0.0F;
  }
}

template <class Isa>
void prepare_query(const PrepareTask& task) {
  switch (task.type) {
    case FloatType::float16:
      return prepare_items<Isa, Half>(task);
    case FloatType::bfloat16:
      return prepare_items<Isa, Bfloat>(task);
    case FloatType::float32:
      return prepare_items<Isa, float>(task);
  }
}

// Writes head_dim items, each times the factor.
template <class Isa, class Item>
void write_items(const float* from, float factor, int head_dim, std::byte* out) {
  auto* items = reinterpret_cast<Item*>(out);
  for (int d = 0; d < head_dim; d += Isa::kLanes) {
    const auto values = Isa::multiply(Isa::load(from + d), Isa::all(factor));
    if (head_dim - d >= Isa::kLanes) {
      Isa::store(items + d, values);
      continue;
    }
    Item full[Isa::kLanes];
    Isa::store(full, values);
    std::memcpy(items + d, full, static_cast<std::size_t>(head_dim - d) * sizeof(Item));
  }
}

template <class Isa>
void write_row(FloatType type, const float* from, float factor, int head_dim, std::byte* out) {
  switch (type) {
    case FloatType::float16:
      return write_items<Isa, Half>(from, factor, head_dim, out);
    case FloatType::bfloat16:
      return write_items<Isa, Bfloat>(from, factor, head_dim, out);
    case FloatType::float32:
      return write_items<Isa, float>(from, factor, head_dim, out);
  }
}

template <class Isa>
float exp2_of(float x) {
  alignas(64) float lanes[Isa::kLanes];
  Isa::store(lanes, exp2_by_parts<Isa>(Isa::all(x)));
  return lanes[0];
}

// One line of all runs: o = sum of 2^(peak_i - peak) o_i, over the sum of totals weighted alike.
template <class Isa>
void merge_line(const MergeTask& task, std::size_t line, std::size_t lane) {
  float* sum = task.first.weighted + line * task.padded_dim;
  float peak = kLowest;
  for (std::size_t run = 0; run < task.num_runs; ++run) {
    const std::size_t at = run * task.run_stride + lane;
    if (task.first.total[at] != 0.0F && !(task.first.peak[at] <= peak)) {
      peak = task.first.peak[at];
    }
  }
  float total = 0.0F;
  for (std::size_t run = 0; run < task.num_runs; ++run) {
    const std::size_t at = run * task.run_stride;
    const float run_total = task.first.total[at + lane];
    const bool adds = run_total != 0.0F;
    const float weight = adds ? exp2_of<Isa>(task.first.peak[at + lane] - peak) : 0.0F;
    total += weight * run_total;
    for (std::size_t d = 0; d < task.padded_dim; d += Isa::kLanes) {
      const auto scaled = Isa::multiply(Isa::load(sum + at + d), Isa::all(weight));
      Isa::store(sum + d, run == 0 ? scaled : Isa::add(Isa::load(sum + d), scaled));
    }
  }
  const std::size_t at = line / task.heads_per_kv * task.num_heads + line % task.heads_per_kv;
  const bool sees_nothing = total == 0.0F;
  write_row<Isa>(task.type, sum, sees_nothing ? 0.0F : 1.0F / total,
                 static_cast<int>(task.head_dim),
                 task.out + at * task.head_dim * bytes_of(task.type));
  constexpr double kLn2 = 0.693147180559945309417;
  task.lse[at] = sees_nothing
                     ? -kInfinity
                     : static_cast<float>(kLn2 * (static_cast<double>(peak) + __builtin_log2(total)));
}

template <class Isa>
void merge_runs(const MergeTask& task) {
  const FlushDenormals flush;
  const LineBlocks blocks(task.num_lines, Isa::kBlockLines);
  for (std::size_t block = 0; block < blocks.num_blocks; ++block) {
    for (std::size_t line = blocks.start(block); line < blocks.start(block + 1); ++line) {
      merge_line<Isa>(task, line, block * kMostLanes + line - blocks.start(block));
    }
  }
}

template <class Isa>
constexpr AttentionKernel kernel_of(AttentionInstructions instructions) {
  return {instructions, Isa::kBlockLines, &prepare_query<Isa>, &attend_unit<Isa>,
          &merge_runs<Isa>};
}

}  // namespace
}  // namespace tiermem
