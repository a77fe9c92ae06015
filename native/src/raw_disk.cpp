#include "tiermem/raw_disk.h"

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "uring.h"

namespace tiermem {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kMostAtOnce = 256;

void require(bool holds, const char* name, std::int64_t value, const char* range) {
  if (holds) return;
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ": must be " +
                              range);
}

class Loop {
 public:
  Loop(const BlockFile& file, std::int64_t address, std::int64_t memory_bytes,
       const RawDiskLoop& loop)
      : files_(file.descriptors()),
        fd_(files_->direct ? files_->direct.get() : files_->buffered.get()),
        loop_(loop),
        piece_bytes_(static_cast<std::uint64_t>(loop.piece_bytes)),
        memory_(static_cast<std::uint64_t>(address)),
        num_places_(static_cast<std::uint64_t>(memory_bytes) / piece_bytes_),
        num_pieces_(file.size_bytes() / piece_bytes_) {}

  double run() {
    const auto start = Clock::now();
    end_ = start + std::chrono::duration_cast<Clock::duration>(
                       std::chrono::duration<double>(loop_.seconds));
    if (loop_.kind == EngineKind::io_uring) {
      run_ring();
    } else {
      run_threads();
    }
    if (error_ != 0) throw FileError(error_, "raw transfer failed", files_->path);
    const std::chrono::duration<double> taken = Clock::now() - start;
    return static_cast<double>(num_done_ * piece_bytes_) / taken.count();
  }

 private:
  bool is_read() const noexcept { return loop_.direction == IoDirection::read; }
  bool is_over() const noexcept { return error_ != 0 || Clock::now() >= end_; }
  std::uint64_t offset_of(std::uint64_t i) const noexcept { return i % num_pieces_ * piece_bytes_; }
  void* place_of(std::uint64_t i) const noexcept {
    return reinterpret_cast<void*>(memory_ + i % num_places_ * piece_bytes_);
  }

  void take_in(std::int64_t result) noexcept {
    if (result == static_cast<std::int64_t>(piece_bytes_)) {
      ++num_done_;
    } else {
      error_ = result < 0 ? static_cast<int>(-result) : EIO;
    }
  }

  // At least one piece each, however short the time.
  void work(std::uint64_t first) noexcept {
    const auto step = static_cast<std::uint64_t>(loop_.num_at_once);
    for (std::uint64_t i = first; i == first || !is_over(); i += step) {
      const auto offset = static_cast<off_t>(offset_of(i));
      void* place = place_of(i);
      const ssize_t moved = is_read() ? ::pread(fd_, place, piece_bytes_, offset)
                                      : ::pwrite(fd_, place, piece_bytes_, offset);
      take_in(moved < 0 ? -errno : moved);
    }
  }

  void run_threads() {
    std::vector<std::jthread> threads;
    for (std::int64_t i = 0; i < loop_.num_at_once; ++i) {
      threads.emplace_back([this, i] { work(static_cast<std::uint64_t>(i)); });
    }
  }

  void run_ring() {
    const auto depth = static_cast<std::uint64_t>(loop_.num_at_once);
    Uring ring(static_cast<unsigned>(depth));
    std::vector<iovec> segments(depth);
    std::uint64_t next = 0;
    const auto start = [&](std::uint64_t place) {
      segments[place] = {place_of(next), piece_bytes_};
      ring.prepare_vectored(loop_.direction, {fd_, false}, {&segments[place], 1}, offset_of(next),
                            place);
      ++next;
    };
    std::uint64_t in_flight = 0;
    for (; in_flight < depth; ++in_flight) start(in_flight);
    while (in_flight > 0) {
      ring.submit_and_wait();
      while (const auto completion = ring.take_completion()) {
        take_in(completion->result);
        if (is_over()) {
          --in_flight;
        } else {
          start(completion->user_data);
        }
      }
    }
  }

  const std::shared_ptr<const BlockFile::Descriptors> files_;
  const int fd_;
  const RawDiskLoop loop_;
  const std::uint64_t piece_bytes_;
  const std::uint64_t memory_;
  const std::uint64_t num_places_;
  const std::uint64_t num_pieces_;
  Clock::time_point end_;
  std::atomic<std::uint64_t> num_done_ = 0;
  std::atomic<int> error_ = 0;
};

}  // namespace

double raw_disk_rate(const BlockFile& file, std::int64_t address, std::int64_t memory_bytes,
                     const RawDiskLoop& loop) {
  constexpr auto kStep = static_cast<std::int64_t>(kDirectAlignment);
  require(loop.num_at_once >= 1 && loop.num_at_once <= kMostAtOnce, "num_at_once",
          loop.num_at_once, "1 to 256");
  require(loop.piece_bytes >= kStep && loop.piece_bytes % kStep == 0, "piece_bytes",
          loop.piece_bytes, "a multiple of 4096");
  require(address > 0, "address", address, "an address");
  require(memory_bytes / loop.piece_bytes >= loop.num_at_once, "memory_bytes", memory_bytes,
          "room for num_at_once pieces");
  require(static_cast<std::uint64_t>(loop.piece_bytes) <= file.size_bytes(), "piece_bytes",
          loop.piece_bytes, "at most the file's size");
  return Loop(file, address, memory_bytes, loop).run();
}

}  // namespace tiermem
