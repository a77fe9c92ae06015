#include "io_tickets.h"

#include <cerrno>
#include <stdexcept>
#include <utility>

#include "io_plan.h"

namespace tiermem {
namespace {

[[noreturn]] void refuse(const std::string& name, std::size_t i, std::int64_t value,
                         const std::string& range) {
  throw std::invalid_argument(name + "[" + std::to_string(i) + "]=" + std::to_string(value) +
                              ": must be " + range);
}

void require_same_size(const char* name, std::size_t size, std::size_t wanted) {
  if (size == wanted) return;
  throw std::invalid_argument(std::string(name) + " has " + std::to_string(size) +
                              " elements, offsets has " + std::to_string(wanted));
}

void require_valid_tail(const IoBatch& batch) {
  const bool has_tail = !batch.tail_addresses.empty();
  if (has_tail) {
    require_same_size("tail_addresses", batch.tail_addresses.size(), batch.offsets.size());
  }
  if (batch.tail_length < 0 || has_tail != (batch.tail_length > 0 && !batch.offsets.empty())) {
    throw std::invalid_argument("tail_length=" + std::to_string(batch.tail_length) +
                                ": must be 1 or more with tail_addresses and 0 without");
  }
}

// The comparisons subtract, so that no sum of large numbers can wrap.
void require_valid_operation(const IoBatch& batch, std::size_t i, std::uint64_t file_bytes) {
  const auto end = static_cast<std::int64_t>(file_bytes);
  const std::int64_t offset = batch.offsets[i];
  if (offset < 0 || offset > end) refuse("offsets", i, offset, "0 to " + std::to_string(end));
  const std::int64_t most = end - offset - batch.tail_length;
  const std::int64_t length = batch.lengths[i];
  if (length < 1 || length > most) {
    refuse("lengths", i, length,
           "1 to " + std::to_string(most) + " at offset " + std::to_string(offset) + " of " +
               std::to_string(end) + " bytes");
  }
  if (batch.addresses[i] == 0) refuse("addresses", i, 0, "an address");
  if (!batch.tail_addresses.empty() && batch.tail_addresses[i] == 0) {
    refuse("tail_addresses", i, 0, "an address");
  }
}

void require_valid(const IoBatch& batch, std::uint64_t file_bytes) {
  require_same_size("addresses", batch.addresses.size(), batch.offsets.size());
  require_same_size("lengths", batch.lengths.size(), batch.offsets.size());
  require_valid_tail(batch);
  for (std::size_t i = 0; i < batch.offsets.size(); ++i) {
    require_valid_operation(batch, i, file_bytes);
  }
}

}  // namespace

void AtomicIoCounters::add_bytes(IoDirection direction, std::uint64_t bytes) noexcept {
  (direction == IoDirection::read ? bytes_read_ : bytes_written_) += bytes;
}

void AtomicIoCounters::count_successes(IoDirection direction, std::uint64_t operations) noexcept {
  (direction == IoDirection::read ? reads_ : writes_) += operations;
}

IoCounters AtomicIoCounters::snapshot() const noexcept {
  return {bytes_read_, bytes_written_, reads_, writes_, errors_, in_flight_};
}

Ticket IoTickets::open(IoDirection direction, const BlockFile& file, const IoBatch& batch,
                       std::uint64_t piece_bytes, IoQueue& queue) {
  require_valid(batch, file.size_bytes());
  auto files = file.descriptors();
  const Ticket ticket = next_ticket_++;
  IoPlan plan = plan_transfers(ticket, direction, *files, batch, piece_bytes);
  State& state = tickets_[ticket];
  state.num_pending = plan.transfers.size();
  for (const std::uint32_t pieces : plan.num_pieces) state.cuts.push_back({.num_pending = pieces});
  if (state.num_pending > 0) state.files = std::move(files);
  counters_.add_in_flight(batch.offsets.size());
  queue.push(std::move(plan.transfers));
  return ticket;
}

const IoTickets::State& IoTickets::state(Ticket ticket) const {
  const auto found = tickets_.find(ticket);
  if (found == tickets_.end() || found->second.is_forgotten) {
    throw std::invalid_argument("ticket " + std::to_string(ticket) +
                                " was not given out or was forgotten");
  }
  return found->second;
}

IoResult IoTickets::result(Ticket ticket) const {
  const State& found = state(ticket);
  if (found.num_pending > 0) return {};
  if (found.error == 0) return {IoStatus::ok, 0, {}};
  return {IoStatus::failed, found.error, found.message};
}

void IoTickets::forget(Ticket ticket) {
  if (state(ticket).num_pending == 0) {
    tickets_.erase(ticket);
  } else {
    tickets_.at(ticket).is_forgotten = true;
  }
}

bool IoTickets::end(const IoOperation& transfer, bool is_good) {
  const auto found = tickets_.find(transfer.ticket());
  State& state = found->second;
  const IoShare share = transfer.share();
  std::uint64_t num_ended = share.num_operations;
  if (share.cut != IoShare::kNotCut) {
    Cut& cut = state.cuts[share.cut];
    cut.is_good = cut.is_good && is_good;
    num_ended = --cut.num_pending == 0 ? 1 : 0;
    is_good = cut.is_good;
  }
  if (is_good) counters_.count_successes(transfer.direction(), num_ended);
  const bool is_done = --state.num_pending == 0;
  if (is_done) {
    state.files.reset();
    if (state.is_forgotten) tickets_.erase(found);
  }
  counters_.end_operations(num_ended);
  return is_done;
}

bool IoTickets::finish(const IoOperation& transfer) { return end(transfer, true); }

bool IoTickets::fail(const IoOperation& transfer) {
  counters_.count_error();
  State& state = tickets_.at(transfer.ticket());
  if (state.error == 0) {
    state.error = transfer.error();
    state.message = transfer.describe_error();
  }
  return end(transfer, false);
}

bool IoTickets::skip(const IoOperation& transfer) { return end(transfer, false); }

bool IoTickets::cancel(const IoOperation& transfer) {
  State& state = tickets_.at(transfer.ticket());
  if (state.error == 0) {
    state.error = ECANCELED;
    state.message = "cancelled: the engine was closed before the operation started";
  }
  return end(transfer, false);
}

}  // namespace tiermem
