#include "thread_engine.h"

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>

#include "deadline.h"
#include "io_tickets.h"

namespace tiermem {

struct ThreadEngine::Shared {
  explicit Shared(std::shared_ptr<FileOps> file_ops) : ops(std::move(file_ops)) {}

  // Constant.
  const std::shared_ptr<FileOps> ops;

  // Guarded by mutex, but for the counters inside tickets.
  std::mutex mutex;
  std::condition_variable has_work;       // queue has an operation, or must_exit
  std::condition_variable ticket_is_done;  // a ticket became ok or failed
  std::deque<IoOperation> queue;
  IoTickets tickets;
  bool is_closed = false;
  bool must_exit = false;

  bool is_idle() const noexcept { return tickets.counters().snapshot().in_flight == 0; }
};

namespace {

IoProgress run(FileOps& ops, IoOperation& operation, AtomicIoCounters& counters) {
  IoProgress progress = IoProgress::again;
  while (progress == IoProgress::again) {
    const auto segments = operation.segments();
    const auto num_segments = static_cast<int>(segments.size());
    const auto offset = static_cast<off_t>(operation.offset());
    const ssize_t moved =
        operation.direction() == IoDirection::read
            ? ops.preadv(operation.fd(), segments.data(), num_segments, offset)
            : ops.pwritev(operation.fd(), segments.data(), num_segments, offset);
    progress = operation.advance(moved < 0 ? -errno : moved);
    if (moved > 0) {
      counters.add_bytes(operation.direction(), static_cast<std::uint64_t>(moved));
    }
  }
  return progress;
}

}  // namespace

ThreadEngine::ThreadEngine(std::size_t num_threads, std::shared_ptr<FileOps> ops)
    : shared_(std::make_shared<Shared>(std::move(ops))) {
  try {
    for (std::size_t i = 0; i < num_threads; ++i) {
      workers_.emplace_back([shared = shared_] { work(*shared); });
    }
  } catch (const std::system_error&) {
    stop_workers(false);
    throw;
  }
}

ThreadEngine::~ThreadEngine() {
  const bool was_closed = [this] {
    const std::lock_guard lock(shared_->mutex);
    return shared_->is_closed;
  }();
  stop_workers(!close(was_closed ? 0.0 : kDestructorTimeoutS));
}

void ThreadEngine::work(Shared& shared) {
  std::unique_lock lock(shared.mutex);
  while (true) {
    shared.has_work.wait(lock, [&] { return shared.must_exit || !shared.queue.empty(); });
    if (shared.queue.empty()) return;
    IoOperation operation = std::move(shared.queue.front());
    shared.queue.pop_front();
    bool is_done = false;
    if (shared.tickets.has_failed(operation.ticket())) {
      is_done = shared.tickets.skip(operation);
    } else {
      lock.unlock();
      const IoProgress progress = run(*shared.ops, operation, shared.tickets.counters());
      lock.lock();
      is_done = progress == IoProgress::finished ? shared.tickets.finish(operation)
                                                 : shared.tickets.fail(operation);
    }
    if (is_done) shared.ticket_is_done.notify_all();
  }
}

void ThreadEngine::stop_workers(bool hanging) noexcept {
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->must_exit = true;
  }
  shared_->has_work.notify_all();
  for (std::thread& worker : workers_) {
    if (hanging) {
      worker.detach();
    } else {
      worker.join();
    }
  }
}

Ticket ThreadEngine::submit(IoDirection direction, const BlockFile& file, const IoBatch& batch) {
  const std::lock_guard lock(shared_->mutex);
  if (shared_->is_closed) throw std::logic_error("the I/O engine is closed");
  const Ticket ticket = shared_->tickets.open(direction, file, batch, shared_->queue);
  shared_->has_work.notify_all();
  return ticket;
}

IoResult ThreadEngine::poll(Ticket ticket) {
  const std::lock_guard lock(shared_->mutex);
  return shared_->tickets.result(ticket);
}

IoResult ThreadEngine::wait(Ticket ticket, double timeout_s) {
  const Deadline deadline(timeout_s);
  std::unique_lock lock(shared_->mutex);
  IoResult result = shared_->tickets.result(ticket);
  while (result.status == IoStatus::pending && !deadline.is_over()) {
    shared_->ticket_is_done.wait_until(lock, deadline.end());
    result = shared_->tickets.result(ticket);
  }
  return result;
}

void ThreadEngine::forget(Ticket ticket) {
  const std::lock_guard lock(shared_->mutex);
  shared_->tickets.forget(ticket);
}

bool ThreadEngine::close(double timeout_s) {
  const Deadline deadline(timeout_s);
  std::unique_lock lock(shared_->mutex);
  shared_->is_closed = true;
  const auto is_idle = [this] { return shared_->is_idle(); };
  if (shared_->ticket_is_done.wait_until(lock, deadline.end(), is_idle)) return true;
  for (const IoOperation& operation : shared_->queue) shared_->tickets.cancel(operation);
  shared_->queue.clear();
  shared_->ticket_is_done.notify_all();
  return is_idle();
}

IoCounters ThreadEngine::counters() const noexcept {
  return shared_->tickets.counters().snapshot();
}

}  // namespace tiermem
