// The kernels for AVX-512 with dot products in bfloat16. Standard headers come first: their code must not be compiled
// for this target.
#ifdef __x86_64__
#include "includes.h"

#ifdef __clang__
#pragma clang attribute push(                                                                                  \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
#endif
#define RNF_ISA avx512_bf16
#define RNF_VECTOR_BYTES 64
#define RNF_MAX_OUTPUTS 8
#define RNF_TABLE_LOOKUP
#define RNF_BFLOAT16
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
