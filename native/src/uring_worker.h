// The thread that drives one ring: takes transfers from the queue, starts and ends them.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "registered_memory.h"
#include "uring.h"
#include "uring_files.h"
#include "worker_engine.h"

namespace tiermem {

// A transfer is in exactly one of: the queue, a place whose number is not in free_, ended.
class UringWorker {
 public:
  // `memory` is guarded by the mutex of the WorkShare that run() gets.
  // Throws std::system_error if the kernel refuses io_uring.
  UringWorker(std::size_t queue_depth, const RegisteredMemory& memory);

  // Returns when it must exit and nothing is in flight.
  // Throws std::system_error if the ring is unusable.
  void run(WorkShare& share);

  int set_buffer(std::uint32_t number, iovec memory) noexcept {
    return ring_.set_buffer(number, memory);
  }

 private:
  struct Place {
    IoOperation transfer;
    std::optional<std::uint32_t> buffer;  // registered, and all of the transfer lies in it
  };

  bool take(WorkShare& share);
  void start(std::size_t place);
  void watch_wake_ups();
  void collect(AtomicIoCounters& counters);
  void settle(WorkShare& share);

  const RegisteredMemory& memory_;
  const FileDescriptor wake_fd_;
  Uring ring_;
  UringFiles files_;
  std::vector<Place> places_;  // never resized: the kernel may read the segments in them
  std::vector<std::size_t> free_;
  std::vector<std::size_t> to_start_;
  std::vector<std::pair<std::size_t, IoProgress>> ended_;
};

}  // namespace tiermem
