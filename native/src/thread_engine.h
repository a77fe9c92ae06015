// The I/O engine for kernels without io_uring: worker threads with preadv and pwritev.
#pragma once

#include <memory>

#include "worker_engine.h"

namespace tiermem {

class ThreadEngine final : public WorkerEngine {
 public:
  // REQUIRES: num_threads >= 1. Throws std::system_error if a thread cannot be started.
  ThreadEngine(std::size_t num_threads, std::uint64_t piece_bytes, std::shared_ptr<FileOps> ops);

  EngineKind kind() const noexcept override { return EngineKind::threads; }
  Registration register_memory(std::int64_t address, std::int64_t bytes) override;
  void unregister_memory(std::int64_t address, std::int64_t bytes) override;
};

}  // namespace tiermem
