// AttentionQueue against direct attention, with a thread in place of the GPU.
#include "tiermem/attention_queue.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <ctime>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "attention_queue_support.h"
#include "check.h"

using namespace tiermem;
using namespace tiermem_test;

namespace {

void flags_wrap() {
  CHECK(has_reached(5, 5) && has_reached(6, 5) && !has_reached(4, 5));
  CHECK(has_reached(0, 0xFFFF'FFFF) && has_reached(3, 0xFFFF'FFF0) && !has_reached(0xFFFF'FFFF, 0));
  CHECK(has_reached(0x8000'0000, 0x7FFF'FFFF) && !has_reached(0x7FFF'FFFF, 0x8000'0000));
  CHECK(has_reached(0x7FFF'FFFF, 0) && !has_reached(0x8000'0000, 0));
}

std::vector<std::unique_ptr<Share>> many_shapes() {
  std::vector<std::unique_ptr<Share>> shares;
  constexpr FloatType types[] = {FloatType::float16, FloatType::bfloat16, FloatType::float32};
  for (std::uint64_t i = 0; i < 12; ++i) {
    Shape shape;
    shape.type = types[i % 3];
    shape.out_type = types[i / 2 % 3];
    shape.head_dim = 8 * (1 + i % 4);
    shape.heads_per_kv = 1 + i % 5;
    shape.rows = {1 + static_cast<int>(i % 3), 1};
    shape.stored = {10 + 7 * static_cast<int>(i), i == 7 ? 900 : 20};
    shape.scattered = i % 4 == 1;
    if (i % 4 == 2) shape.window = 9;
    shape.wants_pages = i % 5 < 2;
    shares.push_back(std::make_unique<Share>(shape, i));
  }
  return shares;
}

void delay(std::mt19937_64& random) {
  const auto kind = random() % 1000;
  if (kind < 900) return;
  const auto end = Clock::now() + std::chrono::microseconds(kind < 980 ? random() % 100 : random() % 3000);
  while (Clock::now() < end) std::this_thread::yield();
}

constexpr std::uint32_t kJobs = 10'000;
constexpr std::uint32_t kFirstReady = 0xFFFF'FFFFU - kJobs / 2;  // wraps on the way
constexpr std::uint32_t kFirstDone = 0x7FFF'FFFFU - kJobs / 3;   // becomes negative on the way

// Runs the jobs in order, as a stream would; returns how many results were wrong.
int play_gpu(std::vector<std::unique_ptr<Share>>& shares, const std::atomic<std::uint32_t>& num_launched,
             std::uint32_t& ready, std::uint32_t& done) {
  std::mt19937_64 random(11);
  CpuAttention direct(1);
  int num_wrong = 0;
  for (std::uint32_t i = 0; i < kJobs; ++i) {
    if (!eventually([&] { return num_launched.load() > i; })) return -1;
    Share& share = *shares[i * 5 % shares.size()];
    share.new_queries(random);
    share.poison();
    const Outcome expected = share.expected(direct);
    delay(random);
    raise(ready, kFirstReady + i);
    const auto is_done = [&] {
      return has_reached(std::atomic_ref<std::uint32_t>(done).load(std::memory_order_acquire),
                         kFirstDone + i);
    };
    if (!eventually(is_done)) return -1;
    num_wrong += share.result() == expected ? 0 : 1;
  }
  return num_wrong;
}

void many_jobs_in_order(std::size_t num_threads, double spin_s) {
  auto shares = many_shapes();
  std::uint32_t ready = kFirstReady - 1;
  std::uint32_t done = kFirstDone - 1;
  AttentionQueue queue(threads(num_threads), {.capacity = 150, .deadline_s = 60, .spin_s = spin_s});
  CHECK(queue.num_threads() == num_threads);
  std::atomic<std::uint32_t> num_launched = 0;
  int num_wrong = -1;
  std::thread gpu([&] { num_wrong = play_gpu(shares, num_launched, ready, done); });
  std::vector<AttentionQueue::Ticket> tickets;
  for (std::uint32_t i = 0; i < kJobs; ++i) {
    Share& share = *shares[i * 5 % shares.size()];
    const AttentionJob job = share.job({&ready, kFirstReady + i}, {&done, kFirstDone + i});
    const auto submit = [&] {
      try {
        tickets.push_back(queue.submit(job));
      } catch (const QueueFullError&) {
        return false;
      }
      return true;
    };
    if (!eventually(submit)) break;
    num_launched.fetch_add(1);
  }
  gpu.join();
  CHECK(num_wrong == 0);
  CHECK(tickets.size() == kJobs);
  AttentionCounters sum;
  for (const auto ticket : tickets) {
    const AttentionOutcome outcome = queue.poll(ticket);
    sum.done += outcome.status == AttentionStatus::done && !outcome.is_reading ? 1 : 0;
    sum.bytes_read += outcome.bytes_read;
    sum.waited_s += outcome.waited_s;
    queue.forget(ticket);
  }
  const AttentionCounters counters = queue.counters();
  CHECK(sum.done == kJobs && counters.done == kJobs && counters.submitted == kJobs);
  CHECK(counters.failed == 0 && counters.bytes_read == sum.bytes_read && sum.bytes_read > 0);
  CHECK(counters.attended_s > 0 && std::abs(counters.waited_s - sum.waited_s) < 1e-3);
  CHECK(queue.close(0));
}

void what_is_told_of_a_job() {
  AttentionQueue queue(threads(1));
  Shape shape;
  shape.rows = {1, 3, 0};
  shape.stored = {33, 50, 0};
  Share share(shape);
  const auto ticket = queue.submit(share.job());
  CHECK(queue.poll(ticket).status == AttentionStatus::pending);
  raise(share.ready, 1);
  CHECK(eventually([&] { return share.is_done(); }));
  const AttentionOutcome outcome = queue.poll(ticket);
  CHECK(outcome.status == AttentionStatus::done && outcome.message.empty());
  CHECK(outcome.waited_s >= 0 && outcome.attended_s > 0);
  CHECK(outcome.bytes_read == share.bytes());
  queue.forget(ticket);
  CHECK_THROWS(std::invalid_argument, queue.poll(ticket));
  CHECK_THROWS(std::invalid_argument, queue.forget(ticket));
  CHECK_THROWS(std::invalid_argument, queue.cancel(ticket));
  CHECK_THROWS(std::invalid_argument, queue.poll(ticket + 1));
  // A window of the last 5 of 40 tokens, and 2 rows: 6 tokens.
  Shape narrow_view;
  narrow_view.rows = {2};
  narrow_view.window = 5;
  Share windowed(narrow_view);
  windowed.ready = 1;
  const auto second = queue.submit(windowed.job());
  CHECK(second != ticket && eventually([&] { return windowed.is_done(); }));
  CHECK(queue.poll(second).bytes_read == windowed.bytes() / 40 * 6);
}

// Forgotten while it waits: it runs all the same.
void a_forgotten_job_runs() {
  AttentionQueue queue(threads(1));
  Share share({});
  queue.forget(queue.submit(share.job()));
  CpuAttention direct(1);
  const Outcome expected = share.expected(direct);
  raise(share.ready, 1);
  CHECK(eventually([&] { return share.is_done(); }));
  CHECK(share.result() == expected);
}

void a_full_queue() {
  AttentionQueue queue(threads(1), {.capacity = 2});
  Share first({}), second({}), third({});
  queue.submit(first.job());
  queue.submit(second.job());
  CHECK_THROWS(QueueFullError, queue.submit(third.job()));
  raise(first.ready, 1);
  raise(second.ready, 1);
  CHECK(eventually([&] { return second.is_done(); }));
  CHECK(eventually([&] {
    try {
      queue.submit(third.job());
    } catch (const QueueFullError&) {
      return false;
    }
    return true;
  }));
  raise(third.ready, 1);
  CHECK(eventually([&] { return third.is_done(); }));
}

double cpu_seconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

void waiting_leaves_the_cores_alone() {
  AttentionQueue queue(threads(2), {.spin_s = 0.001});
  Share share({});
  const double start = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));  // nothing is due
  const double idle = cpu_seconds() - start;
  queue.submit(share.job());
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(idle < 0.02);
  CHECK(cpu_seconds() - start - idle < 0.1);
  raise(share.ready, 1);
  CHECK(eventually([&] { return share.is_done(); }));
}

void wrong_arguments() {
  CHECK_THROWS(std::invalid_argument, AttentionQueue(threads(1), {.capacity = 0}));
  CHECK_THROWS(std::invalid_argument, AttentionQueue(threads(1), {.deadline_s = 0}));
  CHECK_THROWS(std::invalid_argument, AttentionQueue(threads(1), {.spin_s = -1}));
  CHECK_THROWS(std::invalid_argument,
               AttentionQueue(threads(1), {.spin_s = std::numeric_limits<double>::quiet_NaN()}));
  AttentionQueue queue(threads(1), {.spin_s = std::numeric_limits<double>::infinity()});
  Share share({});
  const auto refuses = [&](const auto& spoil) {
    AttentionJob job = share.job();
    spoil(job);
    CHECK_THROWS(std::invalid_argument, queue.submit(job));
  };
  const std::vector<std::int32_t> none, two{2}, high{99}, late{1, 1}, down{0, -1}, rows{0, 1};
  std::vector<std::int64_t> nowhere(share.job().tables.slices.size(), 0);
  refuses([](AttentionJob& job) { job.ready.word = nullptr; });
  refuses([](AttentionJob& job) { job.done.word = nullptr; });
  refuses([](AttentionJob& job) {
    job.done.word = reinterpret_cast<std::uint32_t*>(reinterpret_cast<std::uintptr_t>(job.done.word) + 2);
  });
  refuses([](AttentionJob& job) { job.queries.data = nullptr; });
  refuses([](AttentionJob& job) { job.result.out = nullptr; });
  refuses([](AttentionJob& job) { job.result.lse = nullptr; });
  refuses([](AttentionJob& job) { job.queries.num_heads = 3; });
  refuses([](AttentionJob& job) { job.queries.num_heads = 0; });
  refuses([](AttentionJob& job) { job.queries.window = 0; });
  refuses([](AttentionJob& job) { job.shape.head_dim = 0; });
  refuses([](AttentionJob& job) { job.shape.num_kv_heads = 0; });
  refuses([](AttentionJob& job) { job.shape.page_tokens = 0; });
  refuses([](AttentionJob& job) { job.tables.max_pages += 1; });
  refuses([&](AttentionJob& job) { job.tables.starts = rows; });
  refuses([&](AttentionJob& job) { job.tables.num_pages = high; });
  refuses([&](AttentionJob& job) { job.tables.kv_end = rows; });
  refuses([&](AttentionJob& job) { job.tables.q_start = none; });
  refuses([&](AttentionJob& job) { job.tables.row_starts = two; });
  refuses([&](AttentionJob& job) { job.tables.row_starts = late; });
  refuses([&](AttentionJob& job) { job.tables.row_starts = down; });
  refuses([&](AttentionJob& job) { job.tables.slices = nowhere; });
  CHECK(queue.counters().submitted == 0 && !share.is_done());
}

}  // namespace

int main() {
  flags_wrap();
  many_jobs_in_order(1, 0.0);
  many_jobs_in_order(3, 0.0005);
  what_is_told_of_a_job();
  a_forgotten_job_runs();
  a_full_queue();
  waiting_leaves_the_cores_alone();
  wrong_arguments();
  return report("attention_queue");
}
