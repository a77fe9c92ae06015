// AttentionKernel: what one set of instructions does for CpuAttention. A unit is a run of pages, one KV
// head and a group of query lines.
//
// A line is one query row of one query head. The lines of a KV head are numbered row by row:
// line = row * heads_per_kv + head. Tasks hold plain pointers: files compiled for wider instructions
// include this, and must not emit inline functions that the whole program could come to use.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tiermem/cpu_attention.h"

namespace tiermem {

// Lines of a block: they go through keys and values side by side, in registers.
inline constexpr std::size_t kMostBlockLines = 8;
// Items of a vector, at most; rows of float32 scratch are padded to a multiple of this.
inline constexpr std::size_t kMostLanes = 16;

// Tokens of one page that some line of the group sees: [first, end) of the page, at positions
// [position, position + end - first).
struct SeenPage {
  const std::byte* slice;
  std::uint32_t first;
  std::uint32_t end;
  std::uint32_t index;  // in the sequence's table
  std::int64_t position;
};

// Positions that a line sees; empty where end <= start.
struct SeenRange {
  std::int64_t start;
  std::int64_t end;
};

// A partial softmax of a group of lines, in base 2: line i's sum of 2^(z - peak) and of that times V.
// Which lane is which line's, the kernel knows.
struct Partial {
  float* weighted;  // (lines, padded_dim), 64-byte aligned
  float* peak;      // (partial_lanes(lines)), 64-byte aligned
  float* total;     // as peak
};

// Lanes for lines in blocks of at least four, one vector a block, or in pairs of vectors.
constexpr std::size_t partial_lanes(std::size_t num_lines) {
  return (num_lines + 3) / 4 * kMostLanes;
}

// Lines for which prepared queries have room: for tiles of half precision, and for panels.
constexpr std::size_t prepared_lines(std::size_t num_lines) {
  constexpr std::size_t pair = 2 * kMostLanes;
  return num_lines <= kMostBlockLines ? kMostLanes : (num_lines + pair - 1) / pair * pair;
}

// How a group's lines form blocks of nearly equal size. REQUIRES: 1 <= most_lines.
struct LineBlocks {
  std::size_t num_lines;
  std::size_t num_blocks;

  constexpr LineBlocks(std::size_t lines, std::size_t most_lines)
      : num_lines(lines), num_blocks((lines + most_lines - 1) / most_lines) {}
  constexpr std::size_t start(std::size_t block) const { return num_lines * block / num_blocks; }
  constexpr std::size_t block_of(std::size_t line) const {
    std::size_t block = line * num_blocks / num_lines;
    while (start(block + 1) <= line) ++block;
    return block;
  }
};

// A group's queries of one KV head, to the kernel's own form and order.
struct PrepareTask {
  FloatType type;
  const std::byte* query;        // of line 0
  std::int64_t row_bytes;        // from a row to the next
  std::int64_t head_bytes;       // from a query head to the next
  std::size_t heads_per_kv;
  std::size_t num_lines;
  std::size_t head_dim;
  std::size_t padded_dim;
  double factor;
  float* prepared;  // (prepared_lines(lines), padded_dim), 64-byte aligned
};

// Where a group's log-sum-exps of single pages go. Entry of line i and page j of the table:
// first[i / heads_per_kv * row_stride + i % heads_per_kv * head_stride + j].
struct PageOutput {
  float* first = nullptr;  // null: not wanted
  std::size_t heads_per_kv = 1;
  std::size_t row_stride = 0;
  std::size_t head_stride = 0;
};

struct UnitTask {
  KvShape shape;
  std::size_t padded_dim;
  std::size_t kv_head;
  const SeenPage* pages;
  std::size_t num_pages;
  std::size_t num_lines;
  const float* queries;    // as PrepareTask left them
  double factor;           // as PrepareTask's
  const SeenRange* sees;   // (lines)
  Partial partial;         // overwritten
  PageOutput page_output;  // each line of each of the pages is written
};

// Joins the partial results of some lines of a group and one KV head.
struct MergeTask {
  std::size_t num_runs;
  std::size_t num_lines;   // of the group
  std::size_t first_line;  // that it joins
  std::size_t end_line;
  std::size_t heads_per_kv;
  std::size_t head_dim;
  std::size_t padded_dim;
  Partial first;            // of run 0; used as scratch
  std::size_t run_stride;   // floats from one run's arrays to the next one's
  FloatType type;
  std::byte* out;           // of line 0
  float* lse;               // of line 0
  std::size_t num_heads;    // query heads: from a row to the next in out and lse
};

struct AttentionKernel {
  AttentionInstructions instructions;
  void (*prepare)(const PrepareTask& task);
  void (*attend)(const UnitTask& task);
  void (*merge)(const MergeTask& task);
};

extern const AttentionKernel kPortableAttention;
#if defined(__x86_64__)
extern const AttentionKernel kAvx2Attention;    // needs AVX2, FMA and F16C
extern const AttentionKernel kAvx512Attention;  // needs AVX-512F
extern const AttentionKernel kAmxAttention;     // needs what has_amx() looks for
#endif

constexpr std::size_t bytes_of(FloatType type) { return type == FloatType::float32 ? 4 : 2; }

}  // namespace tiermem
