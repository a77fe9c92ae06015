// AttentionQueue: attention that begins when its queries have arrived in memory, and ends by a flag.
//
// A GPU, or a thread, writes queries and then the flag `ready`; threads of the queue attend over pages in
// host memory, write the result and then the flag `done`, for which the GPU waits. Whoever enqueues GPU
// work submits jobs ahead of it and waits for nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "tiermem/cpu_attention.h"

namespace tiermem {

// A word of memory that rises to a value, and past it: values of one word ascend from job to job, and wrap.
struct AttentionFlag {
  std::uint32_t* word;  // aligned to 4 bytes
  std::uint32_t value;
};

// As CU_STREAM_WAIT_VALUE_GEQ compares: up to 2^31 - 1 steps past the value, also when the word has wrapped.
constexpr bool has_reached(std::uint32_t word, std::uint32_t value) noexcept {
  return static_cast<std::int32_t>(word - value) >= 0;
}

// What CpuAttention::attend takes, and two flags.
struct AttentionJob {
  KvShape shape;
  PageTables tables;
  QueryRows queries;
  AttentionResult result;
  AttentionFlag ready;  // reached when the queries are there; read with acquire
  AttentionFlag done;   // stored when the result is there, or never will be; with release
};

struct AttentionQueueOptions {
  std::size_t capacity = 1024;  // jobs that have not ended
  // For a job, from when it is due (all before it have ended, and it was submitted) to its end.
  double deadline_s = 30.0;
  // For how long the service thread keeps its core while it waits for queries; from then on it sleeps
  // 50 microseconds between looks. 0: never; infinity: always.
  double spin_s = 0.002;
};

enum class AttentionStatus {
  pending,
  done,    // the result is what CpuAttention::attend gives
  failed,  // the result is NaN: output, lse and page_lse
};

struct AttentionOutcome {
  AttentionStatus status = AttentionStatus::pending;
  std::string message;           // why it failed, else empty
  double waited_s = 0;           // from when it was due until its queries had arrived
  double attended_s = 0;         // from then to its end
  std::uint64_t bytes_read = 0;  // of K and V that some row sees, each once; 0 if the queries never came
  // A thread may still look at `ready` and read queries and pages of a job that has failed: it did not
  // return in time. They must stay mapped until this is false, for ever if need be.
  bool is_reading = false;
};

// Since construction. Jobs count as ended before their flag `done` is stored.
struct AttentionCounters {
  std::uint64_t submitted = 0;
  std::uint64_t done = 0;
  std::uint64_t failed = 0;
  std::uint64_t bytes_read = 0;  // of what is done
  double waited_s = 0;           // of what is done
  double attended_s = 0;         // of what is done
};

// submit() found as many jobs that have not ended as there may be.
class QueueFullError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Jobs run one after the other, in the order of their submission; a job's done is stored after that of
// every job before it. Results are those of CpuAttention, bit for bit. They are computed in memory of
// the queue's own, and reach the job's memory only before done is stored.
//
// Liveness. done is stored in every case: after a failure, at the deadline and at close the job's result
// is filled with NaN first. A job whose queries do not come ends at its deadline, those behind it have
// theirs. If attention itself overruns the deadline, a watchdog thread ends the job and all behind it,
// and submit() throws until the attention has returned; what it returns then is dropped.
//
// Threads. One service thread takes part in the attention: together those that CpuAttention counts.
// It sleeps while no job is due. A watchdog thread sleeps but at deadlines. All functions may be called
// from any thread. In a forked child there are no threads: submit, poll, cancel and forget throw
// std::logic_error, close has nothing to wait for.
class AttentionQueue {
 public:
  // Throws std::invalid_argument for options out of range, std::system_error for a thread that cannot
  // be started.
  explicit AttentionQueue(std::unique_ptr<CpuAttention> attention,
                          const AttentionQueueOptions& options = {});

  // Without an earlier close(), as close(0). A service thread whose attention has not returned even then
  // is left to itself, with all that it needs of the queue: it ends when the attention does.
  ~AttentionQueue();
  AttentionQueue(const AttentionQueue&) = delete;
  AttentionQueue& operator=(const AttentionQueue&) = delete;

  std::size_t num_threads() const noexcept;
  AttentionInstructions instructions() const noexcept;
  const AttentionQueueOptions& options() const noexcept;

  // Names a job; never reused by the same queue, never 0.
  using Ticket = std::uint64_t;

  // Copies shape and tables and returns at once. It never waits for room: the jobs ahead may wait for GPU
  // work that the caller is yet to enqueue.
  // REQUIRES, not checked: queries, pages, result and flags stay as AttentionJob says until the job has
  // ended; queries and pages beyond that while AttentionOutcome::is_reading. No result lies where another
  // job's may still be read or written: a failure writes the results of all jobs that have not ended.
  // Throws std::invalid_argument for what CpuAttention::attend refuses, sizes below 1, heads that do not
  // fit, and flags without or at an odd address; QueueFullError; std::runtime_error while
  // attention overruns a deadline; std::logic_error after close(). Nothing was queued then.
  Ticket submit(const AttentionJob& job);

  // What became of a job; not pending once done was seen to be stored. Kept until forget().
  // Throws std::invalid_argument for a ticket that was not given out or was forgotten.
  AttentionOutcome poll(Ticket ticket) const;

  // The job's queries will not come: it fails when it is due, without waiting. Too late if they have
  // arrived. Throws as poll().
  void cancel(Ticket ticket);

  // Drops what is known of a job, but not the job. Throws as poll().
  void forget(Ticket ticket);

  AttentionCounters counters() const noexcept;

  // Refuses new jobs and waits until all have ended: true. When timeout_s is over first, the others
  // fail, and if a thread is still reading for one of them a second later: false. May be called again.
  bool close(double timeout_s);

 private:
  struct State;
  std::shared_ptr<State> state_;
  void require_threads() const;
  struct Threads;
  std::unique_ptr<Threads> threads_;
};

}  // namespace tiermem
