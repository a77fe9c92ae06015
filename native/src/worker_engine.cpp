#include "worker_engine.h"

#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "deadline.h"

namespace tiermem {

void WorkShare::wake_workers() {
  has_work.notify_all();
  for (const int eventfd : std::exchange(asleep, {})) {
    const std::uint64_t one = 1;
    // Cannot fail but by overflow, and then the worker is woken anyway.
    static_cast<void>(!::write(eventfd, &one, sizeof(one)));
  }
}

void WorkShare::cancel_queue() {
  while (!queue.empty()) tickets.cancel(queue.pop());
  ticket_is_done.notify_all();
}

std::optional<IoOperation> WorkShare::take() {
  while (!queue.empty()) {
    IoOperation transfer = queue.pop();
    if (!tickets.has_failed(transfer.ticket())) return transfer;
    if (tickets.skip(transfer)) ticket_is_done.notify_all();
  }
  return std::nullopt;
}

void WorkShare::settle(const IoOperation& transfer, IoProgress progress) {
  const bool is_done =
      progress == IoProgress::finished ? tickets.finish(transfer) : tickets.fail(transfer);
  if (is_done) ticket_is_done.notify_all();
}

WorkerEngine::WorkerEngine(std::uint64_t piece_bytes, std::shared_ptr<FileOps> ops)
    : piece_bytes_(piece_bytes), share_(std::make_shared<WorkShare>(std::move(ops))) {}

WorkerEngine::~WorkerEngine() {
  const bool was_closed = [this] {
    const std::lock_guard lock(share_->mutex);
    return share_->is_closed;
  }();
  stop_workers(!close(was_closed ? 0.0 : kDestructorTimeoutS));
}

void WorkerEngine::start(std::function<void(WorkShare&)> work) {
  workers_.emplace_back([share = share_, work = std::move(work)] {
    try {
      work(*share);
    } catch (const std::system_error& error) {
      // The kernel's queue is unusable. What was in it is never known to have ended, and stays
      // pending: its memory is not the caller's.
      const std::lock_guard lock(share->mutex);
      share->broken = error.code().value();
      share->cancel_queue();
    }
  });
}

void WorkerEngine::stop_workers(bool hanging) noexcept {
  std::vector<std::thread> workers;
  {
    const std::lock_guard lock(share_->mutex);
    share_->must_exit = true;
    share_->wake_workers();
    workers.swap(workers_);
  }
  for (std::thread& worker : workers) {
    if (hanging) {
      worker.detach();
    } else {
      worker.join();
    }
  }
}

Ticket WorkerEngine::submit(IoDirection direction, const BlockFile& file, const IoBatch& batch) {
  const std::lock_guard lock(share_->mutex);
  if (share_->is_closed) throw std::logic_error("the I/O engine is closed");
  if (share_->broken != 0) {
    throw std::system_error(share_->broken, std::generic_category(), "the I/O engine broke down");
  }
  const Ticket ticket =
      share_->tickets.open(direction, file, batch, piece_bytes_, share_->queue);
  share_->wake_workers();
  return ticket;
}

IoResult WorkerEngine::poll(Ticket ticket) {
  const std::lock_guard lock(share_->mutex);
  return share_->tickets.result(ticket);
}

IoResult WorkerEngine::wait(Ticket ticket, double timeout_s) {
  const Deadline deadline(timeout_s);
  std::unique_lock lock(share_->mutex);
  IoResult result = share_->tickets.result(ticket);
  while (result.status == IoStatus::pending && !deadline.is_over()) {
    share_->ticket_is_done.wait_until(lock, deadline.end());
    result = share_->tickets.result(ticket);
  }
  return result;
}

void WorkerEngine::forget(Ticket ticket) {
  const std::lock_guard lock(share_->mutex);
  share_->tickets.forget(ticket);
}

bool WorkerEngine::close(double timeout_s) {
  const Deadline deadline(timeout_s);
  {
    std::unique_lock lock(share_->mutex);
    share_->is_closed = true;
    const auto is_idle = [this] { return share_->is_idle(); };
    if (!share_->ticket_is_done.wait_until(lock, deadline.end(), is_idle)) {
      share_->cancel_queue();
      if (!is_idle()) return false;
    }
  }
  // Not left to the destructor: a garbage collector may call that late, or in a forked child.
  stop_workers(false);
  return true;
}

IoCounters WorkerEngine::counters() const noexcept {
  return share_->tickets.counters().snapshot();
}

}  // namespace tiermem
