// WorkerTeam: threads, made once, that share out the numbered units of one job after another.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tiermem {

class WorkerTeam {
 public:
  // Does one unit of a job. Called from several threads at once.
  using Unit = std::function<void(std::size_t unit)>;

  // `num_threads` counts the thread that calls run(): one fewer is started. `cpus`: the CPU that each
  // of those is bound to, in order; empty: the system chooses. `spin_s`: for how long they keep their
  // CPUs after a job, in case that the next one comes soon; then they sleep.
  // Throws std::invalid_argument for no thread, cpus of another length, or spin_s not from 0 to 1;
  // std::system_error if a thread cannot be started or bound.
  explicit WorkerTeam(std::size_t num_threads, const std::vector<int>& cpus = {},
                      double spin_s = 0.0);

  // Waits for a job that is running.
  ~WorkerTeam();
  WorkerTeam(const WorkerTeam&) = delete;
  WorkerTeam& operator=(const WorkerTeam&) = delete;

  std::size_t num_threads() const noexcept { return workers_.size() + 1; }

  // Calls unit(0) to unit(num_units - 1), each once, in any order, and returns when all have returned;
  // what they wrote is visible then. The caller takes part, so that a job of few units never waits
  // for threads to wake, and in a forked child, which has no other threads, the caller does it all.
  // If a unit throws, units that were not begun are left out, and the first exception is thrown here; the
  // team can be used on. Several threads may call this: one job runs after the other.
  // REQUIRES: not called from a unit.
  void run(std::size_t num_units, const Unit& unit);

 private:
  struct Job;

  void work() noexcept;
  void watch_for_call(std::uint32_t seen_calls) const noexcept;
  void stop() noexcept;
  void share_out(Job& job) noexcept;
  void publish(Job& job);
  void retire();

  const int process_;   // that the threads belong to
  const double spin_s_;
  std::mutex one_job_;  // held by run()

  // Workers sleep until this changes; it counts jobs, and the order to exit.
  std::atomic<std::uint32_t> calls_ = 0;
  std::atomic<bool> must_exit_ = false;

  std::mutex mutex_;  // guards job_, and that nobody enters a job that was retired
  std::condition_variable all_left_;
  Job* job_ = nullptr;
  std::atomic<std::size_t> num_inside_ = 0;  // workers that hold the job's address

  std::vector<std::thread> workers_;
};

}  // namespace tiermem
