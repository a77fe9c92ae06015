#include "tiermem/io_engine.h"

#include <stdexcept>

#include "thread_engine.h"
#include "uring_engine.h"

namespace tiermem {
namespace {

constexpr std::int64_t kMostQueueDepth = 4096;
constexpr std::int64_t kMostThreads = 256;
constexpr std::int64_t kMostRings = 16;
constexpr auto kPieceStep = static_cast<std::int64_t>(kDirectAlignment);
constexpr std::int64_t kMostPieceBytes = std::int64_t{1} << 30;

void require_range(const char* name, std::int64_t value, std::int64_t most) {
  if (value >= 1 && value <= most) return;
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ": must be 1 to " +
                              std::to_string(most));
}

void require_piece(std::int64_t bytes) {
  if (bytes >= kPieceStep && bytes <= kMostPieceBytes && bytes % kPieceStep == 0) return;
  throw std::invalid_argument("piece_bytes=" + std::to_string(bytes) + ": must be a multiple of " +
                              std::to_string(kPieceStep) + " up to " +
                              std::to_string(kMostPieceBytes));
}

}  // namespace

std::unique_ptr<IoEngine> make_io_engine(const IoEngineOptions& options) {
  require_range("queue_depth", options.queue_depth, kMostQueueDepth);
  require_range("num_threads", options.num_threads, kMostThreads);
  require_range("num_rings", options.num_rings, kMostRings);
  require_piece(options.piece_bytes);
  if (options.file_ops != nullptr && options.kind != EngineKind::threads) {
    throw std::invalid_argument("planned faults need an engine of kind threads");
  }
  const auto piece_bytes = static_cast<std::uint64_t>(options.piece_bytes);
  if (options.kind != EngineKind::threads) {
    try {
      return std::make_unique<UringEngine>(static_cast<std::size_t>(options.queue_depth),
                                           static_cast<std::size_t>(options.num_rings),
                                           piece_bytes);
    } catch (const std::system_error&) {
      if (options.kind == EngineKind::io_uring) throw;
    }
  }
  auto ops = options.file_ops != nullptr ? options.file_ops : std::make_shared<FileOps>();
  return std::make_unique<ThreadEngine>(static_cast<std::size_t>(options.num_threads), piece_bytes,
                                        std::move(ops));
}

}  // namespace tiermem
