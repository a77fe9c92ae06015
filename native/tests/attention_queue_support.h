// For tests of AttentionQueue: jobs over real pages, and what plays the GPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "attention_cases.h"
#include "tiermem/attention_queue.h"

namespace tiermem_test {

using Clock = std::chrono::steady_clock;

inline void raise(std::uint32_t& word, std::uint32_t value) {
  std::atomic_ref<std::uint32_t>(word).store(value, std::memory_order_release);
}

template <class Condition>
bool eventually(const Condition& condition) {
  const auto end = Clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    if (Clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

// What one job reads and writes: pages of a case, queries of its own, flags.
class Share {
 public:
  explicit Share(const Shape& shape, std::uint64_t seed = 1) : shape_(shape), case_(shape, seed) {
    queries_.resize(num_items() * item_bytes(shape.type));
    result_ = case_.outcome();
    std::mt19937_64 random(seed);
    new_queries(random);
  }

  void new_queries(std::mt19937_64& random) {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < num_items(); ++i) {
      narrow(shape_.type, normal(random), queries_.data() + i * item_bytes(shape_.type));
    }
  }

  void poison() {
    std::fill(result_.out.begin(), result_.out.end(), std::byte{0x7B});
    std::fill(result_.lse.begin(), result_.lse.end(), 123.0F);
    std::fill(result_.page_lse.begin(), result_.page_lse.end(), 123.0F);
  }

  AttentionJob job() { return job({&ready, 1}, {&done, 1}); }
  AttentionJob job(AttentionFlag ready_flag, AttentionFlag done_flag) {
    return {case_.kv_shape(), case_.tables(), queries(),
            {shape_.out_type, result_.out.data(), result_.lse.data(), result_.page_lse_data()},
            ready_flag,
            done_flag};
  }

  // By a call that waits for nothing.
  Outcome expected(CpuAttention& attention) const {
    Outcome outcome = result_;
    attention.attend(case_.kv_shape(), case_.tables(), queries(),
                     {shape_.out_type, outcome.out.data(), outcome.lse.data(),
                      outcome.page_lse_data()});
    return outcome;
  }

  const Outcome& result() const { return result_; }
  bool is_nan() const {
    for (const auto* list : {&result_.lse, &result_.page_lse}) {
      for (const float x : *list) {
        if (!std::isnan(x)) return false;
      }
    }
    for (std::size_t i = 0; i < num_items(); ++i) {
      if (!std::isnan(widened(shape_.out_type, &result_.out[i * item_bytes(shape_.out_type)]))) {
        return false;
      }
    }
    return true;
  }

  bool is_done() { return has_reached(std::atomic_ref<std::uint32_t>(done).load(), 1); }

  // Every token of every page is seen by a row, and each sequence has one.
  std::uint64_t bytes() const {
    std::uint64_t tokens = 0;
    for (const int stored : shape_.stored) tokens += static_cast<std::uint64_t>(stored);
    return tokens * 2 * shape_.num_kv_heads * shape_.head_dim * item_bytes(shape_.type);
  }

  std::uint32_t ready = 0;
  std::uint32_t done = 0;

 private:
  std::size_t num_items() const { return case_.num_rows() * case_.num_heads() * shape_.head_dim; }
  QueryRows queries() const {
    const auto dim = static_cast<std::int64_t>(shape_.head_dim);
    return {queries_.data(), dim * static_cast<std::int64_t>(case_.num_heads()), dim,
            case_.num_heads(), shape_.scale, shape_.window};
  }

  const Shape shape_;
  const Case case_;
  std::vector<std::byte> queries_;
  Outcome result_;
};

inline std::unique_ptr<CpuAttention> threads(std::size_t num_threads) {
  return std::make_unique<CpuAttention>(num_threads);
}

}  // namespace tiermem_test
