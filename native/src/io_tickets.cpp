#include "io_tickets.h"

#include <cerrno>
#include <stdexcept>

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

void AtomicIoCounters::count_success(IoDirection direction) noexcept {
  ++(direction == IoDirection::read ? reads_ : writes_);
}

IoCounters AtomicIoCounters::snapshot() const noexcept {
  return {bytes_read_, bytes_written_, reads_, writes_, errors_, in_flight_};
}

Ticket IoTickets::open(IoDirection direction, const BlockFile& file, const IoBatch& batch,
                       std::deque<IoOperation>& queue) {
  require_valid(batch, file.size_bytes());
  auto files = file.descriptors();
  const Ticket ticket = next_ticket_++;
  const std::size_t num_operations = batch.offsets.size();
  State& state = tickets_[ticket];
  state.num_pending = num_operations;
  for (std::size_t i = 0; i < num_operations; ++i) {
    queue.emplace_back(ticket, direction, *files, batch, i);
  }
  if (num_operations > 0) state.files = std::move(files);
  counters_.add_in_flight(num_operations);
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

bool IoTickets::end_one(Ticket ticket) {
  counters_.end_operation();
  const auto found = tickets_.find(ticket);
  State& state = found->second;
  if (--state.num_pending > 0) return false;
  state.files.reset();
  if (state.is_forgotten) tickets_.erase(found);
  return true;
}

bool IoTickets::finish(const IoOperation& operation) {
  counters_.count_success(operation.direction());
  return end_one(operation.ticket());
}

bool IoTickets::fail(const IoOperation& operation) {
  counters_.count_error();
  State& state = tickets_.at(operation.ticket());
  if (state.error == 0) {
    state.error = operation.error();
    state.message = operation.describe_error();
  }
  return end_one(operation.ticket());
}

bool IoTickets::skip(const IoOperation& operation) { return end_one(operation.ticket()); }

bool IoTickets::cancel(const IoOperation& operation) {
  State& state = tickets_.at(operation.ticket());
  if (state.error == 0) {
    state.error = ECANCELED;
    state.message = "cancelled: the engine was closed before the operation started";
  }
  return end_one(operation.ticket());
}

}  // namespace tiermem
