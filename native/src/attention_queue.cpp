#include "tiermem/attention_queue.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "attention_job.h"
#include "deadline.h"

namespace tiermem {
namespace {

using Clock = QueuedJob::Clock;
using JobPointer = std::shared_ptr<QueuedJob>;

// Between looks at a flag that is long in coming.
constexpr std::chrono::microseconds kNap{50};
// What close() waits, beyond its timeout, for a thread to let go of a job that it failed.
constexpr std::chrono::seconds kLetGoTime{1};

void pause() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

std::string text_of_seconds(double number) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g s", number);
  return text;
}

Clock::duration duration_of(double number) {
  constexpr double kNeverS = 100.0 * 365 * 24 * 3600;
  return std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(std::min(number, kNeverS)));
}

const AttentionQueueOptions& checked(const AttentionQueueOptions& options) {
  if (options.capacity == 0) throw std::invalid_argument("capacity=0: must be at least 1");
  if (!(options.deadline_s > 0)) {
    throw std::invalid_argument("deadline_s=" + std::to_string(options.deadline_s) +
                                ": must be above 0");
  }
  if (!(options.spin_s >= 0)) {
    throw std::invalid_argument("spin_s=" + std::to_string(options.spin_s) +
                                ": must be 0 or more");
  }
  return options;
}

// Counters that any thread may read while others add.
class AtomicCounters {
 public:
  void add_submitted() noexcept { ++submitted_; }
  void add(const AttentionOutcome& outcome) noexcept {
    if (outcome.status == AttentionStatus::failed) {
      ++failed_;
      return;
    }
    bytes_read_ += outcome.bytes_read;
    waited_ns_ += static_cast<std::uint64_t>(outcome.waited_s * 1e9);
    attended_ns_ += static_cast<std::uint64_t>(outcome.attended_s * 1e9);
    ++done_;
  }
  AttentionCounters snapshot() const noexcept {
    return {submitted_, done_, failed_, bytes_read_, 1e-9 * static_cast<double>(waited_ns_),
            1e-9 * static_cast<double>(attended_ns_)};
  }

 private:
  std::atomic<std::uint64_t> submitted_ = 0;
  std::atomic<std::uint64_t> done_ = 0;
  std::atomic<std::uint64_t> failed_ = 0;
  std::atomic<std::uint64_t> bytes_read_ = 0;
  std::atomic<std::uint64_t> waited_ns_ = 0;
  std::atomic<std::uint64_t> attended_ns_ = 0;
};

}  // namespace

// What the threads share; lives as long as one of them.
struct AttentionQueue::State {
  State(std::unique_ptr<CpuAttention> given, const AttentionQueueOptions& wanted)
      : options(checked(wanted)),
        deadline(duration_of(options.deadline_s)),
        spin(duration_of(options.spin_s)),
        attention(std::move(given)) {}

  // Constant.
  const AttentionQueueOptions options;
  const Clock::duration deadline;
  const Clock::duration spin;
  const std::unique_ptr<CpuAttention> attention;

  AtomicCounters counters;

  // The service thread's own: results until they are delivered.
  ResultBuffers buffers;

  mutable std::mutex mutex;             // guards what follows
  std::condition_variable has_work;     // for the service thread
  std::condition_variable has_due;      // for the watchdog, while is_watch_asleep
  std::condition_variable is_idle;      // for close()
  std::deque<JobPointer> queue;         // in phase `queued`, in order
  JobPointer current;                   // held by the service thread
  std::unordered_map<Ticket, JobPointer> jobs;
  Ticket next_ticket = 1;
  bool is_overrun = false;  // `current` has failed at its deadline, while attending
  bool is_closed = false;
  bool must_exit = false;  // for the watchdog
  bool is_watch_asleep = false;

  // The service thread.
  void serve();
  JobPointer next();
  void let_go();
  bool await_queries(QueuedJob& job, AttentionOutcome& outcome);
  void attend(QueuedJob& job, AttentionOutcome outcome);

  // The watchdog.
  void watch();
  std::optional<Clock::time_point> next_deadline() const;
  void enforce_deadline();

  // Any thread.
  void fail(QueuedJob& job, AttentionOutcome outcome, std::string why);
  bool has_nothing() const { return queue.empty() && current == nullptr; }

  // REQUIRES: the mutex is held.
  void fail_queued(const std::string& why);
  void fail_current(const std::string& why);
  const JobPointer& job(Ticket ticket) const;
};

// REQUIRES: the job was moved to phase `ending` by this thread.
void AttentionQueue::State::fail(QueuedJob& job, AttentionOutcome outcome, std::string why) {
  outcome.status = AttentionStatus::failed;
  outcome.message = std::move(why);
  job.fill_with_nan();
  counters.add(outcome);
  job.end(std::move(outcome));
}

// In order, and after whatever is before them has ended: a word of flags never goes back.
void AttentionQueue::State::fail_queued(const std::string& why) {
  for (const JobPointer& queued : queue) {
    queued->move(JobPhase::queued, JobPhase::ending);
    fail(*queued, {}, why);
  }
  queue.clear();
}

void AttentionQueue::State::fail_current(const std::string& why) {
  if (current == nullptr) return;
  if (current->move(JobPhase::waiting, JobPhase::ending)) {
    fail(*current, {}, why);
  } else if (current->move(JobPhase::attending, JobPhase::ending)) {
    is_overrun = true;
    fail(*current, {}, why);
  }
  while (current->phase() == JobPhase::ending) std::this_thread::yield();
}

const JobPointer& AttentionQueue::State::job(Ticket ticket) const {
  const auto found = jobs.find(ticket);
  if (found != jobs.end()) return found->second;
  throw std::invalid_argument("ticket " + std::to_string(ticket) +
                              " was not given out or was forgotten");
}

void AttentionQueue::State::serve() {
  while (const JobPointer job = next()) {
    AttentionOutcome outcome;
    if (await_queries(*job, outcome)) attend(*job, std::move(outcome));
    let_go();
  }
}

// Waits for a job, and makes it due. None once the queue is closed and empty.
JobPointer AttentionQueue::State::next() {
  std::unique_lock lock(mutex);
  has_work.wait(lock, [this] { return !queue.empty() || is_closed; });
  if (queue.empty()) return nullptr;
  current = std::move(queue.front());
  queue.pop_front();
  current->start_reading(Clock::now());
  current->move(JobPhase::queued, JobPhase::waiting);
  if (is_watch_asleep) has_due.notify_one();
  return current;
}

void AttentionQueue::State::let_go() {
  const std::lock_guard lock(mutex);
  current->stop_reading();
  current = nullptr;
  is_overrun = false;
  if (queue.empty()) is_idle.notify_all();
}

// False if the job has failed, by this thread or another one.
bool AttentionQueue::State::await_queries(QueuedJob& job, AttentionOutcome& outcome) {
  const auto spin_end = job.due_at() + spin;
  auto now = Clock::now();
  while (true) {
    if (job.phase() != JobPhase::waiting) return false;
    if (job.is_cancelled()) {
      if (job.move(JobPhase::waiting, JobPhase::ending)) fail(job, {}, "cancelled");
      return false;
    }
    if (job.is_ready()) break;
    if (now < spin_end) {
      pause();
    } else {
      std::this_thread::sleep_for(kNap);
    }
    now = Clock::now();
  }
  outcome.waited_s = seconds(now - job.due_at());
  return job.move(JobPhase::waiting, JobPhase::attending);
}

void AttentionQueue::State::attend(QueuedJob& job, AttentionOutcome outcome) {
  const auto start = Clock::now();
  std::optional<std::string> error;
  try {
    job.attend(*attention, buffers);
  } catch (const std::exception& thrown) {
    error = thrown.what();
  } catch (...) {  // or the thread, and with it the process, would end
    error = "not a std::exception";
  }
  job.stop_reading();
  if (!job.move(JobPhase::attending, JobPhase::ending)) return;
  outcome.bytes_read = job.seen_bytes();
  if (!error) job.deliver(buffers);
  outcome.attended_s = seconds(Clock::now() - start);
  if (error) return fail(job, std::move(outcome), std::move(*error));
  outcome.status = AttentionStatus::done;
  counters.add(outcome);
  job.end(std::move(outcome));
}

void AttentionQueue::State::watch() {
  std::unique_lock lock(mutex);
  while (!must_exit) {
    const auto end = next_deadline();
    if (!end) {
      is_watch_asleep = true;
      has_due.wait(lock);
      is_watch_asleep = false;
    } else if (Clock::now() < *end) {
      has_due.wait_until(lock, *end);
    } else {
      enforce_deadline();
    }
  }
}

// Deadlines ascend from job to job, so that sleeping until an earlier one is never too long.
std::optional<Clock::time_point> AttentionQueue::State::next_deadline() const {
  if (current == nullptr) return std::nullopt;
  const JobPhase phase = current->phase();
  if (phase != JobPhase::waiting && phase != JobPhase::attending) return std::nullopt;
  return current->due_at() + deadline;
}

void AttentionQueue::State::enforce_deadline() {
  const std::string limit = "within " + text_of_seconds(options.deadline_s);
  const bool has_queries = current->phase() == JobPhase::attending;
  fail_current(has_queries ? "the attention did not end " + limit
                           : "the queries did not arrive " + limit);
  if (is_overrun) fail_queued("the attention of a job before this one did not end " + limit);
}

struct AttentionQueue::Threads {
  const int process = ::getpid();
  std::thread service;
  std::thread watchdog;

  // A forked child has the objects but not the threads, and locks as they were: it touches none.
  bool are_here() const noexcept { return ::getpid() == process; }
};

void AttentionQueue::require_threads() const {
  if (threads_->are_here()) return;
  throw std::logic_error("a forked child has no threads of the attention queue");
}

AttentionQueue::AttentionQueue(std::unique_ptr<CpuAttention> attention,
                               const AttentionQueueOptions& options)
    : state_(std::make_shared<State>(std::move(attention), options)),
      threads_(std::make_unique<Threads>()) {
  threads_->watchdog = std::thread([state = state_] { state->watch(); });
  try {
    threads_->service = std::thread([state = state_] { state->serve(); });
  } catch (...) {
    {
      const std::lock_guard lock(state_->mutex);
      state_->must_exit = true;
      state_->has_due.notify_all();
    }
    threads_->watchdog.join();
    throw;
  }
}

AttentionQueue::~AttentionQueue() {
  if (!threads_->are_here()) {
    threads_->watchdog.detach();
    threads_->service.detach();
    return;
  }
  const bool has_ended = close(0);
  {
    const std::lock_guard lock(state_->mutex);
    state_->must_exit = true;
    state_->has_due.notify_all();
  }
  threads_->watchdog.join();
  if (has_ended) {
    threads_->service.join();
  } else {
    threads_->service.detach();
  }
}

std::size_t AttentionQueue::num_threads() const noexcept {
  return state_->attention->num_threads();
}

AttentionInstructions AttentionQueue::instructions() const noexcept {
  return state_->attention->instructions();
}

const AttentionQueueOptions& AttentionQueue::options() const noexcept { return state_->options; }

AttentionQueue::Ticket AttentionQueue::submit(const AttentionJob& job) {
  require_threads();
  const auto queued = std::make_shared<QueuedJob>(job);
  State& state = *state_;
  const std::lock_guard lock(state.mutex);
  if (state.is_closed) throw std::logic_error("the attention queue is closed");
  if (state.is_overrun) {
    throw std::runtime_error("the attention of an earlier job has not returned, " +
                             text_of_seconds(state.options.deadline_s) + " after it was due");
  }
  const std::size_t num_jobs = state.queue.size() + (state.current == nullptr ? 0 : 1);
  if (num_jobs >= state.options.capacity) {
    throw QueueFullError(std::to_string(num_jobs) +
                         " attention jobs have not ended: must be fewer than capacity=" +
                         std::to_string(state.options.capacity));
  }
  const Ticket ticket = state.next_ticket++;
  state.queue.push_back(queued);
  state.jobs.emplace(ticket, queued);
  state.counters.add_submitted();
  state.has_work.notify_one();
  return ticket;
}

AttentionOutcome AttentionQueue::poll(Ticket ticket) const {
  require_threads();
  JobPointer job;
  {
    const std::lock_guard lock(state_->mutex);
    job = state_->job(ticket);
  }
  return job->outcome();
}

void AttentionQueue::cancel(Ticket ticket) {
  require_threads();
  const std::lock_guard lock(state_->mutex);
  state_->job(ticket)->cancel();
}

void AttentionQueue::forget(Ticket ticket) {
  require_threads();
  const std::lock_guard lock(state_->mutex);
  state_->job(ticket);
  state_->jobs.erase(ticket);
}

AttentionCounters AttentionQueue::counters() const noexcept { return state_->counters.snapshot(); }

bool AttentionQueue::close(double timeout_s) {
  const Deadline deadline(timeout_s);
  if (!threads_->are_here()) return true;
  State& state = *state_;
  std::unique_lock lock(state.mutex);
  state.is_closed = true;
  state.has_work.notify_all();
  const auto has_nothing = [&state] { return state.has_nothing(); };
  if (state.is_idle.wait_until(lock, deadline.end(), has_nothing)) return true;
  const std::string why = "the attention queue was closed before the job ended";
  state.fail_current(why);
  state.fail_queued(why);
  return state.is_idle.wait_for(lock, kLetGoTime, has_nothing);
}

}  // namespace tiermem
