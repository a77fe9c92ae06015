#include "io_plan.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

namespace tiermem {
namespace {

// What the kernel takes in one call is 1,024; a transfer seldom gains beyond this.
constexpr std::size_t kMostSegments = 128;

iovec segment_at(std::int64_t address, std::int64_t length) {
  return {reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)),
          static_cast<std::size_t>(length)};
}

bool is_aligned(const iovec& segment) {
  return reinterpret_cast<std::uintptr_t>(segment.iov_base) % kDirectAlignment == 0 &&
         segment.iov_len % kDirectAlignment == 0;
}

// Memory that lies in one piece becomes one segment.
void append(std::vector<iovec>& segments, const iovec& next) {
  if (!segments.empty()) {
    iovec& last = segments.back();
    if (static_cast<std::byte*>(last.iov_base) + last.iov_len == next.iov_base) {
      last.iov_len += next.iov_len;
      return;
    }
  }
  segments.push_back(next);
}

// One operation of the batch: bytes of a file, and the one or two places in memory they belong to.
struct Operation {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::array<iovec, 2> segments = {};
  std::size_t num_segments = 1;
  bool aligned = false;

  Operation(const IoBatch& batch, std::size_t i) {
    offset = static_cast<std::uint64_t>(batch.offsets[i]);
    bytes = static_cast<std::uint64_t>(batch.lengths[i] + batch.tail_length);
    segments[0] = segment_at(batch.addresses[i], batch.lengths[i]);
    if (!batch.tail_addresses.empty()) {
      segments[1] = segment_at(batch.tail_addresses[i], batch.tail_length);
      num_segments = 2;
    }
    aligned = offset % kDirectAlignment == 0 && is_aligned(segments[0]) &&
              (num_segments == 1 || is_aligned(segments[1]));
  }
};

std::vector<std::uint32_t> order_of(std::span<const std::int64_t> offsets) {
  std::vector<std::uint32_t> order(offsets.size());
  std::iota(order.begin(), order.end(), 0U);
  if (std::is_sorted(offsets.begin(), offsets.end())) return order;
  std::stable_sort(order.begin(), order.end(), [&](std::uint32_t left, std::uint32_t right) {
    return offsets[left] < offsets[right];
  });
  return order;
}

class Planner {
 public:
  Planner(Ticket ticket, IoDirection direction, const BlockFile::Descriptors& files,
          std::uint64_t piece_bytes)
      : ticket_(ticket), direction_(direction), files_(files), piece_bytes_(piece_bytes) {}

  void add(const Operation& operation) {
    const std::uint64_t num_pieces = (operation.bytes + piece_bytes_ / 2) / piece_bytes_;
    if (num_pieces > 1) {
      flush();
      cut(operation, num_pieces);
      return;
    }
    if (!may_join(operation)) flush();
    if (segments_.empty()) {
      start_ = end_ = operation.offset;
      aligned_ = operation.aligned;
    }
    for (std::size_t i = 0; i < operation.num_segments; ++i) {
      append(segments_, operation.segments[i]);
    }
    end_ += operation.bytes;
    ++num_operations_;
  }

  IoPlan finish() {
    flush();
    return std::move(plan_);
  }

 private:
  bool may_join(const Operation& operation) const {
    return operation.offset == end_ && operation.aligned == aligned_ &&
           end_ - start_ + operation.bytes <= piece_bytes_ + piece_bytes_ / 4 &&
           segments_.size() + operation.num_segments <= kMostSegments;
  }

  void emit(std::uint64_t offset, std::vector<iovec> segments, IoShare share) {
    plan_.transfers.emplace_back(ticket_, direction_, files_, offset, std::move(segments), share);
  }

  void flush() {
    if (segments_.empty()) return;
    emit(start_, std::exchange(segments_, {}), {.num_operations = num_operations_});
    num_operations_ = 0;
  }

  void cut(const Operation& operation, std::uint64_t num_pieces) {
    const auto number = static_cast<std::uint32_t>(plan_.num_pieces.size());
    plan_.num_pieces.push_back(static_cast<std::uint32_t>(num_pieces));
    std::size_t segment = 0;
    std::uint64_t done = 0;  // of that segment
    for (std::uint64_t piece = 0; piece < num_pieces; ++piece) {
      const std::uint64_t start = piece * piece_bytes_;
      std::uint64_t left = piece + 1 < num_pieces ? piece_bytes_ : operation.bytes - start;
      std::vector<iovec> segments;
      while (left > 0) {
        const iovec& source = operation.segments[segment];
        const std::uint64_t taken = std::min<std::uint64_t>(left, source.iov_len - done);
        append(segments, {static_cast<std::byte*>(source.iov_base) + done, taken});
        left -= taken;
        done += taken;
        if (done == source.iov_len) {
          ++segment;
          done = 0;
        }
      }
      emit(operation.offset + start, std::move(segments), {.cut = number});
    }
  }

  const Ticket ticket_;
  const IoDirection direction_;
  const BlockFile::Descriptors& files_;
  const std::uint64_t piece_bytes_;
  IoPlan plan_;
  // The transfer that the next operation may join: bytes [start_, end_) of the file.
  std::vector<iovec> segments_;
  std::uint64_t start_ = 0;
  std::uint64_t end_ = 0;
  std::uint32_t num_operations_ = 0;
  bool aligned_ = false;
};

}  // namespace

IoPlan plan_transfers(Ticket ticket, IoDirection direction, const BlockFile::Descriptors& files,
                      const IoBatch& batch, std::uint64_t piece_bytes) {
  Planner planner(ticket, direction, files, piece_bytes);
  for (const std::uint32_t i : order_of(batch.offsets)) planner.add(Operation(batch, i));
  return planner.finish();
}

}  // namespace tiermem
