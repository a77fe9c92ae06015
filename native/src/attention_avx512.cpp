// The attention kernel for AVX-512F. Compiled for it: see attention_vectors.h.
#if defined(__x86_64__)
#include "attention_avx512.h"
#include "attention_instructions.h"

namespace tiermem {

constexpr AttentionKernel kAvx512Attention = kernel_of<Avx512>(AttentionInstructions::avx512);

}  // namespace tiermem
#endif
