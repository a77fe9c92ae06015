#include "tiermem/worker_team.h"

#include <cerrno>
#include <chrono>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#include <unistd.h>

namespace tiermem {
namespace {

using Clock = std::chrono::steady_clock;

// The last units of a job end within one unit's time of each other: shorter than going to sleep.
constexpr std::chrono::microseconds kWatchTime{50};

void pause() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void bind(std::thread& thread, int cpu) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  int code = EINVAL;
  if (cpu >= 0 && cpu < CPU_SETSIZE) {
    CPU_SET(cpu, &set);
    code = pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);
  }
  if (code != 0) {
    throw std::system_error(code, std::generic_category(), "cpu " + std::to_string(cpu));
  }
#else
  static_cast<void>(thread);
  throw std::invalid_argument("cpu " + std::to_string(cpu) + ": threads are bound on Linux only");
#endif
}

}  // namespace

// One call of run(). Lives until no worker is inside.
struct WorkerTeam::Job {
  const std::size_t num_units;
  const Unit& unit;
  std::atomic<std::size_t> next_unit = 0;
  std::mutex mutex;  // guards error
  std::exception_ptr error;
};

WorkerTeam::WorkerTeam(std::size_t num_threads, const std::vector<int>& cpus, double spin_s)
    : process_(::getpid()), spin_s_(spin_s) {
  if (num_threads == 0) throw std::invalid_argument("num_threads=0: must be at least 1");
  if (!cpus.empty() && cpus.size() != num_threads - 1) {
    throw std::invalid_argument(std::to_string(cpus.size()) + " cpus: must be " +
                                std::to_string(num_threads - 1) + ", one for each thread started");
  }
  if (!(spin_s >= 0.0 && spin_s <= 1.0)) {
    throw std::invalid_argument("spin_s=" + std::to_string(spin_s) + ": must be 0 to 1");
  }
  try {
    for (std::size_t i = 0; i + 1 < num_threads; ++i) {
      workers_.emplace_back([this] { work(); });
      if (!cpus.empty()) bind(workers_.back(), cpus[i]);
    }
  } catch (...) {
    stop();
    throw;
  }
}

WorkerTeam::~WorkerTeam() {
  const std::lock_guard alone(one_job_);
  stop();
}

void WorkerTeam::stop() noexcept {
  must_exit_.store(true);
  calls_.fetch_add(1);
  calls_.notify_all();
  for (std::thread& worker : workers_) {
    // A forked child has the objects but not the threads: they would never end.
    if (::getpid() == process_) {
      worker.join();
    } else {
      worker.detach();
    }
  }
}

void WorkerTeam::run(std::size_t num_units, const Unit& unit) {
  const std::lock_guard alone(one_job_);
  Job job{num_units, unit, {}, {}, {}};
  const bool is_shared = num_units > 1 && !workers_.empty();
  if (is_shared) publish(job);
  share_out(job);
  if (is_shared) retire();
  if (job.error) std::rethrow_exception(job.error);
}

void WorkerTeam::publish(Job& job) {
  {
    const std::lock_guard lock(mutex_);
    job_ = &job;
  }
  calls_.fetch_add(1);
  calls_.notify_all();
}

// Lets nobody in any more, and waits until all have left.
void WorkerTeam::retire() {
  {
    const std::lock_guard lock(mutex_);
    job_ = nullptr;
  }
  const auto watch_end = Clock::now() + kWatchTime;
  while (num_inside_.load() != 0 && Clock::now() < watch_end) pause();
  // Also after watching: who left last may still hold the mutex.
  std::unique_lock lock(mutex_);
  all_left_.wait(lock, [this] { return num_inside_.load() == 0; });
}

void WorkerTeam::share_out(Job& job) noexcept {
  while (true) {
    const std::size_t unit = job.next_unit.fetch_add(1, std::memory_order_relaxed);
    if (unit >= job.num_units) return;
    try {
      job.unit(unit);
    } catch (...) {
      job.next_unit.store(job.num_units, std::memory_order_relaxed);
      const std::lock_guard lock(job.mutex);
      if (!job.error) job.error = std::current_exception();
    }
  }
}

void WorkerTeam::watch_for_call(std::uint32_t seen_calls) const noexcept {
  if (spin_s_ == 0.0) return;
  const auto end = Clock::now() + std::chrono::duration<double>(spin_s_);
  while (calls_.load(std::memory_order_relaxed) == seen_calls && Clock::now() < end) pause();
}

void WorkerTeam::work() noexcept {
  std::uint32_t seen_calls = 0;
  while (true) {
    watch_for_call(seen_calls);
    calls_.wait(seen_calls);
    seen_calls = calls_.load();
    if (must_exit_.load()) return;
    Job* job = nullptr;
    {
      const std::lock_guard lock(mutex_);
      job = job_;
      if (job != nullptr) num_inside_.fetch_add(1);
    }
    if (job == nullptr) continue;
    share_out(*job);
    const std::lock_guard lock(mutex_);
    num_inside_.fetch_sub(1);
    all_left_.notify_all();
  }
}

}  // namespace tiermem
