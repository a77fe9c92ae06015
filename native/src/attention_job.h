// QueuedJob: one job of an AttentionQueue, with its own copy of the tables, and how far it is.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tiermem/attention_queue.h"

namespace tiermem {

// Where a result is computed before it is delivered. Keeps the largest size asked for.
struct ResultBuffers {
  std::vector<std::byte> out;
  std::vector<float> lse;
  std::vector<float> page_lse;
};

// Who moves a job to `ending` writes its result and its outcome, and nobody else.
enum class JobPhase { queued, waiting, attending, ending, ended };

class QueuedJob {
 public:
  using Clock = std::chrono::steady_clock;

  // Throws std::invalid_argument as AttentionQueue::submit says.
  explicit QueuedJob(const AttentionJob& job);
  QueuedJob(const QueuedJob&) = delete;
  QueuedJob& operator=(const QueuedJob&) = delete;

  JobPhase phase() const noexcept { return phase_.load(std::memory_order_acquire); }

  // False, and nothing changed, if it is not in phase `from`.
  bool move(JobPhase from, JobPhase to) noexcept { return phase_.compare_exchange_strong(from, to); }

  // For the service thread: from when on it may read the job's memory, and until when.
  void start_reading(Clock::time_point due_at) noexcept;
  void stop_reading() noexcept { is_reading_.store(false, std::memory_order_release); }
  Clock::time_point due_at() const noexcept { return due_at_; }

  void cancel() noexcept { is_cancelled_.store(true, std::memory_order_relaxed); }
  bool is_cancelled() const noexcept { return is_cancelled_.load(std::memory_order_relaxed); }

  // Whether the queries are there. With acquire.
  bool is_ready() const noexcept;

  std::uint64_t seen_bytes() const noexcept { return seen_bytes_; }

  // Makes room in the buffers and attends into them. Throws what attend throws.
  void attend(CpuAttention& attention, ResultBuffers& buffers) const;

  // The result, where the job wants it. REQUIRES: phase `ending`.
  void deliver(const ResultBuffers& buffers) const noexcept;
  void fill_with_nan() const noexcept;

  // Stores done. REQUIRES: phase `ending`, the result is written. ENSURES: phase `ended`.
  void end(AttentionOutcome outcome) noexcept;

  // Waits for who is ending it: for a result to be copied at most.
  AttentionOutcome outcome() const;

 private:
  const KvShape shape_;
  const QueryRows queries_;
  const AttentionResult result_;
  const AttentionFlag ready_;
  const AttentionFlag done_;
  const std::vector<std::int64_t> slices_;
  const std::vector<std::int32_t> starts_;
  const std::vector<std::int32_t> num_pages_;
  const std::vector<std::int32_t> kv_end_;
  const std::vector<std::int32_t> row_starts_;
  const std::vector<std::int32_t> q_start_;
  const PageTables tables_;  // of the vectors
  std::size_t out_bytes_ = 0;
  std::size_t num_lse_ = 0;
  std::size_t num_page_lse_ = 0;  // 0: not wanted
  std::uint64_t seen_bytes_ = 0;

  Clock::time_point due_at_{};
  AttentionOutcome outcome_;  // written in phase `ending`, read from `ended` on
  std::atomic<JobPhase> phase_ = JobPhase::queued;
  std::atomic<bool> is_cancelled_ = false;
  std::atomic<bool> is_reading_ = false;
};

}  // namespace tiermem
