// An LMDB file while another process may write it.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <string>
#include <system_error>

#include "tiermem/lmdb_file.h"

namespace tiermem {
namespace {

constexpr std::uint64_t kBytesPerThread = std::uint64_t{8} << 20;
constexpr int kMaxTries = 16;

[[noreturn]] void cannot_read() {
  throw std::system_error(errno, std::generic_category(), "cannot read the index");
}

// Reads until `bytes` are full or the file ends; how many.
std::size_t read_at(int descriptor, std::uint64_t offset, std::span<std::uint8_t> bytes) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got = ::pread(descriptor, bytes.data() + done, bytes.size() - done,
                                static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) cannot_read();
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

std::vector<std::uint8_t> head_of(int descriptor) {
  std::vector<std::uint8_t> head(LmdbSource::kHeadBytes);
  head.resize(read_at(descriptor, 0, head));
  return head;
}

LmdbSource source_of(int descriptor) {
  LmdbSource source;
  source.head = head_of(descriptor);
  struct stat info {};
  if (::fstat(descriptor, &info) != 0) cannot_read();
  source.num_bytes = static_cast<std::uint64_t>(info.st_size);
  source.read_at = [descriptor](std::uint64_t offset, std::span<std::uint8_t> bytes) {
    return read_at(descriptor, offset, bytes);
  };
  return source;
}

// Where the system has no more threads, one does it too.
std::unique_ptr<WorkerTeam> team_of(std::uint64_t num_bytes, std::size_t max_threads) {
  const auto useful = static_cast<std::size_t>(1 + num_bytes / kBytesPerThread);
  try {
    return std::make_unique<WorkerTeam>(std::clamp<std::size_t>(max_threads, 1, useful));
  } catch (const std::system_error&) {
    return std::make_unique<WorkerTeam>(1);
  }
}

}  // namespace

LmdbContent read_lmdb_file(int descriptor, std::uint64_t most_bytes, RowShape shape,
                           std::size_t max_threads) {
  constexpr std::uint64_t kMinPageBytes = 4096;
  for (int i = 0; i < kMaxTries; ++i) {
    const LmdbSource source = source_of(descriptor);
    if (source.num_bytes > most_bytes) {
      throw DamagedFile(std::to_string(source.num_bytes) + " bytes, must be at most " +
                        std::to_string(most_bytes));
    }
    const std::unique_ptr<WorkerTeam> team = team_of(source.num_bytes, max_threads);
    std::optional<LmdbContent> content;
    std::string damage;
    try {
      content = read_lmdb(source, most_bytes / kMinPageBytes, shape, *team);
    } catch (const DamagedFile& error) {
      damage = error.what();
    }
    // What was read, or found damaged, is the state that was in force before: the next transaction
    // but one is the first that may write to its pages.
    const auto before = lmdb_transaction(source.head);
    const auto after = lmdb_transaction(head_of(descriptor));
    if (before != after && !(before && after && *after == *before + 1)) continue;
    if (!content) throw DamagedFile(damage);
    return std::move(*content);
  }
  throw DamagedFile("changed while it was read, " + std::to_string(kMaxTries) + " times");
}

}  // namespace tiermem
