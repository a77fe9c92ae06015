// The system calls that move or allocate file bytes, behind a seam where tests put faults.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

namespace tiermem {

// Every function is the system call of its name: returns what it returns and sets errno likewise.
// Called by several worker threads at once; implementations are thread-safe.
class FileOps {
 public:
  FileOps() = default;
  FileOps(const FileOps&) = delete;
  FileOps& operator=(const FileOps&) = delete;
  virtual ~FileOps() = default;

  virtual ssize_t preadv(int fd, const iovec* segments, int num_segments, off_t offset);
  virtual ssize_t pwritev(int fd, const iovec* segments, int num_segments, off_t offset);
  virtual int fallocate(int fd, off_t offset, off_t bytes);
  virtual int fdatasync(int fd);
};

}  // namespace tiermem
