// The attention kernel without special instructions.
#include "attention_instructions.h"
#include "attention_portable.h"

namespace tiermem {

constexpr AttentionKernel kPortableAttention = kernel_of<Portable>(AttentionInstructions::portable);

}  // namespace tiermem
