// The attention kernel for AMX with bfloat16, beside AVX-512: many lines go by tiles, few by vectors.
#if defined(TIERMEM_HAS_AMX)
#include "attention_amx.h"
#include "attention_tile_unit.h"

namespace tiermem {
namespace {

// Lines of a unit from which on tiles are faster, and rows of K or V between what is read and prefetched.
constexpr int kFewestHalf = 9;
constexpr int kFewestBfloat = 9;
constexpr int kAheadRows = 192;

using Kernel = TileKernel<Amx, kFewestHalf, kFewestBfloat, kAheadRows>;

void prepare(const PrepareTask& task) {
  if (!Kernel::prepare(task)) kAvx512Attention.prepare(task);
}

void attend(const UnitTask& task) {
  if (!Kernel::attend(task)) kAvx512Attention.attend(task);
}

void merge(const MergeTask& task) { kAvx512Attention.merge(task); }

}  // namespace

constexpr AttentionKernel kAmxAttention = {AttentionInstructions::amx, &prepare, &attend, &merge};

}  // namespace tiermem
#endif
