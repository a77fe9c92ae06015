// The I/O engine over io_uring: no thread of its own, poll() and wait() drive it.
#pragma once

#include <memory>
#include <mutex>

#include "tiermem/io_engine.h"

namespace tiermem {

class UringEngine final : public IoEngine {
 public:
  // REQUIRES: queue_depth 1 to 4,096. Throws std::system_error if the kernel refuses io_uring.
  explicit UringEngine(std::size_t queue_depth);
  ~UringEngine() override;

  EngineKind kind() const noexcept override { return EngineKind::io_uring; }
  Ticket submit(IoDirection direction, const BlockFile& file, const IoBatch& batch) override;
  IoResult poll(Ticket ticket) override;
  IoResult wait(Ticket ticket, double timeout_s) override;
  void forget(Ticket ticket) override;
  bool close(double timeout_s) override;
  IoCounters counters() const noexcept override;

 private:
  class Driver;

  mutable std::mutex mutex_;
  std::unique_ptr<Driver> driver_;  // guarded by mutex_, but for its counters
};

}  // namespace tiermem
