#include "uring_files.h"

namespace tiermem {

Uring::File UringFiles::name(const BlockFile::Descriptors& files, int fd) {
  // A descriptor's number may have been given to another file since: only one whose owner lives
  // counts.
  for (std::uint32_t number = 0; number < entries_.size(); ++number) {
    const Entry& entry = entries_[number];
    if (entry.fd == fd && !entry.files.expired()) return {static_cast<int>(number), true};
  }
  drop_closed();
  for (std::uint32_t number = 0; number < entries_.size(); ++number) {
    if (entries_[number].fd >= 0) continue;
    if (!ring_.set_file(number, fd)) break;
    entries_[number] = {files.weak_from_this(), fd};
    return {static_cast<int>(number), true};
  }
  return {fd, false};
}

void UringFiles::drop_closed() noexcept {
  for (std::uint32_t number = 0; number < entries_.size(); ++number) {
    Entry& entry = entries_[number];
    if (entry.fd >= 0 && entry.files.expired() && ring_.set_file(number, -1)) entry = {};
  }
}

}  // namespace tiermem
