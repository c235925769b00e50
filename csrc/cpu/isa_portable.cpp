// The kernels for any processor: 16-byte vectors (SSE2 on x86-64, NEON on arm64, plain code elsewhere).
#include "includes.h"

#define RNF_ISA portable
#define RNF_VECTOR_BYTES 16
#define RNF_MAX_OUTPUTS 4
#include "kernels.inc"
