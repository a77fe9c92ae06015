// What both engines share: tickets, the queue of transfers, and the threads that work it off.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "io_queue.h"
#include "io_tickets.h"
#include "tiermem/io_engine.h"

namespace tiermem {

// Shared with the workers, so that one that hangs in the kernel may outlive the engine.
// Guarded by mutex, but for the system calls and the counters inside tickets.
struct WorkShare {
  explicit WorkShare(std::shared_ptr<FileOps> file_ops) : ops(std::move(file_ops)) {}

  const std::shared_ptr<FileOps> ops;  // of threads; none for io_uring
  std::mutex mutex;
  std::condition_variable has_work;        // the queue has a transfer, or must_exit
  std::condition_variable ticket_is_done;  // a ticket became ok or failed
  std::vector<int> asleep;  // eventfds of workers that wait in the kernel and could take more
  IoQueue queue;
  IoTickets tickets;
  bool is_closed = false;
  bool must_exit = false;
  int broken = 0;  // errno for which a worker had to give up

  bool is_idle() const noexcept { return tickets.counters().snapshot().in_flight == 0; }

  // REQUIRES: mutex is held.
  void wake_workers();
  void cancel_queue();

  // The next transfer whose ticket has not failed meanwhile, if there is one.
  // REQUIRES: mutex is held.
  std::optional<IoOperation> take();

  // Records how a transfer ended. REQUIRES: mutex is held; progress is finished or failed.
  void settle(const IoOperation& transfer, IoProgress progress);
};

class WorkerEngine : public IoEngine {
 public:
  ~WorkerEngine() override;
  Ticket submit(IoDirection direction, const BlockFile& file, const IoBatch& batch) override;
  IoResult poll(Ticket ticket) override;
  IoResult wait(Ticket ticket, double timeout_s) override;
  void forget(Ticket ticket) override;
  bool close(double timeout_s) override;
  IoCounters counters() const noexcept override;

 protected:
  explicit WorkerEngine(std::uint64_t piece_bytes, std::shared_ptr<FileOps> ops = {});

  WorkShare& share() noexcept { return *share_; }

  // Runs `work` in a thread of its own until it returns, which it does once must_exit is set and it
  // has nothing in flight. What it owns it keeps alive as long as the thread.
  // Throws std::system_error if no thread can be had.
  void start(std::function<void(WorkShare&)> work);

 private:
  void stop_workers(bool hanging) noexcept;

  const std::uint64_t piece_bytes_;
  const std::shared_ptr<WorkShare> share_;
  std::vector<std::thread> workers_;
};

}  // namespace tiermem
