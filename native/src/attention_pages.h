// PageSums: the log-sum-exp of each line over each page alone, for callers who want to know what a page
// is worth to the queries.
//
// A page's sum starts at zero, and is relative to the page's own highest score: it is as exact for a page
// that hardly counts as for any other.
#pragma once

#include "attention_feed.h"
#include "attention_vectors.h"

namespace tiermem {
namespace {

class PageSums {
 public:
  explicit PageSums(const PageOutput& output) : output_(output) {}

  bool are_wanted() const { return output_.first != nullptr; }

  // Of one line: the sum of 2^(z - peak) over a part of a page, at least 1; 0 if it sees nothing.
  void add(int line, const PagePart& part, float peak, float total) const {
    const auto i = static_cast<std::size_t>(line);
    float* entry = output_.first + i / output_.heads_per_kv * output_.row_stride +
                   i % output_.heads_per_kv * output_.head_stride + part.page;
    const float lse = total == 0.0F ? -kInfinity
                                    : static_cast<float>(kLn2 * (static_cast<double>(peak) +
                                                                 __builtin_log2(total)));
    *entry = part.continues ? joined(*entry, lse) : lse;
  }

  // No line sees a token of the block.
  void add_nothing(const TokenFeed& feed, int first_line, int num_lines) const {
    for (int i = 0; i < feed.num_parts(); ++i) {
      for (int g = 0; g < num_lines; ++g) add(first_line + g, feed.parts()[i], 0.0F, 0.0F);
    }
  }

 private:
  static float joined(float a, float b) {
    if (a == -kInfinity) return b;
    if (b == -kInfinity) return a;
    const double top = a > b ? a : b;
    return static_cast<float>(top + __builtin_log(__builtin_exp(a - top) + __builtin_exp(b - top)));
  }

  const PageOutput output_;
};

}  // namespace
}  // namespace tiermem
