#include "uring_worker.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace tiermem {
namespace {

constexpr std::uint64_t kWakeUp = UINT64_MAX;  // user data of what is no transfer

FileDescriptor make_eventfd() {
  FileDescriptor fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!fd) throw std::system_error(errno, std::generic_category(), "eventfd");
  return fd;
}

}  // namespace

UringWorker::UringWorker(std::size_t queue_depth, const RegisteredMemory& memory)
    : memory_(memory),
      wake_fd_(make_eventfd()),
      ring_(static_cast<unsigned>(queue_depth + 1)),  // and one for wake-ups
      files_(ring_),
      places_(queue_depth) {
  free_.reserve(queue_depth);
  for (std::size_t place = queue_depth; place > 0; --place) free_.push_back(place - 1);
}

void UringWorker::run(WorkShare& share) {
  watch_wake_ups();
  std::unique_lock lock(share.mutex);
  while (true) {
    const bool wants_more = take(share);
    if (free_.size() == places_.size()) {
      if (share.must_exit) return;
      files_.drop_closed();
      share.has_work.wait(lock, [&] { return share.must_exit || !share.queue.empty(); });
      continue;
    }
    if (wants_more) share.asleep.push_back(wake_fd_.get());
    lock.unlock();
    for (const std::size_t place : std::exchange(to_start_, {})) start(place);
    ring_.submit_and_wait();
    collect(share.tickets.counters());
    lock.lock();
    std::erase(share.asleep, wake_fd_.get());
    settle(share);
  }
}

// Fills the free places; whether some are left. REQUIRES: the mutex is held.
bool UringWorker::take(WorkShare& share) {
  while (!free_.empty()) {
    auto transfer = share.take();
    if (!transfer) return true;
    const std::size_t place = free_.back();
    free_.pop_back();
    const auto segments = transfer->segments();
    places_[place].buffer.reset();
    if (segments.size() == 1) {
      places_[place].buffer = memory_.find(reinterpret_cast<std::uintptr_t>(segments[0].iov_base),
                                           segments[0].iov_len);
    }
    places_[place].transfer = std::move(*transfer);
    to_start_.push_back(place);
  }
  return false;
}

void UringWorker::start(std::size_t place) {
  const IoOperation& transfer = places_[place].transfer;
  const Uring::File file = files_.name(transfer.files(), transfer.fd());
  if (const auto buffer = places_[place].buffer) {
    ring_.prepare_registered(transfer.direction(), file, transfer.segments()[0], *buffer,
                             transfer.offset(), place);
  } else {
    ring_.prepare_vectored(transfer.direction(), file, transfer.segments(), transfer.offset(),
                           place);
  }
}

void UringWorker::watch_wake_ups() {
  std::uint64_t count = 0;
  static_cast<void>(!::read(wake_fd_.get(), &count, sizeof(count)));  // EAGAIN: none since
  ring_.prepare_poll(wake_fd_.get(), kWakeUp);
}

// Takes in what the kernel says; starts again what is not finished.
void UringWorker::collect(AtomicIoCounters& counters) {
  while (const auto completion = ring_.take_completion()) {
    if (completion->user_data == kWakeUp) {
      watch_wake_ups();
      continue;
    }
    const std::size_t place = completion->user_data;
    IoOperation& transfer = places_[place].transfer;
    const IoProgress progress = transfer.advance(completion->result);
    if (completion->result > 0) {
      counters.add_bytes(transfer.direction(), static_cast<std::uint64_t>(completion->result));
    }
    if (progress == IoProgress::again) {
      start(place);
    } else {
      ended_.emplace_back(place, progress);
    }
  }
}

// REQUIRES: the mutex is held.
void UringWorker::settle(WorkShare& share) {
  for (const auto& [place, progress] : ended_) {
    share.settle(places_[place].transfer, progress);
    free_.push_back(place);
  }
  ended_.clear();
}

}  // namespace tiermem
