// How the operations of a batch become transfers: cut where they are long, joined where they touch.
#pragma once

#include <cstdint>
#include <vector>

#include "io_operation.h"

namespace tiermem {

struct IoPlan {
  std::vector<IoOperation> transfers;     // in the order of their offsets
  std::vector<std::uint32_t> num_pieces;  // of each operation that was cut
};

// REQUIRES: a valid batch; piece_bytes a multiple of kDirectAlignment; `files` outlives the plan.
// ENSURES: every byte of the batch is in exactly one transfer.
IoPlan plan_transfers(Ticket ticket, IoDirection direction, const BlockFile::Descriptors& files,
                      const IoBatch& batch, std::uint64_t piece_bytes);

}  // namespace tiermem
