// AttentionQueue against direct attention, with threads in place of the GPU.
#include "tiermem/attention_queue.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <ctime>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../src/attention_kernel.h"
#include "attention_cases.h"
#include "check.h"

using namespace tiermem;
using namespace tiermem_test;
using Clock = std::chrono::steady_clock;

namespace {

void raise(std::uint32_t& word, std::uint32_t value) {
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
    result_.out.resize(num_items() * item_bytes(shape.out_type));
    result_.lse.resize(case_.num_rows() * case_.num_heads());
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
  }

  AttentionJob job() { return job({&ready, 1}, {&done, 1}); }
  AttentionJob job(AttentionFlag ready_flag, AttentionFlag done_flag) {
    return {case_.kv_shape(), case_.tables(), queries(),
            {shape_.out_type, result_.out.data(), result_.lse.data()}, ready_flag, done_flag};
  }

  // By a call that waits for nothing.
  Outcome expected(CpuAttention& attention) const {
    Outcome outcome = result_;
    attention.attend(case_.kv_shape(), case_.tables(), queries(),
                     {shape_.out_type, outcome.out.data(), outcome.lse.data()});
    return outcome;
  }

  const Outcome& result() const { return result_; }
  bool is_nan() const {
    for (const float x : result_.lse) {
      if (!std::isnan(x)) return false;
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

std::unique_ptr<CpuAttention> threads(std::size_t num_threads) {
  return std::make_unique<CpuAttention>(num_threads);
}

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

void throwing_attend(const UnitTask& task) {
  if (task.kv_head == 1) throw std::runtime_error("head 1");
  kPortableAttention.attend(task);
}

void a_kernel_that_throws() {
  AttentionKernel kernel = kPortableAttention;
  kernel.attend = &throwing_attend;
  AttentionQueue queue(std::make_unique<CpuAttention>(2, kernel));
  for (const FloatType out_type : {FloatType::float16, FloatType::bfloat16, FloatType::float32}) {
    Shape shape;
    shape.out_type = out_type;
    Share bad(shape);
    shape.num_kv_heads = 1;
    Share good(shape);
    bad.ready = good.ready = 1;
    const auto first = queue.submit(bad.job());
    const auto second = queue.submit(good.job());
    CHECK(eventually([&] { return good.is_done(); }));
    CHECK(bad.is_done() && bad.is_nan() && !good.is_nan());
    const AttentionOutcome outcome = queue.poll(first);
    CHECK(outcome.status == AttentionStatus::failed && outcome.message == "head 1");
    CHECK(!outcome.is_reading);
    CHECK(queue.poll(second).status == AttentionStatus::done);
  }
  CHECK(queue.counters().failed == 3 && queue.counters().done == 3);
}

void queries_that_do_not_come() {
  AttentionQueue queue(threads(2), {.deadline_s = 0.3});
  Share late({}), next({});
  const auto first = queue.submit(late.job());
  next.ready = 1;
  const auto second = queue.submit(next.job());
  CHECK(eventually([&] { return next.is_done(); }));
  CHECK(late.is_done() && late.is_nan() && !next.is_nan());
  const AttentionOutcome outcome = queue.poll(first);
  CHECK(outcome.status == AttentionStatus::failed && outcome.bytes_read == 0);
  CHECK(outcome.message == "the queries did not arrive within 0.3 s");
  CHECK(eventually([&] { return !queue.poll(first).is_reading; }));
  CHECK(queue.poll(second).status == AttentionStatus::done);
}

// Cancelled behind a job that waits: it ends in its turn.
void a_cancelled_job() {
  AttentionQueue queue(threads(1));
  Share first({}), second({}), third({});
  third.ready = 1;
  queue.submit(first.job());
  const auto ticket = queue.submit(second.job());
  const auto last = queue.submit(third.job());
  queue.cancel(ticket);
  CHECK(queue.poll(ticket).status == AttentionStatus::pending && !second.is_done());
  raise(first.ready, 1);
  CHECK(eventually([&] { return third.is_done(); }));
  CHECK(first.is_done() && second.is_done() && second.is_nan() && !first.is_nan());
  CHECK(queue.poll(ticket).status == AttentionStatus::failed);
  CHECK(queue.poll(ticket).message == "cancelled");
  queue.cancel(last);
  CHECK(queue.poll(last).status == AttentionStatus::done);
  Share waiting({});
  const auto due = queue.submit(waiting.job());
  queue.cancel(due);
  CHECK(eventually([&] { return waiting.is_done(); }));
  CHECK(waiting.is_nan());
}

// Kernels are plain functions: what holds them is found here.
std::atomic<bool> gate_is_shut = false;
std::atomic<int> num_held = 0;

void held_attend(const UnitTask& task) {
  num_held.fetch_add(1);
  gate_is_shut.wait(true);
  kPortableAttention.attend(task);
}

void held_attend_of_nothing(const UnitTask&) {
  num_held.fetch_add(1);
  gate_is_shut.wait(true);
}

void open_gate() {
  gate_is_shut.store(false);
  gate_is_shut.notify_all();
}

void shut_gate() {
  num_held.store(0);
  gate_is_shut.store(true);
}

void attention_that_hangs() {
  AttentionKernel kernel = kPortableAttention;
  kernel.attend = &held_attend;
  shut_gate();
  Share hung({}), behind({}), refused({}), after({});
  AttentionQueue queue(std::make_unique<CpuAttention>(2, kernel), {.deadline_s = 0.5});
  hung.ready = behind.ready = after.ready = 1;
  const auto first = queue.submit(hung.job());
  const auto second = queue.submit(behind.job());
  CHECK(eventually([&] { return behind.is_done(); }));
  CHECK(num_held.load() > 0 && hung.is_done() && hung.is_nan() && behind.is_nan());
  CHECK(queue.poll(first).message == "the attention did not end within 0.5 s");
  CHECK(queue.poll(first).is_reading && !queue.poll(second).is_reading);
  CHECK(queue.poll(second).message ==
        "the attention of a job before this one did not end within 0.5 s");
  CHECK_THROWS(std::runtime_error, queue.submit(refused.job()));
  open_gate();
  CHECK(eventually([&] { return !queue.poll(first).is_reading; }));
  CHECK(hung.is_nan());  // what came late was dropped
  CHECK(eventually([&] {
    try {
      queue.submit(after.job());
    } catch (const std::runtime_error&) {
      return false;
    }
    return true;
  }));
  CHECK(eventually([&] { return after.is_done(); }));
  CHECK(!after.is_nan() && !refused.is_done());
  CHECK(queue.counters().failed == 2 && queue.counters().done == 1);
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

void closing_fails_what_is_left() {
  AttentionQueue queue(threads(2));
  Share ended({}), waiting({}), queued({});
  ended.ready = 1;
  queue.submit(ended.job());
  const auto second = queue.submit(waiting.job());
  const auto third = queue.submit(queued.job());
  CHECK(eventually([&] { return ended.is_done(); }));
  CHECK(queue.close(0.01));
  CHECK(waiting.is_done() && queued.is_done() && waiting.is_nan() && queued.is_nan());
  CHECK(!ended.is_nan());
  for (const auto ticket : {second, third}) {
    const AttentionOutcome outcome = queue.poll(ticket);
    CHECK(outcome.status == AttentionStatus::failed && !outcome.is_reading);
    CHECK(outcome.message == "the attention queue was closed before the job ended");
  }
  CHECK_THROWS(std::logic_error, queue.submit(ended.job()));
  CHECK(queue.close(0));
  CHECK_THROWS(std::invalid_argument, queue.close(-1));
}

void closing_waits_for_what_comes() {
  AttentionQueue queue(threads(1));
  Share share({});
  queue.submit(share.job());
  std::thread gpu([&] { raise(share.ready, 1); });
  CHECK(queue.close(60));
  gpu.join();
  CHECK(share.is_done() && !share.is_nan());
}

void closing_while_attention_hangs() {
  AttentionKernel kernel = kPortableAttention;
  kernel.attend = &held_attend;
  shut_gate();
  Share hung({}), behind({});
  hung.ready = 1;
  AttentionQueue queue(std::make_unique<CpuAttention>(2, kernel));
  const auto ticket = queue.submit(hung.job());
  queue.submit(behind.job());
  CHECK(eventually([] { return num_held.load() > 0; }));
  const auto start = Clock::now();
  CHECK(!queue.close(0.01));
  CHECK(Clock::now() - start < std::chrono::seconds(20));
  CHECK(hung.is_nan() && behind.is_nan() && hung.is_done() && behind.is_done());
  CHECK(queue.poll(ticket).is_reading);
  open_gate();
  CHECK(queue.close(60));
  CHECK(!queue.poll(ticket).is_reading && hung.is_nan());
}

// Its service thread goes on alone, with what it needs.
void destroying_while_attention_hangs() {
  static AttentionKernel kernel = kPortableAttention;
  kernel.attend = &held_attend_of_nothing;
  shut_gate();
  Share hung({});
  {
    hung.ready = 1;
    AttentionQueue queue(std::make_unique<CpuAttention>(1, kernel));
    queue.submit(hung.job());
    CHECK(eventually([] { return num_held.load() > 0; }));
  }
  CHECK(hung.is_done() && hung.is_nan());
  open_gate();
}

// It has none of the threads, and waits for none.
void a_forked_child() {
  auto queue = std::make_unique<AttentionQueue>(threads(2));
  Share share({}), other({});
  const auto ticket = queue->submit(share.job());
  const pid_t child = fork();
  if (child == 0) {
    CHECK_THROWS(std::logic_error, queue->submit(other.job()));
    CHECK_THROWS(std::logic_error, queue->poll(ticket));
    CHECK_THROWS(std::logic_error, queue->cancel(ticket));
    CHECK_THROWS(std::logic_error, queue->forget(ticket));
    CHECK(queue->close(60));
    queue.reset();
    _exit(tally().num_failures == 0 ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  raise(share.ready, 1);
  CHECK(eventually([&] { return share.is_done(); }));
  CHECK(queue->poll(ticket).status == AttentionStatus::done);
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
  a_kernel_that_throws();
  queries_that_do_not_come();
  a_cancelled_job();
  attention_that_hangs();
  a_full_queue();
  closing_fails_what_is_left();
  closing_waits_for_what_comes();
  closing_while_attention_hangs();
  destroying_while_attention_hangs();
  a_forked_child();
  waiting_leaves_the_cores_alone();
  wrong_arguments();
  return report("attention_queue");
}
