#include "attention_job.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <thread>
#include <utility>

#include "attention_kernel.h"

namespace tiermem {
namespace {

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

void require_at_least_one(const char* name, std::int64_t value) {
  require(value >= 1, std::string(name) + "=" + std::to_string(value) + ": must be at least 1");
}

void require_entries(const char* name, std::size_t has, std::size_t wanted) {
  require(has == wanted, std::string(name) + " of " + std::to_string(has) +
                             " entries: must be " + std::to_string(wanted));
}

void check_sizes(const KvShape& shape, const QueryRows& queries) {
  require_at_least_one("num_kv_heads", static_cast<std::int64_t>(shape.num_kv_heads));
  require_at_least_one("page_tokens", static_cast<std::int64_t>(shape.page_tokens));
  require_at_least_one("head_dim", static_cast<std::int64_t>(shape.head_dim));
  require_at_least_one("num_heads", static_cast<std::int64_t>(queries.num_heads));
  require(queries.num_heads % shape.num_kv_heads == 0,
          "num_heads=" + std::to_string(queries.num_heads) + ": must be a multiple of " +
              std::to_string(shape.num_kv_heads));
  if (queries.window) require_at_least_one("window", *queries.window);
}

void check_tables(const PageTables& tables) {
  const std::size_t batch = tables.num_pages.size();
  require_entries("kv_end", tables.kv_end.size(), batch);
  require_entries("q_start", tables.q_start.size(), batch);
  require_entries("row_starts", tables.row_starts.size(), batch + 1);
  require_entries("slices", tables.slices.size(), batch * tables.max_pages);
  if (!tables.starts.empty()) {
    require_entries("starts", tables.starts.size(), batch * tables.max_pages);
  }
  require(tables.row_starts[0] == 0, "row_starts: must begin with 0");
  for (std::size_t b = 0; b < batch; ++b) {
    const auto pages = tables.num_pages[b];
    require(pages >= 0 && static_cast<std::size_t>(pages) <= tables.max_pages,
            "num_pages=" + std::to_string(pages) + ": must be 0 to " +
                std::to_string(tables.max_pages));
    require(tables.row_starts[b] <= tables.row_starts[b + 1], "row_starts: must be ascending");
  }
}

void check_memory(const AttentionJob& job) {
  const auto is_word = [](const AttentionFlag& flag) {
    return flag.word != nullptr &&
           reinterpret_cast<std::uintptr_t>(flag.word) % alignof(std::uint32_t) == 0;
  };
  require(is_word(job.ready), "ready: must be an address that is a multiple of 4");
  require(is_word(job.done), "done: must be an address that is a multiple of 4");
  const bool has_rows = job.tables.row_starts.back() > 0;
  require(!has_rows || (job.queries.data && job.result.out && job.result.lse),
          "queries, out and lse: must have addresses");
}

const AttentionJob& checked(const AttentionJob& job) {
  check_sizes(job.shape, job.queries);
  check_tables(job.tables);
  check_memory(job);
  return job;
}

// Tokens of a sequence's pages that one of its rows sees.
std::uint64_t seen_tokens(const AttentionJob& job, std::size_t sequence) {
  const PageTables& tables = job.tables;
  const std::int64_t num_rows =
      std::int64_t{tables.row_starts[sequence + 1]} - tables.row_starts[sequence];
  if (num_rows == 0) return 0;
  const std::int64_t first = tables.q_start[sequence];  // row's position
  const std::int64_t start =
      job.queries.window
          ? std::max<std::int64_t>(0, first + 1 - std::min(*job.queries.window, first + 1))
          : 0;
  const std::int64_t end = std::min<std::int64_t>(first + num_rows, tables.kv_end[sequence]);
  const auto page_tokens = static_cast<std::int64_t>(job.shape.page_tokens);
  std::int64_t seen = 0;
  for (std::size_t j = 0; j < static_cast<std::size_t>(tables.num_pages[sequence]); ++j) {
    const std::size_t entry = sequence * tables.max_pages + j;
    const std::int64_t page = tables.starts.empty() ? static_cast<std::int64_t>(j) * page_tokens
                                                    : tables.starts[entry];
    const std::int64_t here = std::min(page + page_tokens, end) - std::max(page, start);
    if (here <= 0) continue;
    require(tables.slices[entry] != 0, "page " + std::to_string(j) + " of sequence " +
                                           std::to_string(sequence) +
                                           " is seen by a row, but lies nowhere");
    seen += here;
  }
  return static_cast<std::uint64_t>(seen);
}

template <class T>
std::vector<T> copy_of(std::span<const T> items) {
  return {items.begin(), items.end()};
}

// A quiet NaN of 2 bytes.
std::uint16_t nan_bits(FloatType type) { return type == FloatType::float16 ? 0x7E00 : 0x7FC0; }

// What a GPU sees is in the order of the stores, also of those that bypass the caches.
void order_stores() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace

QueuedJob::QueuedJob(const AttentionJob& job)
    : shape_(checked(job).shape),
      queries_(job.queries),
      result_(job.result),
      ready_(job.ready),
      done_(job.done),
      slices_(copy_of(job.tables.slices)),
      starts_(copy_of(job.tables.starts)),
      num_pages_(copy_of(job.tables.num_pages)),
      kv_end_(copy_of(job.tables.kv_end)),
      row_starts_(copy_of(job.tables.row_starts)),
      q_start_(copy_of(job.tables.q_start)),
      tables_{job.tables.max_pages, slices_, starts_, num_pages_, kv_end_, row_starts_, q_start_} {
  num_lse_ = static_cast<std::size_t>(row_starts_.back()) * queries_.num_heads;
  if (result_.page_lse != nullptr) num_page_lse_ = num_lse_ * tables_.max_pages;
  out_bytes_ = num_lse_ * shape_.head_dim * bytes_of(result_.type);
  std::uint64_t tokens = 0;
  for (std::size_t b = 0; b < num_pages_.size(); ++b) tokens += seen_tokens(job, b);
  seen_bytes_ = tokens * 2 * shape_.num_kv_heads * shape_.head_dim * bytes_of(shape_.type);
}

void QueuedJob::start_reading(Clock::time_point due_at) noexcept {
  due_at_ = due_at;
  is_reading_.store(true, std::memory_order_relaxed);
}

bool QueuedJob::is_ready() const noexcept {
  const std::atomic_ref<std::uint32_t> word(*ready_.word);
  return has_reached(word.load(std::memory_order_acquire), ready_.value);
}

void QueuedJob::attend(CpuAttention& attention, ResultBuffers& buffers) const {
  const auto make_room = [](auto& buffer, std::size_t size) {
    if (buffer.size() < size) buffer.resize(size);
  };
  make_room(buffers.out, out_bytes_);
  make_room(buffers.lse, num_lse_);
  make_room(buffers.page_lse, num_page_lse_);
  attention.attend(shape_, tables_, queries_,
                   {result_.type, buffers.out.data(), buffers.lse.data(),
                    num_page_lse_ > 0 ? buffers.page_lse.data() : nullptr});
}

void QueuedJob::deliver(const ResultBuffers& buffers) const noexcept {
  if (num_lse_ == 0) return;
  std::memcpy(result_.out, buffers.out.data(), out_bytes_);
  std::copy_n(buffers.lse.data(), num_lse_, result_.lse);
  std::copy_n(buffers.page_lse.data(), num_page_lse_, result_.page_lse);
}

void QueuedJob::fill_with_nan() const noexcept {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  std::fill_n(result_.lse, num_lse_, kNan);
  std::fill_n(result_.page_lse, num_page_lse_, kNan);
  const std::size_t num_items = num_lse_ * shape_.head_dim;
  if (result_.type == FloatType::float32) {
    std::fill_n(static_cast<float*>(result_.out), num_items, kNan);
  } else {
    std::fill_n(static_cast<std::uint16_t*>(result_.out), num_items, nan_bits(result_.type));
  }
}

void QueuedJob::end(AttentionOutcome outcome) noexcept {
  outcome_ = std::move(outcome);
  order_stores();
  std::atomic_ref<std::uint32_t>(*done_.word).store(done_.value, std::memory_order_release);
  phase_.store(JobPhase::ended, std::memory_order_release);
}

AttentionOutcome QueuedJob::outcome() const {
  while (phase() == JobPhase::ending) std::this_thread::yield();
  if (phase() != JobPhase::ended) return {};
  AttentionOutcome outcome = outcome_;
  outcome.is_reading = is_reading_.load(std::memory_order_acquire);
  return outcome;
}

}  // namespace tiermem
