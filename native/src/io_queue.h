// Transfers that wait to be started: reads before writes, and writes all the same.
#pragma once

#include <deque>
#include <utility>
#include <vector>

#include "io_operation.h"

namespace tiermem {

// Not thread-safe: the engine guards it.
class IoQueue {
 public:
  bool empty() const noexcept { return reads_.empty() && writes_.empty(); }

  void push(std::vector<IoOperation>&& transfers) {
    for (IoOperation& transfer : transfers) {
      (transfer.direction() == IoDirection::read ? reads_ : writes_).push_back(std::move(transfer));
    }
  }

  // REQUIRES: not empty().
  IoOperation pop() {
    const bool is_writes_turn = !writes_.empty() && num_reads_in_row_ >= IoEngine::kReadsPerWrite;
    if (reads_.empty() || is_writes_turn) {
      num_reads_in_row_ = 0;
      return take(writes_);
    }
    num_reads_in_row_ = writes_.empty() ? 0 : num_reads_in_row_ + 1;
    return take(reads_);
  }

 private:
  static IoOperation take(std::deque<IoOperation>& queue) {
    IoOperation transfer = std::move(queue.front());
    queue.pop_front();
    return transfer;
  }

  std::deque<IoOperation> reads_;
  std::deque<IoOperation> writes_;
  unsigned num_reads_in_row_ = 0;  // started while writes waited
};

}  // namespace tiermem
