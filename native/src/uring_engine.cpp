#include "uring_engine.h"

#include <cstdint>
#include <deque>
#include <stdexcept>
#include <vector>

#include "deadline.h"
#include "io_tickets.h"
#include "uring.h"

namespace tiermem {

// An operation is in exactly one of: waiting_, a slot whose number is not in free_slots_, ended.
class UringEngine::Driver {
 public:
  explicit Driver(std::size_t queue_depth)
      : ring_(static_cast<unsigned>(queue_depth)), slots_(queue_depth) {
    free_slots_.reserve(queue_depth);
    for (std::size_t slot = queue_depth; slot > 0; --slot) free_slots_.push_back(slot - 1);
  }

  Ticket open(IoDirection direction, const BlockFile& file, const IoBatch& batch) {
    if (is_closed_) throw std::logic_error("the I/O engine is closed");
    return tickets_.open(direction, file, batch, waiting_);
  }

  void refuse_batches() noexcept { is_closed_ = true; }
  bool refuses_batches() const noexcept { return is_closed_; }
  IoTickets& tickets() noexcept { return tickets_; }
  const IoTickets& tickets() const noexcept { return tickets_; }
  bool has_operations() const noexcept { return is_in_kernel() || !waiting_.empty(); }
  bool is_in_kernel() const noexcept { return free_slots_.size() < slots_.size(); }

  // Takes every completion that is there and starts what fits; system calls only to start.
  void advance() {
    while (const auto completion = ring_.take_completion()) complete(*completion);
    start_waiting();
    ring_.submit();
  }

  // As advance(), after waiting for a completion, if one can come, for `timeout` at most.
  void advance_within(std::chrono::nanoseconds timeout) {
    if (is_in_kernel()) ring_.submit_and_wait(timeout);
    advance();
  }

  void cancel_waiting() {
    for (const IoOperation& operation : waiting_) tickets_.cancel(operation);
    waiting_.clear();
  }

 private:
  void start_waiting() {
    while (!waiting_.empty() && !free_slots_.empty()) {
      IoOperation operation = std::move(waiting_.front());
      waiting_.pop_front();
      if (tickets_.has_failed(operation.ticket())) {
        tickets_.skip(operation);
        continue;
      }
      const std::size_t slot = free_slots_.back();
      free_slots_.pop_back();
      slots_[slot] = std::move(operation);
      start(slot);
    }
  }

  void start(std::size_t slot) noexcept {
    const IoOperation& operation = slots_[slot];
    const bool is_read = operation.direction() == IoDirection::read;
    ring_.prepare(is_read ? IORING_OP_READV : IORING_OP_WRITEV, operation.fd(),
                  operation.segments(), operation.offset(), slot);
  }

  void complete(const UringCompletion& completion) {
    const std::size_t slot = completion.user_data;
    IoOperation& operation = slots_[slot];
    const IoProgress progress = operation.advance(completion.result);
    if (completion.result > 0) {
      tickets_.counters().add_bytes(operation.direction(),
                                    static_cast<std::uint64_t>(completion.result));
    }
    if (progress == IoProgress::again) {
      start(slot);
      return;
    }
    if (progress == IoProgress::finished) {
      tickets_.finish(operation);
    } else {
      tickets_.fail(operation);
    }
    free_slots_.push_back(slot);
  }

  Uring ring_;
  IoTickets tickets_;
  std::deque<IoOperation> waiting_;
  std::vector<IoOperation> slots_;  // never resized: the kernel reads the segments in them
  std::vector<std::size_t> free_slots_;
  bool is_closed_ = false;
};

UringEngine::UringEngine(std::size_t queue_depth)
    : driver_(std::make_unique<Driver>(queue_depth)) {}

UringEngine::~UringEngine() {
  bool is_idle = false;
  try {
    is_idle = close(driver_->refuses_batches() ? 0.0 : kDestructorTimeoutS);
  } catch (const std::system_error&) {
    is_idle = false;  // the ring is unusable: what is in flight cannot be waited for
  }
  // The kernel may still write into the rings and use the files: leaked on purpose.
  if (!is_idle) static_cast<void>(driver_.release());
}

Ticket UringEngine::submit(IoDirection direction, const BlockFile& file, const IoBatch& batch) {
  const std::lock_guard lock(mutex_);
  const Ticket ticket = driver_->open(direction, file, batch);
  driver_->advance();
  return ticket;
}

IoResult UringEngine::poll(Ticket ticket) {
  const std::lock_guard lock(mutex_);
  driver_->advance();
  return driver_->tickets().result(ticket);
}

IoResult UringEngine::wait(Ticket ticket, double timeout_s) {
  const Deadline deadline(timeout_s);
  const std::lock_guard lock(mutex_);
  driver_->advance();
  IoResult result = driver_->tickets().result(ticket);
  while (result.status == IoStatus::pending && !deadline.is_over()) {
    driver_->advance_within(deadline.left());
    result = driver_->tickets().result(ticket);
  }
  return result;
}

void UringEngine::forget(Ticket ticket) {
  const std::lock_guard lock(mutex_);
  driver_->tickets().forget(ticket);
}

bool UringEngine::close(double timeout_s) {
  const Deadline deadline(timeout_s);
  const std::lock_guard lock(mutex_);
  driver_->refuse_batches();
  driver_->advance();
  while (driver_->has_operations() && !deadline.is_over()) {
    driver_->advance_within(deadline.left());
  }
  driver_->cancel_waiting();
  return !driver_->is_in_kernel();
}

IoCounters UringEngine::counters() const noexcept {
  return driver_->tickets().counters().snapshot();
}

}  // namespace tiermem
