// Random cases for CpuAttention, and their result in float64 by definition.
//
// Each page is an allocation of its own, of just a layer's slice. What no row may see is NaN, and pages
// that no row sees are no addresses.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "tiermem/cpu_attention.h"

namespace tiermem_test {

using namespace tiermem;

inline double widened(FloatType type, const std::byte* item) {
  if (type == FloatType::float32) {
    float x = 0;
    std::memcpy(&x, item, sizeof(x));
    return x;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, item, sizeof(bits));
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  const bool is_half = type == FloatType::float16;
  const int exponent_bits = is_half ? 5 : 8;
  const int fraction_bits = 15 - exponent_bits;
  const int most = (1 << exponent_bits) - 1;
  const int exponent = bits >> fraction_bits & most;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  if (exponent == most) {
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  }
  const int bias = most / 2 + fraction_bits;
  const int significand = exponent == 0 ? fraction : fraction | 1 << fraction_bits;
  return sign * std::ldexp(significand, std::max(exponent, 1) - bias);
}

// Truncated, and NaN for NaN. For numbers in the normal range.
inline void narrow(FloatType type, float x, std::byte* item) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  if (type == FloatType::float32) {
    std::memcpy(item, &bits, sizeof(bits));
    return;
  }
  auto high = static_cast<std::uint16_t>(bits >> 16);
  if (type == FloatType::float16) {
    const std::uint32_t size = bits & 0x7FFF'FFFF;
    const std::uint32_t half = size < 113U << 23 ? 0 : (size - (112U << 23)) >> 13;
    high = static_cast<std::uint16_t>((bits >> 16 & 0x8000) | half);
    if (std::isnan(x)) high = 0x7E00;
  }
  std::memcpy(item, &high, sizeof(high));
}

inline std::size_t item_bytes(FloatType type) { return type == FloatType::float32 ? 4 : 2; }

struct Shape {
  FloatType type = FloatType::float16;
  std::size_t num_kv_heads = 2;
  std::size_t heads_per_kv = 2;
  std::size_t head_dim = 64;
  std::size_t page_tokens = 16;
  std::vector<int> rows = {1};     // of each sequence
  std::vector<int> stored = {40};  // tokens of each sequence, its rows' own included
  std::optional<std::int64_t> window = {};
  bool scattered = false;  // pages in any order, some missing
  double scale = 0.2;
  double gain = 1.0;  // of queries and keys
  FloatType out_type = FloatType::float32;
  bool wants_pages = false;
};

struct Outcome {
  std::vector<std::byte> out;
  std::vector<float> lse;
  std::vector<float> page_lse;  // empty: not wanted

  float* page_lse_data() { return page_lse.empty() ? nullptr : page_lse.data(); }
  bool operator==(const Outcome& other) const {
    return out == other.out && same(lse, other.lse) && same(page_lse, other.page_lse);
  }

 private:
  static bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](float x, float y) {
             return std::memcmp(&x, &y, sizeof(x)) == 0;
           });
  }
};

class Case {
 public:
  Case(const Shape& shape, std::uint64_t seed) : shape_(shape), random_(seed) {
    make_tables();
    for (std::size_t b = 0; b < shape_.rows.size(); ++b) make_pages(b);
    make_queries();
  }

  std::size_t num_rows() const { return static_cast<std::size_t>(row_starts_.back()); }
  std::size_t num_heads() const { return shape_.num_kv_heads * shape_.heads_per_kv; }

  KvShape kv_shape() const {
    return {shape_.type, shape_.num_kv_heads, shape_.page_tokens, shape_.head_dim};
  }
  PageTables tables() const {
    return {max_pages_, slices_, starts_, num_pages_, kv_end_, row_starts_, q_start_};
  }

  // Room for a result, poisoned.
  Outcome outcome() const {
    const std::size_t lines = num_rows() * num_heads();
    return {std::vector<std::byte>(lines * shape_.head_dim * item_bytes(shape_.out_type),
                                   std::byte{0x7B}),
            std::vector<float>(lines, 123.0F),
            std::vector<float>(shape_.wants_pages ? lines * max_pages_ : 0, 123.0F)};
  }

  Outcome run(CpuAttention& attention) const {
    Outcome outcome = this->outcome();
    // Rows of all heads lie in twice the space, heads from last to first.
    const auto dim = static_cast<std::int64_t>(shape_.head_dim);
    const auto heads = static_cast<std::int64_t>(num_heads());
    const auto* last = queries_.data() + (num_heads() - 1) * shape_.head_dim * bytes();
    attention.attend(kv_shape(), tables(),
                     {last, 2 * heads * dim, -dim, num_heads(), shape_.scale, shape_.window},
                     {shape_.out_type, outcome.out.data(), outcome.lse.data(),
                      outcome.page_lse_data()});
    return outcome;
  }

  // The largest errors: of the output relative to the largest |V|, and of the lse relative to 1 and itself.
  struct Errors {
    double out = 0;
    double lse = 0;
    double page_lse = 0;  // as lse
  };
  Errors errors(const Outcome& outcome) const {
    Errors errors;
    for (std::size_t b = 0; b < shape_.rows.size(); ++b) {
      for (int row = 0; row < shape_.rows[b]; ++row) {
        for (std::size_t head = 0; head < num_heads(); ++head) {
          compare(outcome, b, static_cast<std::size_t>(row), head, errors);
        }
      }
    }
    return errors;
  }

  // Replaced by a table that the rows see and that has no address.
  void lose_first_page() { slices_[0] = 0; }

 private:
  std::size_t bytes() const { return item_bytes(shape_.type); }
  float normal() { return static_cast<float>(std::normal_distribution<double>()(random_)); }
  std::uint64_t below(std::uint64_t n) { return random_() % n; }

  void make_tables() {
    const auto page = static_cast<int>(shape_.page_tokens);
    row_starts_.push_back(0);
    for (std::size_t b = 0; b < shape_.rows.size(); ++b) {
      const int pages = (shape_.stored[b] + page - 1) / page;
      num_pages_.push_back(pages);
      kv_end_.push_back(shape_.stored[b]);
      row_starts_.push_back(row_starts_.back() + shape_.rows[b]);
      q_start_.push_back(shape_.stored[b] - shape_.rows[b]);
      max_pages_ = std::max(max_pages_, static_cast<std::size_t>(pages) + 1);
    }
    slices_.assign(shape_.rows.size() * max_pages_, 0x10);  // where nothing is
    if (shape_.scattered) starts_.assign(slices_.size(), 0);
  }

  void make_pages(std::size_t b) {
    std::vector<int> order(static_cast<std::size_t>(num_pages_[b]));
    for (std::size_t j = 0; j < order.size(); ++j) order[j] = static_cast<int>(j);
    if (shape_.scattered) {
      std::shuffle(order.begin(), order.end(), random_);
      order.resize(order.size() - order.size() / 4);
      num_pages_[b] = static_cast<std::int32_t>(order.size());
    }
    for (std::size_t j = 0; j < order.size(); ++j) {
      const std::size_t entry = b * max_pages_ + j;
      const int start = order[j] * static_cast<int>(shape_.page_tokens);
      if (shape_.scattered) starts_[entry] = start;
      fill_page(b, entry, start);
    }
  }

  bool any_sees(std::size_t b, std::int64_t position) const {
    for (int row = 0; row < shape_.rows[b]; ++row) {
      if (sees(b, static_cast<std::size_t>(row), position)) return true;
    }
    return false;
  }
  bool sees(std::size_t b, std::size_t row, std::int64_t position) const {
    const std::int64_t own = q_start_[b] + static_cast<std::int64_t>(row);
    return position < kv_end_[b] && position <= own &&
           (!shape_.window || position > own - *shape_.window);
  }

  void fill_page(std::size_t b, std::size_t entry, int start) {
    const std::size_t tokens = shape_.page_tokens;
    bool is_seen = false;
    std::vector<std::byte> page(2 * shape_.num_kv_heads * tokens * shape_.head_dim * bytes());
    std::byte* item = page.data();
    for (std::size_t part = 0; part < 2 * shape_.num_kv_heads; ++part) {
      const auto gain = static_cast<float>(part < shape_.num_kv_heads ? shape_.gain : 1.0);
      for (std::size_t t = 0; t < tokens; ++t) {
        const bool seen = any_sees(b, start + static_cast<std::int64_t>(t));
        is_seen = is_seen || seen;
        for (std::size_t d = 0; d < shape_.head_dim; ++d, item += bytes()) {
          narrow(shape_.type, seen ? normal() * gain : NAN, item);
        }
      }
    }
    if (!is_seen) return;
    pages_.push_back(std::move(page));
    slices_[entry] = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(pages_.back().data()));
  }

  void make_queries() {
    const std::size_t row_items = 2 * num_heads() * shape_.head_dim;
    queries_.resize(num_rows() * row_items * bytes());
    for (std::size_t i = 0; i < num_rows() * row_items; ++i) {
      const bool is_used = i % row_items < row_items / 2;
      const auto gain = static_cast<float>(shape_.gain);
      narrow(shape_.type, is_used ? normal() * gain : NAN, queries_.data() + i * bytes());
    }
  }

  double query(std::size_t row, std::size_t head, std::size_t d) const {
    const std::size_t item = (2 * row * num_heads() + num_heads() - 1 - head) * shape_.head_dim + d;
    return widened(shape_.type, queries_.data() + item * bytes());
  }
  double stored(std::size_t entry, std::size_t part, std::size_t t, std::size_t d) const {
    const auto* page = reinterpret_cast<const std::byte*>(static_cast<std::uintptr_t>(slices_[entry]));
    return widened(shape_.type,
                   page + ((part * shape_.page_tokens + t) * shape_.head_dim + d) * bytes());
  }

  void compare(const Outcome& outcome, std::size_t b, std::size_t row, std::size_t head,
               Errors& errors) const {
    const std::size_t kv_head = head / shape_.heads_per_kv;
    const std::size_t line = (static_cast<std::size_t>(row_starts_[b]) + row) * num_heads() + head;
    std::vector<double> scores;
    std::vector<std::pair<std::size_t, std::size_t>> tokens;
    for (std::size_t j = 0; j < static_cast<std::size_t>(num_pages_[b]); ++j) {
      const std::size_t entry = b * max_pages_ + j;
      const std::int64_t start = starts_.empty() ? static_cast<std::int64_t>(j * shape_.page_tokens)
                                                 : starts_[entry];
      for (std::size_t t = 0; t < shape_.page_tokens; ++t) {
        if (!sees(b, row, start + static_cast<std::int64_t>(t))) continue;
        double score = 0;
        for (std::size_t d = 0; d < shape_.head_dim; ++d) {
          score += query(static_cast<std::size_t>(row_starts_[b]) + row, head, d) *
                   stored(entry, kv_head, t, d);
        }
        scores.push_back(score * shape_.scale);
        tokens.emplace_back(entry, t);
      }
    }
    std::vector<double> sums(shape_.head_dim, 0.0);
    double lse = -INFINITY;
    double largest = 1.0;
    if (!scores.empty()) {
      const double top = *std::max_element(scores.begin(), scores.end());
      double total = 0;
      for (const double score : scores) total += std::exp(score - top);
      lse = top + std::log(total);
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        for (std::size_t d = 0; d < shape_.head_dim; ++d) {
          const double v =
              stored(tokens[i].first, shape_.num_kv_heads + kv_head, tokens[i].second, d);
          largest = std::max(largest, std::abs(v));
          sums[d] += std::exp(scores[i] - lse) * v;
        }
      }
    }
    for (std::size_t d = 0; d < shape_.head_dim; ++d) {
      const auto* item = outcome.out.data() + (line * shape_.head_dim + d) * item_bytes(shape_.out_type);
      grow(errors.out, std::abs(widened(shape_.out_type, item) - sums[d]) / largest);
    }
    grow(errors.lse, lse_error(outcome.lse[line], lse));
    if (outcome.page_lse.empty()) return;
    for (std::size_t j = 0; j < max_pages_; ++j) {
      double top = -INFINITY, total = 0;
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        if (tokens[i].first == b * max_pages_ + j) top = std::max(top, scores[i]);
      }
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        if (tokens[i].first == b * max_pages_ + j) total += std::exp(scores[i] - top);
      }
      const float found = outcome.page_lse[line * max_pages_ + j];
      grow(errors.page_lse, lse_error(found, total > 0 ? top + std::log(total) : -INFINITY));
    }
  }

  static double lse_error(double found, double expected) {
    if (found == expected) return 0.0;  // -infinity
    return std::abs(found - expected) / std::max(1.0, std::abs(expected));
  }

  // NaN is the largest.
  static void grow(double& largest, double error) {
    if (!(error <= largest)) largest = error;
  }

  const Shape shape_;
  std::mt19937_64 random_;
  std::size_t max_pages_ = 0;
  std::vector<std::vector<std::byte>> pages_;
  std::vector<std::int64_t> slices_;
  std::vector<std::int32_t> starts_, num_pages_, kv_end_, row_starts_, q_start_;
  std::vector<std::byte> queries_;
};

}  // namespace tiermem_test
