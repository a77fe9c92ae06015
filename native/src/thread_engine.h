// The I/O engine for kernels without io_uring: worker threads with preadv and pwritev.
#pragma once

#include <memory>
#include <thread>
#include <vector>

#include "tiermem/io_engine.h"

namespace tiermem {

class ThreadEngine final : public IoEngine {
 public:
  // REQUIRES: num_threads >= 1. Throws std::system_error if a thread cannot be started.
  ThreadEngine(std::size_t num_threads, std::shared_ptr<FileOps> ops);
  ~ThreadEngine() override;

  EngineKind kind() const noexcept override { return EngineKind::threads; }
  Ticket submit(IoDirection direction, const BlockFile& file, const IoBatch& batch) override;
  IoResult poll(Ticket ticket) override;
  IoResult wait(Ticket ticket, double timeout_s) override;
  void forget(Ticket ticket) override;
  bool close(double timeout_s) override;
  IoCounters counters() const noexcept override;

 private:
  struct Shared;
  static void work(Shared& shared);
  void stop_workers(bool hanging) noexcept;

  // Shared with the workers, so that one that hangs in the kernel may outlive the engine.
  const std::shared_ptr<Shared> shared_;
  std::vector<std::thread> workers_;
};

}  // namespace tiermem
