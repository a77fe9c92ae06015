// The tickets of an engine: how many operations each still waits for, and how it ended.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "io_operation.h"
#include "io_queue.h"

namespace tiermem {

// Counters that any thread may read while another adds.
class AtomicIoCounters {
 public:
  void add_in_flight(std::uint64_t operations) noexcept { in_flight_ += operations; }
  void add_bytes(IoDirection direction, std::uint64_t bytes) noexcept;
  void end_operations(std::uint64_t operations) noexcept { in_flight_ -= operations; }
  void count_successes(IoDirection direction, std::uint64_t operations) noexcept;
  void count_error() noexcept { ++errors_; }
  IoCounters snapshot() const noexcept;

 private:
  std::atomic<std::uint64_t> bytes_read_ = 0;
  std::atomic<std::uint64_t> bytes_written_ = 0;
  std::atomic<std::uint64_t> reads_ = 0;
  std::atomic<std::uint64_t> writes_ = 0;
  std::atomic<std::uint64_t> errors_ = 0;
  std::atomic<std::uint64_t> in_flight_ = 0;
};

// Not thread-safe but for counters(): the engine guards it.
class IoTickets {
 public:
  // Checks the batch, gives it a ticket and appends its transfers to `queue`.
  // Throws as IoEngine::submit(); nothing changed then.
  Ticket open(IoDirection direction, const BlockFile& file, const IoBatch& batch,
              std::uint64_t piece_bytes, IoQueue& queue);

  // Throws std::invalid_argument for an unknown ticket.
  IoResult result(Ticket ticket) const;
  void forget(Ticket ticket);

  // Whether a transfer of the ticket has failed, so that its others need not start.
  // REQUIRES: a transfer of the ticket has not ended.
  bool has_failed(Ticket ticket) const { return tickets_.at(ticket).error != 0; }

  // The transfer ended well, with its error(), or unstarted because its ticket had failed or, for
  // cancel, was given up. Each returns true if the ticket is done by that.
  // REQUIRES: the transfer has not ended before.
  bool finish(const IoOperation& transfer);
  bool fail(const IoOperation& transfer);
  bool skip(const IoOperation& transfer);
  bool cancel(const IoOperation& transfer);

  const AtomicIoCounters& counters() const noexcept { return counters_; }
  AtomicIoCounters& counters() noexcept { return counters_; }

 private:
  // An operation that was cut: it has ended when its pieces have.
  struct Cut {
    std::uint32_t num_pending = 0;
    bool is_good = true;  // no piece ended in another way than well
  };

  struct State {
    std::shared_ptr<const BlockFile::Descriptors> files;  // until the last transfer ended
    std::uint64_t num_pending = 0;                        // transfers
    std::vector<Cut> cuts;
    bool is_forgotten = false;
    int error = 0;
    std::string message;
  };

  const State& state(Ticket ticket) const;
  bool end(const IoOperation& transfer, bool is_good);

  Ticket next_ticket_ = 1;
  std::unordered_map<Ticket, State> tickets_;
  AtomicIoCounters counters_;
};

}  // namespace tiermem
