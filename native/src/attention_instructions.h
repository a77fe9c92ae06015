// The three functions of an AttentionKernel over a set of vector instructions.
#pragma once

#include "attention_block.h"
#include "attention_vectors.h"

namespace tiermem {
namespace {

// The factor is applied in double, so that each product is rounded once and on its own: a rounded
// factor would shift all scores of a row together.
template <class Isa, class Item>
void prepare_items(const PrepareTask& task) {
  const auto* query = static_cast<const Item*>(task.query);
  const int head_dim = static_cast<int>(task.head_dim);
  const int padded_dim = static_cast<int>(task.padded_dim);
  for (int d = 0; d < padded_dim; d += Isa::kLanes) {
    float* to = task.block + (d * task.num_lines + task.line * Isa::kLanes);
    const int count = head_dim - d;
    if (count >= Isa::kLanes) {
      Isa::store(to, Isa::load(query + d));
    } else {
      Isa::store(to, load_some<Isa>(query + d, count > 0 ? count : 0));
    }
    for (int i = 0; i < Isa::kLanes; ++i) to[i] = static_cast<float>(task.factor * to[i]);
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
