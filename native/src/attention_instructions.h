// The three functions of an AttentionKernel over a set of vector instructions.
#pragma once

#include "attention_block.h"
#include "attention_panel.h"
#include "attention_vectors.h"

namespace tiermem {
namespace {

template <class Isa, class Item>
void attend_items(const UnitTask& task) {
  if (uses_panels(task.num_lines, task.padded_dim)) {
    Panels<Isa, Item>::attend(task);
  } else {
    Blocks<Isa, Item>::attend(task);
  }
}

template <class Isa>
void attend_unit(const UnitTask& task) {
  const FlushDenormals flush;
  switch (task.shape.type) {
    case FloatType::float16:
      return attend_items<Isa, Half>(task);
    case FloatType::bfloat16:
      return attend_items<Isa, Bfloat>(task);
    case FloatType::float32:
      return attend_items<Isa, float>(task);
  }
}

// Where a line's prepared items go: item d at to + d / kLanes * piece + d % kLanes * item.
struct Place {
  float* to;
  std::size_t piece;
  std::size_t item;
};

template <class Isa>
Place place_of(const PrepareTask& task, std::size_t line) {
  if (uses_panels(task.num_lines, task.padded_dim)) {
    constexpr std::size_t width = Panel<Isa>::kWidth;
    return {task.prepared + line / width * width * task.padded_dim + line % width,
            width * Isa::kLanes, width};
  }
  const LineBlocks blocks(task.num_lines, Isa::kBlockLines);
  const std::size_t block = blocks.block_of(line);
  const std::size_t start = blocks.start(block);
  return {task.prepared + start * task.padded_dim + (line - start) * Isa::kLanes,
          (blocks.start(block + 1) - start) * Isa::kLanes, 1};
}

// The factor is applied in double, so that each product is rounded once and on its own: a rounded
// factor would shift all scores of a row together.
template <class Isa, class Item>
void prepare_line(const Item* query, const PrepareTask& task, Place place) {
  for (std::size_t d = 0; d < task.padded_dim; d += Isa::kLanes, place.to += place.piece) {
    alignas(64) float items[Isa::kLanes];
    const int count = static_cast<int>(task.head_dim) - static_cast<int>(d);
    if (count >= Isa::kLanes) {
      Isa::store(items, Isa::load(query + d));
    } else {
      Isa::store(items, load_some<Isa>(query + d, count > 0 ? count : 0));
    }
    for (int i = 0; i < Isa::kLanes; ++i) {
      place.to[i * place.item] = static_cast<float>(task.factor * items[i]);
    }
  }
}

template <class Isa, class Item>
void prepare_items(const PrepareTask& task) {
  if (uses_panels(task.num_lines, task.padded_dim)) {  // lanes of no line are multiplied too
    std::memset(task.prepared, 0,
                prepared_lines(task.num_lines) * task.padded_dim * sizeof(float));
  }
  for (std::size_t line = 0; line < task.num_lines; ++line) {
    const auto row = static_cast<std::int64_t>(line / task.heads_per_kv);
    const auto head = static_cast<std::int64_t>(line % task.heads_per_kv);
    const std::byte* query = task.query + row * task.row_bytes + head * task.head_bytes;
    prepare_line<Isa>(reinterpret_cast<const Item*>(query), task, place_of<Isa>(task, line));
  }
}

template <class Isa>
void prepare_queries(const PrepareTask& task) {
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
  task.lse[at] = sees_nothing
                     ? -kInfinity
                     : static_cast<float>(kLn2 * (static_cast<double>(peak) + __builtin_log2(total)));
}

// Where a line's peak and total are among a partial result's lanes.
template <class Isa>
std::size_t lane_of(std::size_t num_lines, std::size_t padded_dim, std::size_t line) {
  if (uses_panels(num_lines, padded_dim)) return line;
  const LineBlocks blocks(num_lines, Isa::kBlockLines);
  const std::size_t block = blocks.block_of(line);
  return block * kMostLanes + line - blocks.start(block);
}

template <class Isa>
void merge_runs(const MergeTask& task) {
  const FlushDenormals flush;
  for (std::size_t line = task.first_line; line < task.end_line; ++line) {
    merge_line<Isa>(task, line, lane_of<Isa>(task.num_lines, task.padded_dim, line));
  }
}

template <class Isa>
constexpr AttentionKernel kernel_of(AttentionInstructions instructions) {
  return {instructions, &prepare_queries<Isa>, &attend_unit<Isa>, &merge_runs<Isa>};
}

}  // namespace
}  // namespace tiermem
