// The kernels for AVX2 + FMA. Standard headers come first: their code must not be compiled for this target.
#ifdef __x86_64__
#include "includes.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define RNF_ISA avx2
#define RNF_VECTOR_BYTES 32
#define RNF_MAX_OUTPUTS 4
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
