#include "tiermem/block_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

namespace tiermem {
namespace {

constexpr std::size_t kZeroChunkBytes = std::size_t{1} << 20;

struct stat stat_of(int fd, const std::string& path) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) throw FileError(errno, "cannot stat", path);
  return info;
}

int open_flags(OpenMode mode) {
  // O_NONBLOCK: opening a pipe must not wait for its other end; cleared once it proved a file.
  const int common = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  return common | (mode == OpenMode::read_only ? O_RDONLY : O_RDWR);
}

FileDescriptor open_buffered(const std::string& path, OpenMode mode) {
  FileDescriptor fd(::open(path.c_str(), open_flags(mode)));
  if (!fd) throw FileError(errno, "cannot open", path);
  if (!S_ISREG(stat_of(fd.get(), path).st_mode)) {
    throw FileError(EINVAL, "not a regular file", path);
  }
  if (::fcntl(fd.get(), F_SETFL, 0) != 0) throw FileError(errno, "cannot set flags of", path);
  return fd;
}

// Empty where the file system refuses O_DIRECT. The same file even if the path was replaced since.
FileDescriptor open_direct(const std::string& path, OpenMode mode, int buffered_fd) {
  FileDescriptor fd(::open(path.c_str(), (open_flags(mode) & ~O_NONBLOCK) | O_DIRECT));
  if (!fd && (errno == EINVAL || errno == EOPNOTSUPP)) return fd;
  if (!fd) throw FileError(errno, "cannot open for direct I/O", path);
  const struct stat direct = stat_of(fd.get(), path);
  const struct stat buffered = stat_of(buffered_fd, path);
  if (direct.st_dev != buffered.st_dev || direct.st_ino != buffered.st_ino) {
    throw FileError(ESTALE, "replaced while it was opened", path);
  }
  return fd;
}

// True if the file was made here.
bool make_if_absent(const std::string& path) {
  const int flags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_CREAT | O_EXCL;
  const FileDescriptor fd(::open(path.c_str(), flags, 0600));
  if (!fd && errno != EEXIST) throw FileError(errno, "cannot create", path);
  return static_cast<bool>(fd);
}

// Filling a disk to find out that it is too small would disturb everyone who writes to it.
void require_free_space(int fd, std::uint64_t bytes, const std::string& path) {
  struct statvfs info {};
  if (::fstatvfs(fd, &info) != 0) throw FileError(errno, "cannot stat the file system of", path);
  const std::uint64_t block_bytes = info.f_frsize;
  const std::uint64_t needed_blocks = bytes / block_bytes + (bytes % block_bytes != 0);
  if (needed_blocks > info.f_bavail) {
    throw FileError(ENOSPC,
                    "cannot allocate " + std::to_string(bytes) + " more bytes, " +
                        std::to_string(info.f_bavail * block_bytes) + " are free",
                    path);
  }
}

// Returns an errno, 0 for success.
int write_zeros(FileOps& ops, int fd, std::uint64_t start, std::uint64_t end) {
  std::vector<std::byte> zeros(kZeroChunkBytes);
  while (start < end) {
    const iovec segment{zeros.data(), std::min<std::uint64_t>(zeros.size(), end - start)};
    const ssize_t written = ops.pwritev(fd, &segment, 1, static_cast<off_t>(start));
    if (written > 0) {
      start += static_cast<std::uint64_t>(written);
    } else if (written == 0 || errno != EINTR) {
      return written == 0 ? EIO : errno;
    }
  }
  return 0;
}

int allocate_range(FileOps& ops, int fd, std::uint64_t start, std::uint64_t end) {
  int result = 0;
  do {
    result = ops.fallocate(fd, static_cast<off_t>(start), static_cast<off_t>(end - start));
  } while (result != 0 && errno == EINTR);
  if (result == 0) return 0;
  if (errno == EOPNOTSUPP || errno == ENOSYS) return write_zeros(ops, fd, start, end);
  return errno;
}

// Grows the file from `start` to `end` bytes, or throws and leaves it `start` bytes long.
void grow(FileOps& ops, int fd, std::uint64_t start, std::uint64_t end, const std::string& path) {
  require_free_space(fd, end - start, path);
  const int error = allocate_range(ops, fd, start, end);
  if (error == 0) return;
  const bool restored = ::ftruncate(fd, static_cast<off_t>(start)) == 0;
  throw FileError(error,
                  "cannot grow from " + std::to_string(start) + " to " + std::to_string(end) +
                      " bytes" + (restored ? "" : " and not cut back either"),
                  path);
}

void require_size(std::uint64_t size_bytes) {
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());
  if (size_bytes < 1 || size_bytes > kMost) {
    throw std::invalid_argument("size_bytes=" + std::to_string(size_bytes) + ": must be 1 to " +
                                std::to_string(kMost));
  }
}

}  // namespace

FileDescriptor::FileDescriptor(FileDescriptor&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)) {}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

BlockFile::BlockFile(std::shared_ptr<Descriptors> descriptors, std::uint64_t size_bytes,
                     std::shared_ptr<FileOps> ops)
    : path_(descriptors->path),
      is_direct_(static_cast<bool>(descriptors->direct)),
      descriptors_(std::move(descriptors)),
      size_bytes_(size_bytes),
      ops_(std::move(ops)) {}

std::shared_ptr<BlockFile> BlockFile::open(const std::string& path, std::uint64_t size_bytes,
                                           OpenMode mode, std::shared_ptr<FileOps> ops) {
  if (mode == OpenMode::create) require_size(size_bytes);
  const bool is_new = mode == OpenMode::create && make_if_absent(path);
  try {
    auto files = std::make_shared<Descriptors>();
    files->path = path;
    files->buffered = open_buffered(path, mode);
    files->direct = open_direct(path, mode, files->buffered.get());
    const int fd = files->buffered.get();
    const auto present_bytes = static_cast<std::uint64_t>(stat_of(fd, path).st_size);
    if (present_bytes < size_bytes) {
      if (mode != OpenMode::create) {
        throw FileError(ENODATA,
                        "has " + std::to_string(present_bytes) + " bytes, needs " +
                            std::to_string(size_bytes),
                        path);
      }
      grow(*ops, fd, present_bytes, size_bytes, path);
    }
    const std::uint64_t length = std::max(present_bytes, size_bytes);
    return std::shared_ptr<BlockFile>(new BlockFile(std::move(files), length, std::move(ops)));
  } catch (const FileError&) {
    if (is_new) ::unlink(path.c_str());
    throw;
  }
}

std::shared_ptr<BlockFile> BlockFile::adopt(FileDescriptor direct, FileDescriptor buffered,
                                            std::uint64_t size_bytes, std::string path) {
  auto files = std::make_shared<Descriptors>();
  files->direct = std::move(direct);
  files->buffered = std::move(buffered);
  files->path = std::move(path);
  return std::shared_ptr<BlockFile>(
      new BlockFile(std::move(files), size_bytes, std::make_shared<FileOps>()));
}

std::shared_ptr<const BlockFile::Descriptors> BlockFile::descriptors() const {
  if (is_closed()) throw FileError(EBADF, "the file is closed", path_);
  return descriptors_;
}

std::uint64_t BlockFile::allocated_bytes() const {
  // POSIX leaves the unit of st_blocks open; Linux counts in 512 bytes whatever the block size.
  return static_cast<std::uint64_t>(stat_of(descriptors()->buffered.get(), path_).st_blocks) * 512;
}

void BlockFile::sync() const {
  const auto files = descriptors();
  int result = 0;
  do {
    result = ops_->fdatasync(files->buffered.get());
  } while (result != 0 && errno == EINTR);
  if (result != 0) throw FileError(errno, "cannot sync", path_);
}

void BlockFile::resize(std::uint64_t size_bytes) {
  require_size(size_bytes);
  const auto files = descriptors();
  if (size_bytes > size_bytes_) {
    grow(*ops_, files->buffered.get(), size_bytes_, size_bytes, path_);
  } else if (::ftruncate(files->buffered.get(), static_cast<off_t>(size_bytes)) != 0) {
    throw FileError(errno, "cannot shrink", path_);
  }
  size_bytes_ = size_bytes;
}

}  // namespace tiermem
