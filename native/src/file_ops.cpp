#include "tiermem/file_ops.h"

#include <fcntl.h>
#include <unistd.h>

namespace tiermem {

ssize_t FileOps::preadv(int fd, const iovec* segments, int num_segments, off_t offset) {
  return ::preadv(fd, segments, num_segments, offset);
}

ssize_t FileOps::pwritev(int fd, const iovec* segments, int num_segments, off_t offset) {
  return ::pwritev(fd, segments, num_segments, offset);
}

int FileOps::fallocate(int fd, off_t offset, off_t bytes) {
  return ::fallocate(fd, 0, offset, bytes);
}

int FileOps::fdatasync(int fd) { return ::fdatasync(fd); }

}  // namespace tiermem
