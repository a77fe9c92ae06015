// The I/O engine over io_uring: rings, each driven by a thread of its own.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "registered_memory.h"
#include "uring_worker.h"
#include "worker_engine.h"

namespace tiermem {

class UringEngine final : public WorkerEngine {
 public:
  // REQUIRES: queue_depth 1 to 4,096, num_rings at least 1. The rings share the depth.
  // Throws std::system_error if the kernel refuses io_uring.
  UringEngine(std::size_t queue_depth, std::size_t num_rings, std::uint64_t piece_bytes);

  EngineKind kind() const noexcept override { return EngineKind::io_uring; }
  Registration register_memory(std::int64_t address, std::int64_t bytes) override;
  void unregister_memory(std::int64_t address, std::int64_t bytes) override;

 private:
  int register_piece(iovec piece);

  // The workers' threads outlive the engine if they hang: they own what they use.
  const std::shared_ptr<RegisteredMemory> memory_;  // guarded by share().mutex
  std::vector<std::shared_ptr<UringWorker>> rings_;
};

}  // namespace tiermem
