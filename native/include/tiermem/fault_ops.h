// System calls that fail, move fewer bytes or hang when a test wants it.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "tiermem/file_ops.h"

namespace tiermem {

enum class FileCall { read, write, allocate, sync };

// Passes every call on to the system but those for which a fault was planned. Calls are counted per
// kind from 1; where several faults name one call, the one planned last counts.
// Thread-safe.
class FaultOps final : public FileOps {
 public:
  // Calls number first to first + count - 1 of this kind fail with `error`, moving nothing.
  void fail(FileCall call, std::uint64_t first, int error, std::uint64_t count = 1);

  // Those reads or writes move `bytes` bytes at most; 0: as at the end of the file.
  // REQUIRES: call is read or write; std::invalid_argument otherwise.
  void shorten(FileCall call, std::uint64_t first, std::uint64_t bytes, std::uint64_t count = 1);

  // Those calls hang until release(), then go on.
  void hold(FileCall call, std::uint64_t first, std::uint64_t count = 1);

  // Lets every held call go on and forgets every hold().
  void release();

  // Waits until `count` calls are held at once: true, or false after timeout_s.
  bool wait_held(std::uint64_t count, double timeout_s);

  std::uint64_t num_calls(FileCall call) const;

  ssize_t preadv(int fd, const iovec* segments, int num_segments, off_t offset) override;
  ssize_t pwritev(int fd, const iovec* segments, int num_segments, off_t offset) override;
  int fallocate(int fd, off_t offset, off_t bytes) override;
  int fdatasync(int fd) override;

 private:
  enum class Kind { none, fail, shorten, hold };
  struct Fault {
    FileCall call = FileCall::read;
    std::uint64_t first = 0;
    std::uint64_t count = 0;
    Kind kind = Kind::none;
    std::uint64_t value = 0;  // errno or bytes
  };

  void plan(const Fault& fault);
  Fault next(FileCall call);  // counts the call, and waits if it is to be held

  mutable std::mutex mutex_;
  std::condition_variable changed_;  // a call was held, or all were released
  // Guarded by mutex_.
  std::vector<Fault> faults_;
  std::array<std::uint64_t, 4> num_calls_ = {};
  std::uint64_t num_held_ = 0;
  std::uint64_t num_releases_ = 0;
};

}  // namespace tiermem
