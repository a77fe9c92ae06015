#include "tiermem/io_engine.h"

#include <stdexcept>

#include "thread_engine.h"
#include "uring_engine.h"

namespace tiermem {
namespace {

constexpr std::int64_t kMostQueueDepth = 4096;
constexpr std::int64_t kMostThreads = 256;

void require_range(const char* name, std::int64_t value, std::int64_t most) {
  if (value >= 1 && value <= most) return;
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ": must be 1 to " +
                              std::to_string(most));
}

}  // namespace

std::unique_ptr<IoEngine> make_io_engine(const IoEngineOptions& options) {
  require_range("queue_depth", options.queue_depth, kMostQueueDepth);
  require_range("num_threads", options.num_threads, kMostThreads);
  if (options.file_ops != nullptr && options.kind != EngineKind::threads) {
    throw std::invalid_argument("planned faults need an engine of kind threads");
  }
  if (options.kind != EngineKind::threads) {
    try {
      return std::make_unique<UringEngine>(static_cast<std::size_t>(options.queue_depth));
    } catch (const std::system_error&) {
      if (options.kind == EngineKind::io_uring) throw;
    }
  }
  auto ops = options.file_ops != nullptr ? options.file_ops : std::make_shared<FileOps>();
  return std::make_unique<ThreadEngine>(static_cast<std::size_t>(options.num_threads),
                                        std::move(ops));
}

}  // namespace tiermem
