// An LMDB file into memory while another process may write it.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <system_error>

#include "tiermem/lmdb_file.h"

namespace tiermem {
namespace {

constexpr std::size_t kHeadBytes = std::size_t{2} * 65536;
constexpr std::size_t kReadBytes = std::size_t{8} << 20;
constexpr int kMaxTries = 16;

// Reads until `bytes` are full or the file ends; how many.
std::size_t read_at(int descriptor, std::uint64_t offset, std::span<std::uint8_t> bytes) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const std::size_t size = std::min(bytes.size() - done, kReadBytes);
    const ssize_t got = ::pread(descriptor, bytes.data() + done, size,
                                static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw std::system_error(errno, std::generic_category(), "cannot read the index");
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

std::vector<std::uint8_t> head_of(int descriptor) {
  std::vector<std::uint8_t> head(kHeadBytes);
  head.resize(read_at(descriptor, 0, head));
  return head;
}

}  // namespace

std::vector<std::uint8_t> read_lmdb_file(int descriptor, std::uint64_t most_bytes) {
  for (int i = 0; i < kMaxTries; ++i) {
    const std::vector<std::uint8_t> head = head_of(descriptor);
    struct stat info {};
    if (::fstat(descriptor, &info) != 0) {
      throw std::system_error(errno, std::generic_category(), "cannot read the index");
    }
    const auto size = static_cast<std::uint64_t>(info.st_size);
    if (size > most_bytes) {
      throw DamagedFile(std::to_string(size) + " bytes, must be at most " +
                        std::to_string(most_bytes));
    }
    std::vector<std::uint8_t> file(size);
    file.resize(read_at(descriptor, 0, file));
    // The state that was in force before everything else was read: the next transaction but one is
    // the first that may write to its pages.
    std::copy_n(head.begin(), std::min(head.size(), file.size()), file.begin());
    const auto before = lmdb_transaction(head);
    const auto after = lmdb_transaction(head_of(descriptor));
    if (before == after || (before && after && *after == *before + 1)) return file;
  }
  throw DamagedFile("changed while it was read, " + std::to_string(kMaxTries) + " times");
}

}  // namespace tiermem
