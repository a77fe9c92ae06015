#include "thread_engine.h"

#include <cerrno>
#include <utility>

#include "registered_memory.h"

namespace tiermem {
namespace {

IoProgress run(FileOps& ops, IoOperation& transfer, AtomicIoCounters& counters) {
  IoProgress progress = IoProgress::again;
  while (progress == IoProgress::again) {
    const auto segments = transfer.segments();
    const auto num_segments = static_cast<int>(segments.size());
    const auto offset = static_cast<off_t>(transfer.offset());
    const ssize_t moved =
        transfer.direction() == IoDirection::read
            ? ops.preadv(transfer.fd(), segments.data(), num_segments, offset)
            : ops.pwritev(transfer.fd(), segments.data(), num_segments, offset);
    progress = transfer.advance(moved < 0 ? -errno : moved);
    if (moved > 0) {
      counters.add_bytes(transfer.direction(), static_cast<std::uint64_t>(moved));
    }
  }
  return progress;
}

void work(WorkShare& share) {
  std::unique_lock lock(share.mutex);
  while (true) {
    share.has_work.wait(lock, [&] { return share.must_exit || !share.queue.empty(); });
    auto transfer = share.take();
    if (!transfer) {
      if (share.must_exit) return;
      continue;
    }
    lock.unlock();
    const IoProgress progress = run(*share.ops, *transfer, share.tickets.counters());
    lock.lock();
    share.settle(*transfer, progress);
  }
}

}  // namespace

ThreadEngine::ThreadEngine(std::size_t num_threads, std::uint64_t piece_bytes,
                           std::shared_ptr<FileOps> ops)
    : WorkerEngine(piece_bytes, std::move(ops)) {
  for (std::size_t i = 0; i < num_threads; ++i) start(&work);
}

Registration ThreadEngine::register_memory(std::int64_t address, std::int64_t bytes) {
  require_memory(address, bytes);
  return {};
}

void ThreadEngine::unregister_memory(std::int64_t address, std::int64_t bytes) {
  require_memory(address, bytes);
}

}  // namespace tiermem
